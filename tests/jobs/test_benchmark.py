"""The benchmark job at its smallest: both sides, its files, the guard, mistakes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.benchmark import get_config
from sd3_jax import main
from sd3_jax.distributed.lock import Lock
from sd3_jax.errors import UserError
from sd3_jax.jobs import benchmark
from sd3_jax.tools.benchmark import benchmark_page, cases, machine, timing_summary

ROOT = Path(__file__).parents[2]
TINY = "--config=configs/benchmark.py:tiny"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(exit code, folder) of a forward pass and training steps, beside PyTorch's."""
    folder = tmp_path_factory.mktemp("benchmark")
    flags = ["cases=forward,train", "scaling.kinds=forward", "scaling.depths=2"]
    flags = [f"--config.benchmark.{flag}" for flag in flags]
    return main.main(["benchmark", TINY, f"--workdir={folder}", *flags]), folder


def test_both_sides_are_timed_in_turn(ran):
    code, folder = ran
    result = json.loads((folder / "benchmark.json").read_text())
    assert code == 0
    assert result["peak"]["tflops"] > 0
    for case in result["cases"]:
        ours, theirs = case["sides"]["ours"], case["sides"]["eager"]
        turns = case["turns"]
        assert len(turns["ours"]) == len(turns["eager"]) == 2
        pairs = [b / a for a, b in zip(turns["ours"], turns["eager"])]
        assert case["ratios"]["eager"]["each"] == pytest.approx(pairs)
        assert 0 < case["gaps"]["eager"] < 1e-3
        rate = case["flops"] / np.median(turns["ours"]) / 1e12
        assert ours["tflops"] == pytest.approx(rate)
        assert ours["compile"] > 0 and min(ours["peak"], theirs["peak"]) > 1e7
    assert {"jax", "torch", "diffusers"} <= set(result["about"]["versions"])


def test_the_losses_of_training_are_the_same(ran):
    result = json.loads((ran[1] / "benchmark.json").read_text())
    train = next(case for case in result["cases"] if case["kind"] == "train")
    assert train["gaps"]["eager"] < 1e-4


def test_it_leaves_a_table_and_a_chart(ran):
    page = (ran[1] / "benchmark.md").read_text()
    assert "| forward | ours |" in page and "PyTorch eager" in page
    assert "## forward over tokens" in page
    assert (ran[1] / "benchmark.svg").read_text().count("<svg") == 1
    html = (ran[1] / "benchmark.html").read_text()
    assert html.count("<svg") == 1 and "PyTorch eager" in html
    assert "forward over tokens" in html
    assert sorted(x.name for x in ran[1].iterdir() if x.is_dir()) == []


def test_growth_is_beside_that_of_flops(ran):
    result = json.loads((ran[1] / "benchmark.json").read_text())
    tokens = next(x for x in result["scaling"] if x["axis"] == "tokens")
    first, second = tokens["growth"]
    assert first == {"time": 1, "flops": 1, "relative": 1}
    assert second["flops"] > 1
    assert second["relative"] == pytest.approx(second["time"] / second["flops"])


def test_who_disagrees_is_not_timed(tmp_path, monkeypatch):
    """In the table it says why, and the exit code is 1."""
    gaps = iter([(0.0, "ab")])
    monkeypatch.setattr(cases, "gap", lambda *_: next(gaps, (0.5, "velocity")))
    flags = ["cases=forward", "scaling.kinds="]
    flags = [f"--config.benchmark.{flag}" for flag in flags]
    assert main.main(["benchmark", TINY, f"--workdir={tmp_path}", *flags]) == 1
    (case,) = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    assert case["ratios"] == {} and case["turns"]["eager"] == []
    page = (tmp_path / "benchmark.md").read_text()
    assert "refused: velocity differs by 5.0e-01, at most 1e-03" in page
    html = (tmp_path / "benchmark.html").read_text()
    assert "forward, eager: velocity differs by 5.0e-01" in html


def test_gap_is_relative_and_sees_what_is_not_finite():
    ours = {"a": np.ones(4), "b": np.full(4, 2.0)}
    theirs = {"a": np.ones(4), "b": np.full(4, 2.5)}
    assert cases.gap(ours, theirs) == (pytest.approx(0.2), "b")
    assert cases.gap({"a": np.array([np.nan])}, {"a": np.ones(1)})[0] == np.inf
    assert cases.gap({"a": np.ones(2)}, {"a": np.ones(3)})[0] == np.inf
    with pytest.raises(ValueError, match="ours gives"):
        cases.gap({"a": np.ones(1)}, {"b": np.ones(1)})


def result(**ratios):
    made = [
        {"name": name, "ratios": {"eager": {"median": ratio}} if ratio else {}}
        for name, ratio in ratios.items()
    ]
    return {"cases": made}


def test_the_guard_names_what_got_worse():
    before = result(forward=1.2, train=1.0, sample=1.5, t5=2.0)
    now = result(forward=1.03, train=0.84, sample=None)
    assert timing_summary.worse(now, before, 0.15) == [
        "train, eager: 0.84, was 1.00: 16% worse",
        "sample, eager: not measured, was 1.50",
    ]
    assert timing_summary.worse(before, before, 0.15) == []


def test_the_committed_table_is_one_that_the_guard_reads():
    found = benchmark.guarded(str(ROOT / "benchmarks" / "speed_cpu.json"))
    names = [case["name"] for case in found["cases"]]
    assert names == list(get_config().benchmark.cases)
    assert all(case["ratios"] for case in found["cases"])
    page = (ROOT / "benchmarks" / "speed_cpu.md").read_text()
    assert page.strip() == benchmark_page.page(found)


def test_ratios_are_of_pairs():
    assert timing_summary.ratios([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == {
        "median": 1.0,
        "min": 0.5,
        "max": 2.0,
        "each": [2.0, 1.0, 0.5],
    }


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("cases=forwad", 'did you mean "forward"'),
        ("cases=train sid=64", 'did you mean "side"'),
        ("cases=train side=20", "expected a multiple of 16"),
        ("cases=train batch=0", "expected batch=NUMBER, 1 or more"),
        ("cases=t5,t5", '"t5" twice'),
        ("guard=no/such.json", "No such file"),
        ("against=eagre", "expected some of eager, compile"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, capsys, flag, words):
    flags = [f"--workdir={tmp_path}", f"--config.benchmark.{flag}"]
    assert main.main(["benchmark", TINY, *flags]) == 2
    told = capsys.readouterr().err
    assert words in told and len(told.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_result_is_no_guard(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(UserError, match="expected a benchmark.json"):
        benchmark.guarded(str(path))


def test_two_at_once_are_refused(tmp_path, capsys):
    lock = Lock(tmp_path / ".benchmark.lock")
    lock.take()
    assert main.main(["benchmark", TINY, f"--workdir={tmp_path}"]) == 2
    lock.release()


def test_it_needs_nothing_of_the_data_path():
    """A machine with an accelerator may have neither grain nor diffusers."""
    code = (
        "import importlib, sys\n"
        "absent = 'grain array_record diffusers torch transformers'.split()\n"
        "sys.modules |= dict.fromkeys(absent)\n"
        "names = 'jobs.benchmark tools.benchmark.jax_side config.validation'.split()\n"
        "for name in names:\n"
        "    importlib.import_module(f'sd3_jax.{name}')\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_what_is_not_there_is_said(monkeypatch):
    real = importlib.util.find_spec
    gone = lambda name: None if name == "diffusers" else real(name)
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    assert machine.missing("train") == "diffusers is not installed"
    assert machine.missing("t5") == ""
