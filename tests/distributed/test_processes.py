"""Processes that differ, fail or stand still: all end, soon, and say why."""

import signal
import subprocess
import sys

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
    code = {"fail": 1, "stuck": 3}[verb]  # a restart repeats a bug
    assert [waiting.returncode, other.returncode] == [code, code], waiting.stderr
    assert reason in other.stderr
    assert f"process 1 ended, so this one ends too: {reason}" in waiting.stderr
    if verb == "stuck":  # the stacks say where
        assert "hosts_worker.py" in other.stderr and "in stuck" in other.stderr


def test_the_one_that_was_waited_for_prints_its_stacks_too():
    """Which of two watches looks first is chance."""
    waiting, still = ends("waits")
    assert [waiting.returncode, still.returncode] == [3, 3], waiting.stderr
    assert "process 0 ended, so this one ends too: stuck: step 8" in still.stderr
    assert all("hosts_worker.py" in r.stderr for r in (waiting, still))
    assert all("in waits" in r.stderr for r in (waiting, still))


def test_a_mistake_in_one_process_ends_the_other_with_the_mistakes_code():
    """The other one's collective fails at the same time, which alone means "retry"."""
    for r in ends("mistake"):
        assert r.returncode == 2, r.stderr
        assert "no such shard" in r.stderr


def test_a_process_that_never_releases_the_gil_is_killed():
    """The code of SIGALRM: 142 in a shell, which is worth a restart."""
    (done,) = multiprocess.run([WORKER, "gil"], processes=1, devices=1, timeout=60)
    assert done.returncode == -signal.SIGALRM, done.stderr
    assert "hosts_worker.py" in done.stderr and "in gil" in done.stderr


@pytest.mark.parametrize("index", ["0", "1"])
def test_a_process_whose_peers_do_not_come_says_so(index, tmp_path):
    """Process 0 waits for the other, process 1 for an address where nobody is."""
    env = multiprocess.environment(2, 1) | {"SD3_PROCESS_ID": index, "SD3_INIT_S": "3"}
    args = ["train", "--config=configs/quickstart.py:tiny", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "sd3_jax.main", *args],
        cwd=multiprocess.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    line = done.stderr.splitlines()[-1]
    assert line.startswith(
        "sd3-jax: error: SD3_INIT_S = 3: not all processes connected"
    )
    assert f"process {index} of 2, at 127.0.0.1" in line
