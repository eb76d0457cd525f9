"""A read that fails is not damage: nothing is set aside for it."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import multiprocess
import pytest
from checkpoints.checkpoint_worker import POLICY, abstract_state, files, write

from sd3_jax.checkpoints import integrity, restoring, step_folders
from sd3_jax.checkpoints.manager import Checkpoints
from sd3_jax.errors import RetryableError, UserError

HERE = Path(__file__).parent
FOR_EVER = 10**6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2; nothing here may change them."""
    directory = tmp_path_factory.mktemp("saved")
    write(directory, 1, 2, abstract=abstract_state(1))
    return directory


@pytest.fixture(scope="module")
def answers(saved, tmp_path_factory):
    """By (file, errno's name, reads that fail): what became of a restore."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler, with which to make reads fail")
    place = tmp_path_factory.mktemp("shim")
    source, shim = HERE / "failing_reads.c", place / "failing_reads.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    names = [str(path.relative_to(saved / "2")) for path in files(saved / "2")]
    rows = [(name, "EIO", 1) for name in names]
    rows += [
        (name, code, FOR_EVER)
        for name in names
        if name.startswith(("state/ocdbt", "sums/", "about/data"))
        for code in ("EIO", "EACCES")
    ]
    plan = [(f"/2/{name}", getattr(errno, code), n) for name, code, n in rows]
    environment = os.environ | {
        "LD_PRELOAD": str(shim),
        "PYTHONPATH": os.pathsep.join([str(multiprocess.ROOT), str(HERE.parent)]),
        "JAX_PLATFORMS": "cpu",
    }
    command = [HERE / "failing_reads_worker.py", saved, place / "left"]
    done = subprocess.run(
        [sys.executable, *map(str, command), json.dumps(plan)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(rows, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_one_failed_read_of_any_file_costs_nothing(answers):
    once = {row[0]: answer for row, answer in answers.items() if row[2] == 1}
    failed = [name for name, (_, _, count, _) in once.items() if count]
    assert len(failed) > 10  # the fault was met
    for name, (kind, text, _, steps) in once.items():
        assert (kind, steps) == ("", ["1", "2"]), (name, text)


@pytest.mark.parametrize(
    "code, kind", [("EIO", "RetryableError"), ("EACCES", "UserError")]
)
def test_reads_that_fail_for_ever_set_nothing_aside(answers, code, kind):
    rows = [x for row, x in answers.items() if row[1:] == (code, FOR_EVER)]
    assert len(rows) > 3
    for found, text, count, steps in rows:
        assert count and steps == ["1", "2"]
        assert found == kind and "\n" not in text, text
        assert os.strerror(getattr(errno, code)) in text or "right checksums" in text


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_folder_that_does_not_answer_hides_no_step(saved, monkeypatch, code):
    """epath's own `exists` says no to all of these."""
    real, calls = os.stat, []

    def failing(path, *args, **kwargs):
        if str(path).endswith(f"2/{step_folders.COMMIT}"):
            calls.append(path)
            if len(calls) <= limit:
                raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", failing)
    limit = 2
    assert Checkpoints(saved, **POLICY).latest() == 2 and len(calls) > limit
    limit = FOR_EVER
    with pytest.raises(RetryableError, match=os.strerror(code)):
        Checkpoints(saved, **POLICY)


def test_a_folder_that_is_denied_is_the_users(saved, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(UserError, match="Permission denied"):
        integrity.is_there(saved / "2")


def test_damage_is_believed_when_it_is_seen_twice(saved, monkeypatch):
    """A server's answer that is cut once looks as a damaged file does."""
    real, cut = integrity._sum, []

    def once(path):
        size, crc = real(path)
        if not cut:
            cut.append(path)
            size -= 1
        return size, crc

    monkeypatch.setattr(integrity, "_sum", once)
    _, data, _ = Checkpoints(saved, **POLICY).restore(abstract_state(1))
    assert cut and data == {"next_step": 2}
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]


def test_a_step_under_another_number_is_refused(saved, tmp_path):
    shutil.copytree(saved / "2", tmp_path / "20")
    abstract = abstract_state(1)
    for read in (
        lambda: Checkpoints(tmp_path, **POLICY).restore(abstract),
        lambda: restoring.restore_params(tmp_path, abstract.ema),
        lambda: restoring.saved_config(tmp_path),  # before anything is compiled
    ):
        with pytest.raises(UserError, match=r"20 was saved as step 2: rename it to"):
            read()
