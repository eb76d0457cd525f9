"""sample with released weights: files of prompts, processes, kills."""

import json
import shutil
import time

import jax
import multiprocess
import numpy as np
import pytest
from etils import epath
from parity import miniature
from PIL import Image

import sd3_jax
from sd3_jax import main, pictures
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.jobs import sample
from sd3_jax.sampling.images import watermark
from sd3_jax.sampling.job import output_filter, picture_lines
from sd3_jax.weights import sharded_load

TINY = "--config=configs/released.py:tiny"


def flags(workdir, prompts, **keys):
    keys = {"sample.prompts_file": prompts} | keys
    return [
        TINY,
        f"--workdir={workdir}",
        f"--config.weights={miniature.folder('sd35_medium')}",
        *(f"--config.{key}={value}" for key, value in keys.items()),
    ]


def lines(workdir):
    text = (workdir / "samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def pixels(workdir):
    return [np.asarray(Image.open(workdir / line["file"])) for line in lines(workdir)]


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "forty.txt"
    path.write_text("".join(f"the fox, number {i}\n" for i in range(40)))
    return path


def test_a_killed_job_of_two_processes_ends_as_the_unbroken_one(tmp_path, forty):
    run = lambda workdir: ["-m", "sd3_jax.main", "sample", *flags(workdir, forty)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    results = multiprocess.run(run(whole), processes=2, devices=4, timeout=300)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    with multiprocess.start(run(killed), processes=2, devices=4) as cluster:
        deadline = time.monotonic() + 200
        while len(list(killed.glob("samples/*.png"))) < 12:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        multiprocess.kill(cluster)
    painted = {p: p.stat().st_mtime_ns for p in killed.glob("samples/*.png")}
    assert 12 <= len(painted) < 40
    assert not (killed / "samples.html").exists()
    results = multiprocess.run(run(killed), processes=2, devices=4, timeout=300)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    assert "exist already" in results[0].stderr
    assert {p: p.stat().st_mtime_ns for p in painted} == painted  # none was redone
    assert lines(killed) == lines(whole)
    assert len({line["file"] for line in lines(whole)}) == 40
    assert {p.name for p in (killed / "samples").iterdir()} == {
        line["file"].split("/")[1] for line in lines(whole)
    }
    for a, b in zip(pixels(killed), pixels(whole)):
        np.testing.assert_array_equal(a, b)
    page = (whole / "samples.html").read_text()
    assert page.count("<img") == 40 and "number 39" in page


def test_lines_with_settings_of_their_own(tmp_path, caplog):
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        '{"prompt": "a red fox", "seed": 7, "cfg": 1.0, "per_prompt": 2}',
        '{"prompt": "a red fox", "seed": 8, "cfg": 1.0}',
        '{"prompt": ["a", "red", "fox"], "height": 48, "negative": "blue"}',
        "",
        '{"prompt": "a fox", "hight": 48}',
        '{"prompt": "a fox", "height": 50}',
        '{"prompt": "a fox", "steps": "many"}',
        "{not json",
        '{"prompt": "a fox", "solver": "eular"}',
    ]
    prompts.write_text("\n".join(rows))
    assert main.main(["sample", *flags(tmp_path / "run", prompts)]) == 0
    found = lines(tmp_path / "run")
    assert [line["seed"] for line in found] == [7, 8, 8, 0]
    assert found[3]["prompt"] == ["a", "red", "fox"]
    images = pixels(tmp_path / "run")
    assert [image.shape for image in images] == [(64, 64, 3)] * 3 + [(48, 64, 3)]
    assert np.abs(images[1].astype(int) - images[2]).max() <= 1  # one prompt, one seed
    assert np.abs(images[0].astype(int) - images[1]).max() > 8
    told = "\n".join(caplog.messages)
    for words in (
        'prompts.jsonl:5: skipped: unknown "hight"; did you mean "height"?',
        "prompts.jsonl:6: skipped: config.image.height = 50: expected a multiple of 16",
        'prompts.jsonl:7: skipped: steps "many": expected int',
        "prompts.jsonl:8: skipped: not JSON",
        'prompts.jsonl:9: skipped: config.sample.solver = "eular"',
    ):
        assert words in told, told


def test_the_same_job_again_paints_nothing_and_another_seed_all(tmp_path, forty):
    three = tmp_path / "three.txt"
    three.write_text("a fox\nfoxes\nred foxes\n")
    run = lambda **keys: main.main(["sample", *flags(tmp_path / "run", three, **keys)])
    when = lambda: [p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*/*.png")]
    assert run() == 0
    before, first = when(), pixels(tmp_path / "run")
    assert run() == 0 and when() == before
    assert run(**{"sample.seed": 1}) == 0
    assert set(when()).isdisjoint(before)
    assert (pixels(tmp_path / "run")[0] != first[0]).any()


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("weights", "no/such/file.safetensors", "no such local file or folder"),
        ("image.height", "400", "at most 256"),
        ("sample.skip_layers", "9", "skip_layers 9: expected a whole number 0 to 3"),
        ("model.dtype", "float16", "float16 overflows in T5-XXL"),
        ("sample.shift", "1e30", "a number in [0.001, 1000]"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, forty, key, value, words):
    args = flags(tmp_path, forty, **{key: value})
    if key == "weights":
        args = [arg for arg in args if "sd35_medium" not in arg]
    assert main.main(["sample", *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error


def with_scheduler(path, **settings):
    """A folder of SD3.5-medium's kind whose scheduler has other settings."""
    shutil.copytree(miniature.folder("sd35_medium"), path)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return path


def test_the_job_and_generate_paint_the_same_by_the_folders_scheduler(tmp_path):
    weights = with_scheduler(tmp_path / "fives", shift=5.0)
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        '{"prompt": "a red fox", "seed": 7, "per_prompt": 2}',
        '{"prompt": "a red box", "seed": 7}',
        '{"prompt": "a fox", "seed": 9, "shift": 3}',
    ]
    prompts.write_text("\n".join(rows))
    job = flags(tmp_path / "run", prompts, weights=weights)
    assert main.main(["sample", *(x for x in job if "sd35_medium-" not in x)]) == 0
    found = lines(tmp_path / "run")
    assert [line["seed"] for line in found] == [7, 8, 7, 9]
    assert all(line["scheduler"] == {"shift": 5.0} for line in found)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    bundle = sd3_jax.load(str(weights), mesh, "float32")
    run = dict(height=64, width=64, steps=4, guidance=5.0, max_sequence_length=16)
    for some, options in (found[:3], {}), (found[3:], {"shift": 3.0}):
        texts, seeds = ([x[key] for x in some] for key in ("prompt", "seed"))
        images = sd3_jax.generate(bundle, texts, seed=seeds, **run, **options)
        ours = pictures.to_uint8(2 * np.asarray(images) - 1).astype(int)
        for line, image in zip(some, ours):
            painted = np.asarray(Image.open(tmp_path / "run" / line["file"]))
            assert np.abs(painted - image).max() <= 1, line


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"shift": "abc"}, 'shift "abc": expected a finite number > 0'),
        ({"invert_sigmas": True}, "invert_sigmas true of FlowMatchEulerDiscrete"),
    ],
)
def test_a_scheduler_that_cannot_be_honoured_is_told_before_weights_are_read(
    tmp_path, capsys, monkeypatch, forty, settings, words
):
    weights = with_scheduler(tmp_path / "odd", **settings)
    monkeypatch.setattr(sharded_load, "load", None)
    job = flags(tmp_path / "run", forty, weights=weights)
    assert main.main(["sample", *(x for x in job if "sd35_medium-" not in x)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error


def test_a_bug_of_ours_keeps_its_traceback(tmp_path, forty, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("Incompatible shapes for broadcasting: (2,) and (3,)")

    monkeypatch.setattr(sd3_jax.api, "generate", broken)
    with pytest.raises(ValueError, match="Incompatible shapes"):
        main.main(["sample", *flags(tmp_path / "run", forty)])


def test_what_a_workdir_holds_is_not_believed(tmp_path):
    """Half a letter, a line that is no line, pictures that are none."""
    names = [f"samples/{i}.png" for i in range(4)]
    wanted = [{"file": name, "prompt": "ü"} for name in names]
    for line in wanted[:2]:
        pictures.save_png(
            np.zeros((8, 80, 3), np.uint8),  # no photograph would be of this shape
            tmp_path / line["file"],
            info={"sd3_jax": json.dumps(line)},
        )
    (tmp_path / names[2]).write_bytes((tmp_path / names[1]).read_bytes()[:60])
    (tmp_path / names[3]).write_bytes(b"\x89PNG\r\n\x1a\n")
    odd = ['{"file": [1]}', "[" * 100_000, "3", json.dumps(wanted[0])]
    torn = json.dumps(wanted[1], ensure_ascii=False).encode().partition(b"\xbc")[0]
    (tmp_path / "samples.jsonl").write_bytes("\n".join(odd).encode() + b"\n" + torn)
    path = epath.Path(tmp_path)
    assert picture_lines.recorded(path, wanted) == [True, True, False, False]


FILTER = """
def refuse(images, prompts):
    assert images.shape == (3, 64, 64, 3) and images.dtype == "uint8"
    return [{"a wolf": "a wolf", "a bear": True}.get(each) for each in prompts]

def broken(images, prompts):
    raise RuntimeError("no weights")
"""


@pytest.fixture
def looked_at(tmp_path, monkeypatch):
    (tmp_path / "looked_at.py").write_text(FILTER)
    monkeypatch.syspath_prepend(tmp_path)
    prompts = tmp_path / "animals.txt"
    prompts.write_text("a fox\na wolf\na bear\n")
    return prompts


def test_flagged_pictures_are_black_and_their_lines_say_so(tmp_path, looked_at):
    keys = {"sample.filter": "looked_at:refuse"}
    args = ["sample", *flags(tmp_path / "run", looked_at, **keys)]
    assert main.main(args) == 0
    fox, wolf, bear = lines(tmp_path / "run")
    assert fox["filter"] == "looked_at:refuse" and "filtered" not in fox
    assert (wolf["filtered"], bear["filtered"]) == ("a wolf", "flagged")
    images = pixels(tmp_path / "run")
    assert images[0].any() and not images[1].any() and not images[2].any()
    page = (tmp_path / "run/samples.html").read_text()
    assert page.count("filtered: ") == 2
    (tmp_path / "run/samples.jsonl").unlink()  # as if killed before the lines
    again = [picture_lines.unpainted(line) for line in (fox, wolf, bear)]
    assert picture_lines.recorded(epath.Path(tmp_path / "run"), again) == [True] * 3
    assert again == [fox, wolf, bear]  # what was flagged stays so


@pytest.mark.parametrize(
    "given, words",
    [
        ([0.3, None], "returned 0.3; expected None, False, True or a reason a picture"),
        ([True], "returned 1 flags; expected 2"),
        (True, "returned bool; expected 2 flags"),
    ],
)
def test_what_filters_give_wrongly_is_told(given, words):
    guard = output_filter.Safety("x:y", lambda images, prompts: given, "")
    with pytest.raises(UserError) as error:
        guard.flags(np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"])
    assert words in str(error.value)


def test_what_is_written_is_marked_black_pictures_too(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
    found = [{"file": f"samples/{i}.png", "prompt": "a fox"} for i in range(2)]
    found[1]["filtered"] = "flagged"
    guard = output_filter.load("", "sd3-jax", [(256, 256), (512, 512)])
    assert guard.facts() == {"watermark": "sd3-jax"}
    sample.save(epath.Path(tmp_path), found, images, guard, enlarged=False)
    marked = [np.asarray(Image.open(tmp_path / line["file"])) for line in found]
    assert [watermark.read(image) for image in marked] == ["sd3-jax"] * 2
    assert marked[0].mean() > 100 and marked[1].mean() < 5


@pytest.mark.parametrize(
    "key, value, words",
    [
        (
            "filter",
            "looked_at:broken",
            "broken: RuntimeError: no weights (looked_at.py",
        ),
        ("filter", "looked_at:refused", 'did you mean "refuse"?'),
        ("watermark", "sd3-jax", "64 x 64 pixels; the sides must be 256 or more"),
        (
            "watermark",
            "seventeen letters",
            "expected at most 16 bytes of text that prints",
        ),
    ],
)
def test_a_filter_that_fails_lets_nothing_through(
    tmp_path, capsys, looked_at, key, value, words
):
    args = flags(tmp_path / "run", looked_at, **{f"sample.{key}": value})
    assert main.main(["sample", *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error, error
    assert not list(tmp_path.glob("run/samples/*.png"))
