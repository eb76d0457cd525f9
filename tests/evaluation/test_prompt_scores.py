"""evaluate by functions of the user's: objects, text, T2I-CompBench."""

import json

import numpy as np
import pytest
from parity import miniature

from sd3_jax import main
from sd3_jax.distributed import processes
from sd3_jax.evaluation import prompt_scores, scorers
from sd3_jax.evaluation.scorers import Asked, Verdict

HOOKS = """
import numpy as np

def detect(images):
    assert images.dtype == np.uint8 and images.shape[1:] == (64, 64, 3)
    left, right = (0, 0, 20, 20), (40, 0, 60, 20)
    return [[("bench", 0.95, left), ("cat", 0.95, right)] for _ in images]

def colour(crops, label, candidates):
    return ["red" for _ in crops]

def read(images):
    return ["a  fox" if i % 2 else "A fox" for i in range(len(images))]

def vqa(images, prompts):
    return [0.25 * len(prompts[0].split())] * len(images)

def broken(images):
    return [][0]

def short(images):
    return []
"""
GENEVAL = [
    ("single_object", [{"class": "bench", "count": 1}]),
    ("counting", [{"class": "cat", "count": 2}]),
    (
        "position",
        [
            {"class": "bench", "count": 1},
            {"class": "cat", "count": 1, "position": ["right of", 0]},
        ],
    ),
    ("colors", [{"class": "cat", "count": 1, "color": "blue"}]),
]


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The flags of the benchmarks, their files, and the functions in PYTHONPATH."""
    (tmp_path / "scored_by_me.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    lines = [
        {"tag": tag, "include": include, "prompt": f"a photo of {tag}"}
        for tag, include in GENEVAL
    ]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, lines)))
    words = tmp_path / "words.txt"
    words.write_text('a sign, "a fox"\n\nthe words "A fox"\n')
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "color_val.txt").write_text("a red fox\n")
    (prompts / "complex_val.txt").write_text("a fox\n")
    return {
        "weights": miniature.folder("sd35_medium"),
        "sample.steps": 1,
        "sample.cfg": 1.0,
        "eval.per_prompt": 2,
        "eval.scores": "geneval,typography,compbench",
        "eval.geneval": metadata,
        "eval.detector": "scored_by_me:detect",
        "eval.colour": "scored_by_me:colour",
        "eval.typography": words,
        "eval.ocr": "scored_by_me:read",
        "eval.compbench": prompts,
        "eval.compbench_scorers": "color=scored_by_me:vqa,complex=scored_by_me:vqa",
    }


def evaluate(workdir, given):
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    recipe = "--config=configs/released.py:tiny"
    return main.main(["evaluate", recipe, f"--workdir={workdir}", *flags])


def test_all_three_are_scored_at_once(tmp_path, given, capsys):
    assert evaluate(tmp_path, given) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    scores = {row["name"]: (row["score"], row["n"]) for row in found["scores"]}
    assert scores == {
        "GenEval single object": (1, 2),
        "GenEval counting": (0, 2),
        "GenEval position": (1, 2),
        "GenEval colors": (0, 2),
        "GenEval overall, 4 of 6 categories": (0.5, 8),
        "typography": (0.5, 4),
        "typography, character error rate": (0.1, 4),
        "T2I-CompBench color": (0.75, 2),
        "T2I-CompBench complex": (0.5, 2),
    }
    reasons = {row["prompt"]: row["reasons"] for row in found["prompts"]}
    assert reasons["a photo of counting"] == ["cat: expected 2, found 1"] * 2
    assert reasons["a photo of colors"] == ["cat: expected 1 blue, found 1 red"] * 2
    assert reasons["a photo of position"] == []
    assert "GenEval overall, 4 of 6 categories" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("geneval", "", '"geneval" needs config.eval.geneval: GenEval\'s evaluation_m'),
        ("geneval", "no/such", "config.eval.geneval = no/such: no such file"),
        ("detector", "", "config.eval.detector: not a function; expected"),
        ("detector", "detect", 'expected "package.module:function", or nothing'),
        ("detector", "scored_by_me:detct", 'did you mean "detect"?'),
        ("colour", "", "config.eval.colour: not a function; expected"),
        ("compbench", "/no", "config.eval.compbench = /no/color_val.txt: no such file"),
        ("compbench_scorers", "colr=a:b", 'did you mean "color"?'),
        ("ocr_ignore", "spaces", "expected some of case, punctuation, space"),
        # Of functions that were called:
        ("detector", "scored_by_me:broken", "broken: IndexError: list index out of ra"),
        (
            "ocr",
            "scored_by_me:short",
            "scored_by_me:short returned 0 texts; expected 4",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(
    tmp_path, given, capsys, key, value, words
):
    early = not value.endswith((":broken", ":short"))
    changed = (
        given | {f"eval.{key}": value} | ({"weights": "owner/none"} if early else {})
    )
    assert evaluate(tmp_path, changed) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error, error


def test_a_line_that_makes_no_sense_is_told_by_number(tmp_path, given, capsys):
    given["eval.geneval"].write_text('{"tag": "colour"}\n')
    assert evaluate(tmp_path, given) == 2
    assert "metadata.jsonl, line 1: expected" in capsys.readouterr().err


def test_every_picture_has_noise_of_its_own_and_meets_its_prompt():
    asked = [Asked(f"p{i}", "one", i) for i in range(7)]
    seen = []

    def paint(captions, numbers):
        seen.append((captions, list(numbers)))
        return np.stack([np.full((2, 2, 3), n, np.uint8) for n in numbers])

    def scorer(some, images):
        return [
            Verdict(float(x.wanted == image[0, 0, 0])) for x, image in zip(some, images)
        ]

    verdicts = prompt_scores.judge(paint, asked, scorer, 3)
    assert [v.value for v in verdicts] == [1.0] * 7
    assert [len(captions) for captions, _ in seen] == [3, 3, 3]  # one program's


def test_processes_share_the_rows(monkeypatch):
    answers = {}
    monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
    for index in range(3):
        monkeypatch.setattr(processes.jax, "process_index", lambda i=index: i)
        keep = lambda text, seconds, i=index: answers.setdefault(i, text) and ["[]"] * 3
        monkeypatch.setattr(processes, "_everyones", keep)
        with pytest.raises(ValueError):  # nobody else has answered
            processes.shared(lambda rows: [10 * row for row in rows], 7)
    monkeypatch.setattr(
        processes, "_everyones", lambda *_: [answers[i] for i in range(3)]
    )
    made = processes.shared(lambda rows: [10 * row for row in rows], 7)
    assert made == [0, 10, 20, 30, 40, 50, 60]


def test_a_score_without_an_interval_has_none():
    assert "low" not in scorers.mean("x", [0.5]).finite()
