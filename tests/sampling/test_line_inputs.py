"""Sizes and pixels of the files that a line names, and its LoRAs in order."""

import numpy as np
import pytest
from PIL import Image

from sd3_jax.errors import UserError
from sd3_jax.sampling import line_arrays, line_inputs

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
