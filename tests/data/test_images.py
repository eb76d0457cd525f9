"""Pictures that are what they say, by every mode's rule, and pictures that lie."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from sd3_jax.data import images
from sd3_jax.data.images import BadImage

RED, GREY = (255, 0, 0), (128, 128, 128)
QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=500)


def encoded(picture, kind="png", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(mode="RGB", color=RED, size=(32, 24)):
    return Image.new(mode, size, color)


def noise(h=64, w=96):
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)


def png(width, height, *, depth=8, kind=2, data=b"", before=b""):
    """A PNG by hand: its header may say anything."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + before + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def chunk(name, data):
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_what_was_saved_is_read(tmp_path, kind):
    wanted = noise()
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(Image.fromarray(wanted), kind, **options)
    (tmp_path / "picture.gif").write_bytes(data)  # the content counts, not the name
    np.testing.assert_array_equal(images.read(data), wanted)
    np.testing.assert_array_equal(images.read(tmp_path / "picture.gif"), wanted)


def palette(**options):
    picture = plain("P", 1)
    picture.putpalette([0, 0, 255, *RED])
    return encoded(picture, **options)


def sixteen(value):
    return Image.fromarray(np.full((24, 32), value, np.uint16))


HALF = (255, 127, 127)  # red at an alpha of 128, over white
KEYED = np.concatenate([np.full((12, 32), 1000), np.full((12, 32), 65535)])
MODES = {
    "1": (encoded(plain("1", 1)), (255, 255, 255)),
    "L": (encoded(plain("L", 128)), GREY),
    "L with a transparent grey": (
        encoded(plain("L", 128), transparency=128),
        (255, 255, 255),
    ),
    "LA": (encoded(plain("LA", (0, 128))), (127, 127, 127)),
    "P": (palette(), RED),
    "P with a transparent colour": (palette(transparency=1), (255, 255, 255)),
    "P with alphas": (palette(transparency=b"\xff\x80"), HALF),
    "RGB with a transparent colour": (
        encoded(plain(), transparency=RED),
        (255, 255, 255),
    ),
    "RGBA": (encoded(plain("RGBA", (*RED, 128))), HALF),
    "RGBA webp": (encoded(plain("RGBA", (*RED, 0)), "webp", lossless=True), (255,) * 3),
    "I;16": (encoded(sixteen(0x8080)), GREY),  # Pillow clips it to white
    "I;16 dark": (encoded(sixteen(100)), (0, 0, 0)),
    "I;16 with a transparent grey": (
        encoded(sixteen(100), transparency=100),
        (255, 255, 255),
    ),
    "L jpeg": (encoded(plain("L", 128), "jpeg"), GREY),
    "YCbCr jpeg": (encoded(plain().convert("YCbCr"), "jpeg"), (254, 0, 0)),
    "CMYK jpeg, inverted": (encoded(plain("CMYK", (0, 255, 255, 0)), "jpeg"), RED),
    "CMYK jpeg, half of black": (encoded(plain("CMYK", (0, 0, 0, 127)), "jpeg"), GREY),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_by_its_rule(mode):
    data, color = MODES[mode]
    found = images.read(data)
    assert found.shape == (24, 32, 3) and found.dtype == np.uint8
    assert set(map(tuple, found.reshape(-1, 3).tolist())) == {color}


def test_a_mode_without_a_rule_is_refused():
    with pytest.raises(BadImage, match="mode HSV, which is not supported"):
        images.pixels(plain("HSV", (0, 0, 0)))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_as_exif_says(kind, orientation):
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32] = 255  # the corner at the top left is white
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    back = back.get(orientation, images.UPRIGHT.get(orientation))
    stored = Image.fromarray(upright)
    stored = stored if back is None else stored.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = images.read(encoded(stored, kind, exif=exif))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_no_rotation():
    data = encoded(plain(), "jpeg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert images.read(data).shape == (24, 32, 3)


def animated(kind):
    frames = [plain(color=(100 * i, 0, 0)) for i in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def scans(n):
    data = encoded(plain(), "jpeg", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + n * last + data[-2:]


jpeg = encoded(Image.fromarray(noise()), "jpeg")
REFUSED = {
    "nothing": (b"", "not one of JPEG, PNG, WEBP"),
    "text": (b"<html>404</html>", "not one of JPEG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not one of JPEG"),
    "gif": (encoded(plain(), "gif"), "not one of JPEG"),
    "bmp": (encoded(plain(), "bmp"), "not one of JPEG"),
    "tiff": (encoded(plain(), "tiff"), "not one of JPEG"),
    "postscript": (encoded(plain(), "eps"), "not one of JPEG"),
    "half a jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
    "a jpeg's header": (jpeg[:200], "expected a whole JPEG"),
    "half a png": (encoded(Image.fromarray(noise()))[:5000], "expected a whole"),
    "a png without pixels": (png(32, 32), "expected a whole"),
    "half a webp": (
        encoded(Image.fromarray(noise()), "webp")[:2000],
        "expected a whole",
    ),
    "a bomb": (png(8193, 8192), "8193 x 8192 pixels; expected"),
    "a bomb that Pillow warns of": (png(10_000, 10_000), "pixels"),
    "a bomb that Pillow refuses": (png(100_000, 100_000), "pixels"),
    "no pixels": (png(0, 32), "expected"),
    "one pixel": (encoded(plain(size=(1, 1))), "1 x 1 pixels; expected sides of 16"),
    "a line": (encoded(plain(size=(16, 129))), "16 x 129 pixels; expected sides"),
    "an animated png": (animated("png"), "animated, 3 frames"),
    "an animated webp": (animated("webp"), "animated, 3 frames"),
    "a thousand scans": (scans(1000), "a JPEG of 10"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_where_and_why(case, tmp_path):
    data, words = REFUSED[case]
    path = tmp_path / "shot\n01.jpg"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's of bombs, too, end in one line
        with pytest.raises(BadImage) as caught:
            images.read(path)
    assert "shot\\n01.jpg: " in str(caught.value) and words in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_bounds_are_ours_whatever_pillow_is_told(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for case in ("a bomb that Pillow refuses", "half a jpeg", "half a png"):
        with pytest.raises(BadImage):
            images.read(REFUSED[case][0])


def test_several_pictures_in_one_jpeg_are_the_first():
    second = plain(color=(0, 0, 255))
    data = encoded(plain(), "mpo", save_all=True, append_images=[second])
    assert tuple(images.read(data)[0, 0]) == (254, 0, 0)


def test_a_path_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.png", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(BadImage, match="cannot be read"):
            images.read(path)


def test_a_file_of_too_many_bytes(monkeypatch):
    monkeypatch.setattr(images, "BYTES", 99)
    with pytest.raises(BadImage, match="100 bytes; expected at most 99"):
        images.read(bytes(100))


SEEDS = [
    encoded(Image.fromarray(noise(24, 40)), kind, **options)
    for kind, options in (
        ("jpeg", {}),
        ("jpeg", {"progressive": True}),
        ("png", {}),
        ("webp", {"lossless": True}),
        ("webp", {}),
    )
] + [MODES[mode][0] for mode in ("P with alphas", "I;16", "CMYK jpeg, inverted")]


@QUICK
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=4),
    st.none() | st.integers(0, 10**4),
)
def test_damage_gives_a_picture_or_is_refused(data, changes, end):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        found = images.read(bytes(damaged[:end]))
    except BadImage as error:
        assert str(error).isprintable()
    else:
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
        assert min(found.shape[:2]) >= images.SIDE


@pytest.mark.parametrize("data", SEEDS)
def test_cut_anywhere_it_is_refused_unless_every_pixel_is_there(data):
    whole = images.read(data)
    for end in range(0, len(data), 7):
        try:
            found = images.read(data[:end])
        except BadImage:
            continue
        np.testing.assert_array_equal(found, whole)
