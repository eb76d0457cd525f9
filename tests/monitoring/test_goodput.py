"""Every second is of one kind, whatever is killed when."""

import math

import pytest

from sd3_jax.monitoring.goodput import KINDS, Goodput, duration, table


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


class Life:
    """A life of the run, which appends its lines to `rows`."""

    def __init__(self, clock, rows, step):
        self.clock, self.rows, self.step = clock, rows, step
        self.goodput = Goodput(clock=clock)
        clock.now += 3
        self.goodput.go_on(rows, step)
        # As Metrics does: what will be done again is forgotten.
        rows[:] = [row for row in rows if row["step"] <= step]
        self.write()
        with self.goodput.spend("compile"):
            clock.now += 5
        self.goodput.turn("productive")

    def write(self, **kwargs):
        row = {"step": self.step, "kind": "goodput", "time": self.clock.now}
        self.rows.append(row | self.goodput.line(**kwargs))

    def steps(self, n):
        for _ in range(n):
            self.step += 1
            with self.goodput.spend("data_wait"):
                self.clock.now += 0.25
            self.clock.now += 1

    def save(self, **kwargs):
        with self.goodput.spend("checkpoint"):
            self.clock.now += 2
        self.write(**kwargs)


def seconds(row):
    return {kind: row[f"{kind}_s"] for kind in KINDS if row[f"{kind}_s"]}


def test_an_unbroken_life(clock):
    rows = []
    life = Life(clock, rows, 0)
    life.steps(4)
    life.save()
    assert seconds(rows[-1]) == dict(
        start_up=3, compile=5, productive=4, data_wait=1, checkpoint=2
    )
    assert rows[-1]["productive"] == 4 / 15 and rows[-1]["restarts"] == 0
    assert math.isclose(sum(rows[-1][kind] for kind in KINDS), 1, abs_tol=1e-9)


def test_what_was_done_before_main_is_start_up(clock):
    assert Goodput(clock.now - 7, clock=clock).line()["start_up_s"] == 7


def test_steps_after_the_checkpoint_and_the_gap_are_lost(clock):
    rows = []
    life = Life(clock, rows, 0)
    life.steps(4)
    life.save()
    life.steps(2)  # 2.5 s, then killed
    life.write()  # by an evaluation, of a step that will be done again
    clock.now += 60
    again = Life(clock, rows, 4)
    again.steps(2)
    again.save()
    assert seconds(rows[-1]) == dict(
        start_up=6, compile=10, productive=6, data_wait=1.5, checkpoint=4, lost=62.5
    )
    assert rows[-1]["restarts"] == 1
    assert sum(seconds(rows[-1]).values()) == clock.now - 1000


def test_a_life_without_a_checkpoint_is_lost_but_for_its_start(clock):
    rows = []
    for step in 0, 0, 0:
        life = Life(clock, rows, step)
        life.steps(3)
        clock.now += 10
    life.save()
    assert rows[-1]["lost_s"] == 2 * (5 + 3.75 + 10) and rows[-1]["restarts"] == 2
    assert sum(seconds(rows[-1]).values()) == clock.now - 1000


def test_a_save_that_was_not_finished_does_not_count(clock):
    rows = []
    life = Life(clock, rows, 0)
    life.steps(2)
    life.save()
    life.steps(2)
    life.save()  # told of, and killed before it was on disk
    again = Life(clock, rows, 2)
    assert seconds(rows[-1])["lost"] == 2 * 1.25 + 2
    again.steps(2)
    again.save()
    assert rows[-1]["productive_s"] == 4


def test_a_finished_run_that_gets_more_steps_did_not_lose_the_time_between(clock):
    rows = []
    life = Life(clock, rows, 0)
    life.steps(2)
    life.save(finished=True)
    clock.now += 1e6
    Life(clock, rows, 2)
    assert rows[-1]["lost_s"] == 0 and rows[-1]["start_up_s"] == 6


def test_a_failure_inside_is_still_of_its_kind(clock):
    goodput = Goodput(clock=clock)
    goodput.turn("productive")
    with pytest.raises(ValueError), goodput.spend("evaluation"):
        clock.now += 2
        raise ValueError
    clock.now += 1
    line = goodput.line()
    assert (line["evaluation_s"], line["productive_s"]) == (2, 1)


def test_a_clock_that_is_set_back_takes_nothing_away(clock):
    goodput = Goodput(clock=clock)
    goodput.go_on([dict(kind="goodput", step=0, time=clock.now + 50)], 0)
    clock.now -= 100
    goodput.turn("productive")
    clock.now += 5
    assert seconds(goodput.line()) == {"productive": 5}


def test_the_last_line_is_in_words(clock):
    goodput = Goodput(clock=clock)
    goodput.turn("productive")
    clock.now += 3150
    with goodput.spend("compile"):
        clock.now += 450
    assert goodput.words() == (
        "goodput 87.5 %: compile 12.5 %, data 0.0 %, checkpoint 0.0 %, "
        "evaluation 0.0 %, start-up 0.0 %, lost 0.0 % of 1 h 00 min"
    )
    assert [duration(s) for s in (5.04, 119.9, 3720)] == [
        "5.0 s",
        "1 min 59 s",
        "1 h 02 min",
    ]


def test_the_table_is_the_newest_line_s(clock):
    rows = []
    life = Life(clock, rows, 0)
    life.steps(4)
    life.save()
    assert table(rows)[:2] == [("productive", 4 / 15, 4.0), ("compile", 1 / 3, 5.0)]
    assert table([{"kind": "train", "step": 1}]) == []
