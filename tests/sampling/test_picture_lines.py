"""Lines inside of pictures: what is written, and that a stranger's does no harm."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import released
from sd3_jax import pictures
from sd3_jax.errors import UserError
from sd3_jax.sampling.job import picture_lines, prompt_file, repeated_pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
LINE = {"file": "samples/0000-ü.png", "prompt": "ü 🦊", "number": 1, "seed": 8}
LINE |= {"weights": "abc", "batch": [2, 8]}
LINE |= {"settings": {"height": 64, "width": 64, "cfg": 3.5, "negative": "no"}}


def config(path):
    made = released.get_config("tiny")
    made.weights = "not/loaded"
    made.sample["from"] = str(path)
    made.sample.image = "of the recipe"
    return made


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_every_format_keeps_the_line(suffix, tmp_path):
    path = epath.Path(tmp_path) / f"a.{suffix}"
    picture_lines.save(path, PIXELS, LINE, 100)
    assert picture_lines.embedded(path) == LINE
    error = np.abs(np.asarray(Image.open(path)).astype(int) - PIXELS)
    assert error.max() == 0 if suffix != "jpg" else error.mean() < 2
    (task,) = prompt_file.tasks(config(path))
    assert (task.prompt, task.number, task.slot) == ("ü 🦊", 1, (2, 8))
    assert task.settings["seed"] == 7 and task.settings["cfg"] == 3.5
    assert "image" not in task.settings


def test_a_repeated_picture_has_its_own_cache(tmp_path, caplog):
    path = epath.Path(tmp_path) / "a.png"
    picture_lines.save(path, PIXELS, LINE, 100)
    recipe = config(path)
    recipe.sample.update(cache="first_block", cache_options="threshold=0.3")
    (task,) = prompt_file.tasks(recipe)
    assert "cache" not in task.settings and not caplog.records
    settings = LINE["settings"] | {"cache": "first_block"}
    picture_lines.save(path, PIXELS, LINE | {"settings": settings}, 100)
    (task,) = prompt_file.tasks(recipe)
    assert task.settings["cache"] == "first_block"
    assert "cache_options" not in task.settings
    assert "skipped the steps of a whole batch of 8" in caplog.text


def test_settings_that_no_jpeg_holds_are_only_in_the_file_of_lines(tmp_path, caplog):
    path = epath.Path(tmp_path) / "a.jpg"
    picture_lines.save(path, PIXELS, LINE | {"prompt": ["ü" * 8192] * 3}, 90)
    assert "a JPEG holds 65000: only samples.jsonl has them" in caplog.text
    assert picture_lines.embedded(path) == {}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": 3}, "prompt 3: a line of another version"),
        ({"batch": [8, 8]}, "batch [8, 8]: expected row and size"),
        ({"batch": [0, 2**20]}, "expected row and size, at most 4096"),
        ({"batch": [False, True]}, "batch [False, True]: expected row and size"),
        ({"batch": [0, 1, 2]}, "expected row and size"),
        ({"batch": ["a", 1]}, "expected row and size"),
        ({"number": -1}, "number -1: expected 0 or more"),
        ({"number": True}, "number true"),
        ({"seed": 2**32 + 1}, "config.sample.seed = 4294967296"),
        ({"seed": 0}, "config.sample.seed = -1"),
        ({"settings": {"step": 1}}, 'unknown "step"'),
        ({"settings": {"steps": "\x1b"}}, 'steps "'),
        ({"settings": {"steps": 10**9}}, "config.sample.steps"),
        ({"settings": {"image": "/gone.png"}}, "/gone.png: cannot be read"),
        ({"settings": {"control": "net"}}, "control: expected a list"),
        ({"watermark": 3}, "watermark"),
        ({"watermark": 99 * "a"}, "config.sample.watermark"),
        ({"lora": 3}, "lora 3: a line of another version"),
        ({"quantize": "int8"}, 'quantize "int8": a line of another version'),
        (
            {"quantize": {"denoiser": "int2"}},
            'quantize.denoiser "int2"; did you mean "int8"?',
        ),
        ({"quantize": {"denoser": "int8"}}, 'did you mean "denoiser"?'),
        ({"quantize": {"t5": 3}}, "quantize.t5 3: expected one of int8, fp8"),
        ({"step": 1}, "painted by a run's checkpoint; remove config.weights"),
    ],
)
def test_a_line_that_cannot_be_repeated_is_one_line(change, words, tmp_path):
    path = tmp_path / "a.png"
    info = {"sd3_jax": json.dumps(LINE | change)}
    pictures.save_png(PIXELS, path, info=info)
    with pytest.raises(UserError) as caught:
        prompt_file.tasks(config(path))
    message = str(caught.value)
    assert words in message and message.isprintable(), message
    assert message.startswith("config.sample.from = ")


def test_a_filter_in_a_picture_is_not_imported(tmp_path):
    path = tmp_path / "a.png"
    line = LINE | {"filter": "os:abort"}
    pictures.save_png(PIXELS, path, info={"sd3_jax": json.dumps(line)})
    (task,) = prompt_file.tasks(config(path))
    assert task.config.sample.filter == ""


def test_a_made_up_batch_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(repeated_pictures, "BATCH", 2**20)
    path = tmp_path / "a.png"
    for size, fits in ((256, True), (257, False)):
        info = {"sd3_jax": json.dumps(LINE | {"batch": [0, size]})}
        pictures.save_png(PIXELS, path, info=info)
        if fits:
            assert prompt_file.tasks(config(path))[0].slot == (0, size)
            continue
        with pytest.raises(UserError, match="batch of 257 pictures, 1052672 pixels"):
            prompt_file.tasks(config(path))
