import json
import multiprocessing
import os
import socket
import threading
import time

import pytest
from etils import epath

from sd3_jax import files
from sd3_jax.distributed import lock
from sd3_jax.errors import UserError

FILE = ".train.lock"


def hold(path, ready, done):
    with lock.held(path, "train"):
        ready.set()
        done.wait(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock."""
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    process = spawn.Process(target=hold, args=(tmp_path, ready, done))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_two_jobs_of_a_kind_in_one_workdir_are_refused(tmp_path, holder):
    with pytest.raises(UserError) as error:
        with lock.held(tmp_path, "train"):
            raise AssertionError
    message = str(error.value)
    assert str(tmp_path) in message and f"pid {holder.pid}" in message
    assert "another workdir" in message and "\n" not in message
    with lock.held(tmp_path, "sample"):  # another kind may read on
        pass


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_file_is_refused_and_kept(tmp_path, kind):
    target, place = tmp_path / "precious.txt", tmp_path / FILE
    target.write_text("kept")
    place.symlink_to(target) if kind == "link" else os.mkfifo(place)
    with pytest.raises(UserError, match=f"{FILE} is .*remove it"):
        with lock.held(tmp_path, "train"):
            raise AssertionError
    assert target.read_text() == "kept"


def test_a_killed_job_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.join()
    with lock.held(tmp_path, "train"):
        assert json.loads((tmp_path / FILE).read_bytes())["pid"] == os.getpid()
    assert (tmp_path / FILE).read_bytes() == b""
    with lock.held(tmp_path, "train"):
        pass


def elsewhere(path, beats):
    row = {"host": "another", "pid": 7, "since": "now", "start": "x:1", "beats": beats}
    path.write_text(json.dumps(row))


def test_a_holder_on_another_host_is_known_by_its_beat(tmp_path):
    path, over = tmp_path / FILE, threading.Event()
    elsewhere(path, 0)

    def beat():
        n = 0
        while not over.wait(0.02):
            elsewhere(path, n := n + 1)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="host another, pid 7"):
            with lock.held(tmp_path, "train", beat=0.2):
                pass
    finally:
        over.set()
        thread.join()
    with lock.held(tmp_path, "train", beat=0.2):  # it is silent now: gone
        time.sleep(0.5)
        row = json.loads(path.read_bytes())
    assert row["host"] == socket.gethostname() and row["beats"] > 1


def test_on_an_object_store_the_beat_alone_tells(tmp_path, monkeypatch):
    """Where no lock of the system's reaches, as with gs://."""
    path = epath.Path(tmp_path / FILE)
    monkeypatch.setattr(files, "remote", lambda path: True)
    mine, other = lock.Lock(path, beat=0.1), lock.Lock(path, beat=0.1)
    mine.take()
    with pytest.raises(UserError, match="another job is running"):
        other.take()
    other.release()  # which never had it
    assert path.exists()
    mine.release()
    assert not path.exists()
    other.take()
    other.release()


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file"):
        with lock.held(tmp_path / "file", "train"):
            pass
