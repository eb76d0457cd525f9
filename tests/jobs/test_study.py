"""A study of two variants: its runs, what it keeps, and the tables it makes of them."""

import json

import pytest
from etils import epath

from sd3_jax import main
from sd3_jax.config.command_line import load
from sd3_jax.distributed import lock
from sd3_jax.errors import ConfigError, UserError
from sd3_jax.jobs.study import Run, Study, parse
from sd3_jax.tools.study import study_page, study_tables

FLAGS = [
    "--config=configs/formulations.py:tiny",
    "--config.study.variants=('rf: flow.density=uniform', 'v/cos: flow.path=v/cos')",
    "--config.study.sweep=('optim.lr=1e-3', 'optim.lr=1e-9')",
    "--config.study.settings=('steps=2 cfg=2',)",
    "--config.study.seeds=2",
    "--config.model.depth=1",
    "--config.train.steps=4",
    "--config.train.eval_every=2",
    "--config.checkpoint.every=2",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    assert main.main(["study", *FLAGS, f"--workdir={workdir}"]) == 0
    return workdir


def results(workdir):
    return json.loads((workdir / "study.json").read_text())


def test_each_variant_has_its_sweep_and_the_seeds_of_the_best(workdir):
    found = results(workdir)
    assert len(found) == 2 * (2 + 1)
    for variant in "rf", "v/cos":
        mine = [x for x in found if x["variant"] == variant]
        tried = {x["option"]: x["loss"] for x in mine if x["seed"] == 0}
        best = min(tried, key=tried.get)
        assert {x["option"] for x in mine if x["best"]} == {best}
        assert sorted(x["seed"] for x in mine if x["best"]) == [0, 1]
    for x in found:
        assert x["loss"] == min(row["loss"] for row in x["validation"])
        keys = [(s["weights"], s["steps"]) for s in x["scores"]]
        assert sorted(keys) == [("ema", 2), ("params", 2)]
    a, b = (x["scores"][0]["fid"] for x in found if x["best"] and x["variant"] == "rf")
    assert a != b  # seeds differ


def test_what_is_measured_is_not_done_again(workdir, monkeypatch, capsys):
    monkeypatch.setattr("sd3_jax.jobs.train.run", lambda *_: pytest.fail("trained"))
    before = results(workdir)
    assert main.main(["study", *FLAGS, f"--workdir={workdir}"]) == 0
    assert results(workdir) == before
    told = capsys.readouterr().out
    assert "| rf |" in told and "optim.lr=" in told
    page = (workdir / "study.html").read_text()
    assert "Score over steps" in page and "v/cos" in page
    assert (workdir / "score_over_steps.svg").read_text().startswith("<svg")


def test_a_run_of_another_process_is_left_to_it(workdir):
    config = load("configs/formulations.py:tiny")
    with config.unlocked():
        config.study.variants = ("rf: flow.density=uniform",)
    study = Study(config, workdir / "other")
    (one,) = [x for x in study.left() if x.seed == 0]
    with lock.held(study.folder(one), "study"):
        assert not study.take(one)
    assert study.left()[0] == one


def result(variant, seed, score, fid, loss=1.0, flops=1e9):
    scores = [
        {
            **{"weights": "ema", "setting": f"steps={n} cfg=5", "steps": n, "cfg": 5.0},
            **{"score": score - 1 / n, "fid": fid, "path": 10.0, "n": 8},
        }
        for n in (5, 25, 50)
    ]
    validation = [
        {"step": step, "loss": loss * (1 + 10 / step), "loss_t0.5": loss}
        for step in (10, 20)
    ]
    return {
        **{"variant": variant, "option": "", "seed": seed, "scores": scores},
        **{"loss": loss, "validation": validation, "path_of_flow": "rf"},
        **{"parameters": int(flops / 1e6), "flops": flops, "step": 20, "best": True},
    }


MADE = [
    result("small", 0, 0.5, 9.0, 0.9, 1e9),
    result("small", 1, 0.5, 8.0, 0.8, 1e9),
    result("large", 0, 0.9, 3.0, 0.5, 8e9),
    result("large", 1, 0.8, 9.0, 0.4, 8e9),
    result("odd", 0, 0.4, 1.0, 0.7, 2e9),
]


def test_ranks_are_of_fronts_by_setting():
    rows = {row["variant"]: row for row in study_tables.ranks(MADE)}
    assert list(rows) == ["large", "odd", "small"]
    assert rows["odd"]["all"] == 1 and rows["large"]["all"] == 1
    # seed 0: dominated by large alone; seed 1: large is better at score, not at FID
    assert rows["small"]["all"] == 1.5 and rows["small"]["spread"] > 0


def test_the_other_tables():
    assert study_tables.middle(MADE) == (25, 5.0)
    (row, *_) = study_tables.scores(MADE, (25, 5.0), "ema")
    assert row["score"] == pytest.approx(0.46) and row["fid"] == 8.5
    steps, rows = study_tables.few_steps(MADE, "ema")
    assert steps == [5, 25, 50]
    assert rows[0]["drops"][0] == pytest.approx(100 * (1 - 0.3 / 0.48))
    assert study_tables.correlations(MADE, "ema")["score"] < 0
    law = study_tables.law(MADE)
    assert law is not None and law.exponent > 0
    told = study_tables.markdown(MADE)
    assert "| small | 1,000 | 2e+10 | 0.8500 | 0.0707 | 2 |" in told
    assert len(study_page.panels(MADE)) == 6


def test_losses_of_several_targets_are_not_compared():
    mixed = [MADE[0], MADE[2] | {"path_of_flow": "v/cos"}]
    assert study_tables.law(mixed) is None
    assert "Least loss" not in study_tables.markdown(mixed)
    assert len(study_page.panels(mixed)) == 3


def test_a_variants_text():
    assert parse("a: b=1 c.d=x") == ("a", ["b=1", "c.d=x"])
    assert Run("rf/lognorm(0.00,1.00)", "optim.lr=1", 2).folder == (
        "rf_lognorm(0.00,1.00)/optim.lr=1/seed2"
    )
    with pytest.raises(ConfigError, match="expected NAME: KEY=VALUE"):
        parse("rf")


@pytest.mark.parametrize(
    "flag, words",
    [
        (
            "study.variants=('a: flow.pth=rf',)",
            "study of a: unknown key config.flow.pth",
        ),
        (
            "study.variants=('a: flow.path=vp',)",
            'config.flow.path = "vp": expected one',
        ),
        ("study.settings=('step=3',)", 'did you mean "steps"?'),
        ("study.settings=('stpes=3',)", "unknown key config.sample.stpes"),
        ("study.variants=('a: seed=1', 'a: seed=2')", '"a" appears twice: expected'),
        ("study.variants=('a/b: seed=1', 'a b: seed=2')", "share the folder a_b"),
        ("study.variants=('..: seed=1',)", "letters, digits and _(),.=+-"),
        (f"study.variants=('{'a' * 256}: seed=1',)", "at most 255,"),
        ("study.sweep=('seed=1', 'seed=1')", 'config.study.sweep: "seed=1" appears'),
        ("study.variants=()", "config.study.variants = (): set at least one"),
        ("study.weights=mean", "expected ema, params or both"),
        ("study.by=clip", "expected one of loss, score, fid"),
    ],
)
def test_mistakes_are_told_of_before_training(flag, words, tmp_path, capsys):
    flags = ["--config=configs/formulations.py:tiny", f"--workdir={tmp_path}"]
    assert main.main(["study", *flags, f"--config.{flag}"]) == 2
    assert words in capsys.readouterr().err


def made_study(workdir, **saved):
    """A study of one variant, whose run is measured as `saved` says."""
    config = load("configs/formulations.py:tiny")
    with config.unlocked():
        config.study.update(variants=("a: optim.lr=9e-1",), weights=("ema",))
        config.study.settings = ("steps=5 cfg=5",)
    path = workdir / "runs" / "a" / "seed0" / "study.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = result("a", 0, 0.5, 9.0) | {"settings": ["optim.lr=9e-1"], "complete": True}
    path.write_text(json.dumps(row | saved))
    return lambda: Study(config, epath.Path(workdir)), path


def test_a_result_counts_for_its_own_settings_alone(tmp_path):
    study, path = made_study(tmp_path)
    assert study().left() == []
    (row,) = study().results()
    assert [x["setting"] for x in row["scores"]] == ["steps=5 cfg=5"]
    for saved in {"settings": ["optim.lr=1e-3"]}, {"variant": "a b"}:
        for complete in True, False:
            study, _ = made_study(tmp_path, complete=complete, **saved)
            with pytest.raises(UserError, match="another name or another --workdir"):
                study()
    study, _ = made_study(tmp_path, scores=result("a", 0, 1, 1)["scores"][1:])
    assert len(study().left()) == 1  # its setting is not measured yet


@pytest.mark.parametrize("change", [{"optim": {"b1": 0.5}}, {"train": {"steps": 3}}])
def test_a_result_counts_for_its_own_recipe_alone(change, tmp_path):
    study, path = made_study(tmp_path)
    (path.parent / "config.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match="with other settings: config"):
        study()


@pytest.mark.parametrize("text", ["", "[]", '{"complete": true}', "[" * 100_000])
def test_a_damaged_result_is_one_line(text, tmp_path):
    study, path = made_study(tmp_path)
    path.write_text(text)
    with pytest.raises(UserError, match="study.json: .*delete this file") as error:
        study()
    assert "\n" not in str(error.value)
    study, _ = made_study(tmp_path, scores=[3])
    with pytest.raises(UserError, match="a row of scores"):
        study()


def test_nan_and_names_with_marks_of_formulas_have_tables_and_pages(tmp_path):
    nan = float("nan")
    for name in r"$\frac{x$", "a|b$_$":
        lost = [result(name, seed, nan, nan, nan) for seed in range(2)]
        for rows in lost, MADE + lost, MADE + [result(name, 0, 1e308, 1e308, 1e308)]:
            assert study_tables.markdown(rows)
            assert name.partition("|")[0] in study_page.html(rows, tmp_path)
            assert study_page.figures(rows)
    assert study_tables.ranks(MADE + lost)[-1]["variant"] == name
    assert study_tables.merit(lost[0], "score") == float("inf")
    assert study_tables.law(MADE + lost) == study_tables.law(MADE)
