"""Rates and times that are left: without the compilation that is in the first item."""

from types import SimpleNamespace

import pytest

from sd3_jax.monitoring import compile_time, progress
from sd3_jax.monitoring.progress import Pace, Progress


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", fake)
    monkeypatch.setattr(compile_time, "time", fake)
    return clock


def marked(clock, seconds):
    pace = Pace()
    for count, duration in enumerate(seconds, 1):
        clock.now += duration
        pace.mark(count)
    return pace


def test_the_first_item_does_not_count(clock):
    assert marked(clock, [60]).rate() is None
    pace = marked(clock, [60, 2, 2])
    assert pace.rate() == 0.5 and pace.time_left(10) == "20 s left"


def test_the_rate_follows_a_change_of_pace(clock):
    slow_then_fast = [10] * 50 + [1] * progress.WINDOW
    assert marked(clock, slow_then_fast).rate() == 1


def test_items_of_milliseconds_share_a_mark(clock):
    pace = marked(clock, [0.001] * 10_000)
    assert len(pace.marks) <= 32 and abs(pace.rate() - 1000) < 1


def test_lines_of_progress(clock, capsys):
    with Progress("pictures", total=100) as counted:
        for seconds in (50, 10, 10, 40):  # the first with compilation
            clock.now += seconds
            counted.add(things=1, bytes=10)
        assert counted.words() == "4 pictures, 0.05 a second, 2 min left"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == " 10%  1 picture"
    assert lines[-1] == " 40%  4 pictures in 2 min"


def test_nested_phases_of_compilation_count_once(clock):
    compiling = compile_time.CompileTime()
    for end, event, seconds in (
        (103, "jaxpr_trace_duration", 2),
        (105, "jaxpr_trace_duration", 5),  # which the one before is a part of
        (109, "backend_compile_duration", 3),
    ):
        clock.now = end
        compiling.add(f"/jax/core/compile/{event}", seconds)
    compiling.add("/jax/checkpoint/write", 1_000)
    assert compiling.total() == 8
