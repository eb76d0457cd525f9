"""Sizes and pixels of the files that a line names, and its LoRAs in order."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from sd3_jax.errors import UserError
from sd3_jax.sampling.control import ControlBundle
from sd3_jax.sampling.images import input_images
from sd3_jax.sampling.job import line_arrays, line_inputs

DRAW = np.random.default_rng(0)
LINE = {"height": 64, "width": 96, "strength": 0.6, "paste": True}


@pytest.fixture
def folder(tmp_path):
    for name, sides in {"a": (48, 80), "b": (48, 80), "c": (80, 48)}.items():
        picture = DRAW.integers(0, 256, (*sides, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    mask = np.zeros((48, 80), np.uint8)
    mask[8:16, 8:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    turned = Image.open(tmp_path / "a.png")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    return tmp_path


def place(sized=False, **settings):
    return line_inputs.place(LINE | settings, line_inputs.Looked(), sized=sized)


def test_the_picture_gives_the_size_unless_it_is_resized_or_cropped(folder):
    image = str(folder / "a.png")
    placed = place(image=image)
    assert placed.generated == placed.result == (48, 80)
    assert placed.inputs.keys() == {image} and len(placed.inputs[image]) == 12
    assert place(image=image, resize="crop").generated == (64, 96)
    border = place(image=image, outpaint=[8, 4, 8, 12])
    assert border.generated == border.result == (64, 96)
    crop = place(image=image, mask=str(folder / "mask.png"), crop_to_mask=4)
    assert (crop.generated, crop.result) == ((64, 96), (48, 80))
    assert place(image=str(folder / "turned.png")).result == (80, 48)
    assert place(sized=True, image=image, height=48, width=80).result == (48, 80)
    hint = {"net": "n", "image": image}
    assert place(control=[hint]).generated == (48, 80)
    assert place().generated == (64, 96)


def test_files_of_equal_pixels_are_told_apart_and_read_once(folder, monkeypatch):
    paths = [str(folder / f"{name}.png") for name in "aab"]
    count = []
    read = line_inputs.images.read_bytes
    monkeypatch.setattr(
        line_inputs.images, "read_bytes", lambda path: count.append(path) or read(path)
    )
    looked = line_inputs.Looked()
    prints = [looked.picture(path).fingerprint for path in paths]
    assert prints[0] == prints[1] != prints[2] and len(count) == 2


def test_pixels_are_resized_and_masks_stay_black_and_white(folder):
    files = {"image": str(folder / "a.png"), "mask": str(folder / "mask.png")}
    for how in ("crop", "stretch"):
        row = line_arrays.read_row(LINE | files | {"resize": how})
        assert row.image.shape == (64, 96, 3) and row.mask.shape == (64, 96)
        assert set(np.unique(row.mask)) == {0, 255}
    row = line_arrays.read_row(LINE | files | {"resize": "crop", "outpaint": [8] * 4})
    assert row.image.shape == (48, 80, 3)  # the result is of 64 x 96 pixels
    np.testing.assert_array_equal(row.image, np.asarray(Image.open(files["image"])))


def test_a_picture_that_changed_its_size_after_the_check_is_refused(folder):
    files = {"image": str(folder / "a.png"), "mask": str(folder / "mask.png")}
    for size, more in ((48, 80), {}), ((64, 96), {"outpaint": [8, 4, 8, 12]}):
        line_arrays.read_checked_row(LINE | files | more, size)
    (folder / "a.png").write_bytes((folder / "c.png").read_bytes())
    with pytest.raises(UserError, match="a.png: it or its mask changed its size"):
        line_arrays.read_checked_row(LINE | files, (48, 80))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_mask_with_colours_or_alpha_is_refused(mode, folder):
    colours = DRAW.integers(0, 256, (48, 80, len(mode)), np.uint8)
    if mode == "RGBA":
        colours[..., :3] = 255
    Image.fromarray(colours).save(folder / "odd.png")
    files = {"image": str(folder / "a.png"), "mask": str(folder / "odd.png")}
    with pytest.raises(UserError, match="has colours or an alpha channel"):
        line_arrays.read_row(LINE | files)


class Model:
    """A bundle's adapters, with every call."""

    def __init__(self):
        self.adapters, self.calls = {}, []

    def load_adapter(self, path, *, name, weight):
        assert name == path and weight == 0
        self.adapters[name] = weight
        self.calls.append(path)

    def unload_adapters(self):
        self.adapters.clear()


