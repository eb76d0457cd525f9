"""Ctrl-C and SIGTERM: one line, and a second Ctrl-C ends at once, in C++ as well."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from sd3_jax import main
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.training.nonfinite import NonFinite
from sd3_jax.training.run_progress import RunProgress

BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)"  # as a compiler is
SLEEPS = "time.sleep(60)"
PROGRAM = """
import hashlib, signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below nohup
from sd3_jax import main
from sd3_jax.distributed import signals
watchdog = types.SimpleNamespace(doing=lambda: "compiling the step")
sys.modules["sd3_jax.distributed.watchdog"] = watchdog
signals.PATIENCE = 0.2
main.parse, main.keep_programs = lambda argv: types.SimpleNamespace(workdir=""), id
main.join_processes = lambda: None
def run(call):
    signal.signal(signal.SIGTERM, lambda *_: None)
    print("ready", flush=True)
    {body}
main.run = run
sys.exit(main.main(["train"]))
"""


def started(body):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def test_a_first_ctrl_c_ends_with_one_line():
    process = started(SLEEPS)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "sd3-jax: interrupted\n"


def test_a_second_ctrl_c_ends_what_does_not_end_of_the_first():
    process = started(BUSY)
    time.sleep(2)  # by then it is in C, where no Python handler runs
    try:
        process.send_signal(signal.SIGTERM)
        line = process.stderr.readline()
        assert line.startswith(
            "sd3-jax: SIGTERM: stopping as soon as possible (now: comp"
        )
        process.send_signal(signal.SIGINT)
        line = process.stderr.readline()
        assert line.startswith(
            "sd3-jax: Ctrl-C: stopping as soon as possible; press again"
        )
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(timeout=30) == 130 and time.monotonic() - began < 20
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("step", "saved", "words"),
    [
        (0, 0, "at the start; run the same command to start again from the beginning"),
        (
            7,
            0,
            "at step 7 of 9; run the same command to start again from the beginning",
        ),
        (7, 5, "at step 7 of 9; run the same command to resume from step 5"),
    ],
)
def test_training_says_where_it_stopped_and_how_to_go_on(step, saved, words):
    progress = RunProgress(9, NonFinite(0, last_saved=saved), step=step)
    with pytest.raises(KeyboardInterrupt, match=f"^{words}$"):
        with progress.explaining_interrupts():
            raise KeyboardInterrupt


def test_a_port_in_use_is_one_line(monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("SD3_COORDINATOR", f"127.0.0.1:{port}")
        monkeypatch.setenv("SD3_NUM_PROCESSES", "2")
        monkeypatch.setenv("SD3_PROCESS_ID", "0")
        with pytest.raises(UserError, match=f"port {port}: Address already in use"):
            main.join_processes()
    main.refuse_port_in_use(main.described_peers())  # free again
    monkeypatch.setenv("SD3_COORDINATOR", "127.0.0.1:65536")
    with pytest.raises(UserError, match="expected host:port"):
        main.join_processes()


def test_unequal_devices_are_refused_with_both_counts():
    process = lambda index: SimpleNamespace(process_index=index)
    sharding.refuse_uneven([process(i // 4) for i in range(8)])
    with pytest.raises(UserError, match="processes 0 and 2 have 2 and 1 devices"):
        sharding.refuse_uneven([process(i) for i in (0, 0, 1, 1, 2)])
