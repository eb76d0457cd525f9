"""Processes that differ, fail or stand still: all end, soon, and say why."""

import multiprocess
import pytest

WORKER = "tests/hosts_worker.py"


def ends(verb):
    return multiprocess.run([WORKER, verb], devices=1, timeout=60)


def test_processes_that_agree_go_on():
    assert [r.returncode for r in ends("same")] == [0, 0]


def test_a_difference_is_told_by_both():
    for r in ends("differ"):
        assert r.returncode == 2, r.stderr
        (line,) = r.stderr.splitlines()
        assert line == (
            "sd3-jax: error: processes 0 and 1 have different config:"
            " lr: 0.0001 and 0.0002"
        )


def test_what_the_first_finds_all_know():
    for r in ends("first"):
        assert r.returncode == 2, r.stderr
        assert r.stderr.splitlines() == ["sd3-jax: error: no such folder"]


@pytest.mark.parametrize("verb", ["fail", "stuck"])
def test_a_process_that_waits_for_one_that_is_gone_ends(verb):
    waiting, other = ends(verb)
    reason = {
        "fail": "ValueError: a bug",
        "stuck": "stuck: step 7 has taken more than 3 s",
    }[verb]
    assert [waiting.returncode, other.returncode] == [1, 1], waiting.stderr
    assert reason in other.stderr
    assert f"process 1 has ended, so this one does: {reason}" in waiting.stderr
    if verb == "stuck":  # the stacks say where
        assert "hosts_worker.py" in other.stderr and "in stuck" in other.stderr