def test_loras_are_loaded_in_the_order_of_the_line():
    """Sums of floats depend on their order, and a resumed job must not."""
    model = Model()
    for loras, weights in (
        (["a.safetensors=0.5"], {"a.safetensors": 0.5}),
        (["a.safetensors=0.25"], {"a.safetensors": 0.25}),
        (["b=1.0", "a.safetensors=2.0"], {"b": 1.0, "a.safetensors": 2.0}),
        (["a.safetensors=1.0", "b=1.0"], {"a.safetensors": 1.0, "b": 1.0}),
        ([], {}),
    ):
        assert line_arrays.adapters(model, loras) == {"adapters": weights}
        assert list(model.adapters) == list(weights)
    assert model.calls == ["a.safetensors", "b", "a.safetensors", "a.safetensors", "b"]
    assert line_arrays.adapters(model, None) == {}


def test_nearly_black_files_are_eight_bits_and_not_ambiguous(folder):
    dark = np.zeros((48, 80), np.uint8)
    dark[8:16] = 1
    Image.fromarray(dark).save(folder / "dark.png")
    path = str(folder / "dark.png")
    settings = LINE | {"image": path, "mask": path, "mask_blur": 0.0, "mask_padding": 0}
    settings |= {"control": [{"net": "n", "image": path, "mask": path}]}
    settings["control"][0] |= {"scale": 1.0, "start": 0.0, "stop": 1.0}
    nets = {"n": tuple.__new__(ControlBundle, (None, {}, {}))}
    keywords = line_arrays.arguments(settings, [line_arrays.read_row(settings)], nets)
    (control,) = keywords["control"]
    for pixels in (keywords["image"], control.image):
        np.testing.assert_array_equal(
            input_images.pixels(pixels)[0, ..., 0], dark / np.float32(255)
        )
    for pixels in (keywords["mask"], control.mask):
        assert input_images.mask(pixels).max() == np.float32(1 / 255)


def test_a_mask_that_resizing_loses_is_named(folder):
    line = np.zeros((48, 80), np.uint8)
    line[:, 40] = 255
    Image.fromarray(line).save(folder / "line.png")
    files = {"image": str(folder / "a.png"), "mask": str(folder / "line.png")}
    settings = LINE | files | {"resize": "stretch", "height": 16, "width": 16}
    with pytest.raises(
        UserError, match="nothing is left of the mask after resizing to 16 x 16"
    ):
        line_arrays.read_row(settings)


def test_a_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.safetensors")
    for key in ("image", "mask"):
        files = {"image": str(folder / "a.png")} | {key: str(folder / "pipe.png")}
        with pytest.raises(UserError, match="not a regular file"):
            place(**files)
    with pytest.raises(UserError, match="not a regular file"):
        place(lora=[f"{folder / 'pipe.safetensors'}=1.0"])


def test_a_loras_configuration_is_part_of_its_fingerprint(tmp_path):
    """PEFT's alpha is there, and decides the pixels."""
    width = 24
    key = "base_model.model.transformer_blocks.0.attn.to_q.lora_"
    pair = {f"{key}A.weight": np.ones((2, width), np.float32)}
    pair[f"{key}B.weight"] = np.ones((width, 2), np.float32)
    safetensors.numpy.save_file(pair, tmp_path / "adapter_model.safetensors")
    prints = []
    for alpha in (2, 4, 2):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        prints.append(line_inputs.Looked().lora(str(tmp_path)).fingerprint)
    assert prints[0] == prints[2] != prints[1]
