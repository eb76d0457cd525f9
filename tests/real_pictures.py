"""A folder of real pictures, as people have them: captions beside them, and bad ones.

Crops of scikit-learn's two photographs, at many places and sizes, and its digits.
"""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

NAMES = "zero one two three four five six seven eight nine".split()
KEPT = {  # odd, and taken by rule
    "cmyk.jpg",
    "sixteen.png",
    "rotated.jpg",
    "palette.png",
    "alpha.png",
    "empty-caption.jpg",
    "no-caption.jpg",
    "control-characters.jpg",
}


def make(folder: Path, count: int, seed: int = 0) -> dict[str, str]:
    """`count` good ones and odd ones; of the latter "kept" or a part of the reason."""
    rng = np.random.default_rng(seed)
    photos, digits = load_sample_images().images, load_digits()
    for i in range(count):
        if i % 5 == 4:
            n = int(rng.integers(len(digits.images)))
            scan = np.uint8(digits.images[n] * 255 / 16)
            picture = np.asarray(Image.fromarray(scan).resize((64, 64)))
            caption = f"a handwritten {NAMES[digits.target[n]]}"
        else:
            photo = photos[i % 2]
            h, w = np.exp(rng.uniform(np.log(48), np.log(400), 2)).astype(int)
            h, w = min(max(h, w // 3), 400), min(max(w, h // 3), 400)
            top, left = (int(rng.integers(a - b)) for a, b in zip(photo.shape, (h, w)))
            picture = photo[top : top + h, left : left + w]
            caption = ("a temple in China", "a red flower")[i % 2]
        place = folder / f"{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        kind = ("jpg", "png", "webp")[i % 7 % 3]
        Image.fromarray(picture).save(place / f"{i:04d}.{kind}")
        (place / f"{i:04d}.txt").write_text(caption)
        if i % 2:
            about = {"synthetic": f"{caption}, seen closely", "score": i / count}
            (place / f"{i:04d}.json").write_text(json.dumps(about))
    return dict.fromkeys(KEPT, "kept") | bad(folder / "odd", photos[0])


def bad(folder: Path, photo: np.ndarray) -> dict[str, str]:
    """What a web's worth of files has in it; each with the reason that is wanted."""
    folder.mkdir(parents=True)
    whole = encoded(photo[:96, :128], "JPEG")
    write = lambda name, data: (folder / name).write_bytes(data)
    reasons = {}

    def refused(name, data, reason):
        write(name, data)
        reasons[name] = reason

    refused("truncated.jpg", whole[: len(whole) // 2], "truncated")
    refused("truncated.png", encoded(photo[:64, :64], "PNG")[:900], "bad picture")
    refused("zero.jpg", b"", "bad picture")
    refused("text.jpg", b"this is no picture", "bad picture")
    refused("page.png", b"<html><body>404</body></html>", "bad picture")
    refused("bomb.png", bomb(50_000), "pixels")
    refused("speck.png", encoded(photo[:1, :1], "PNG"), "pixels")
    refused("strip.png", encoded(photo[:20, :600], "PNG"), "pixels")
    refused("animated.webp", animated(photo), "animated")
    refused("other.gif", encoded(photo[:64, :64], "GIF"), "by its name")
    refused("a.bmp", encoded(photo[:64, :64], "BMP"), "by its name")
    refused("alone.txt", b"a caption of nothing", "without a picture")

    image = Image.fromarray(photo[:96, :128])
    image.convert("CMYK").save(folder / "cmyk.jpg")
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rotated.jpg", exif=exif)
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "alpha.png")
    write("empty-caption.jpg", whole)
    write("no-caption.jpg", whole)
    write("control-characters.jpg", whole)
    for name in KEPT - {"no-caption.jpg"}:
        caption = {
            "empty-caption.jpg": " \n",
            "control-characters.jpg": "a\x00\x1b[31m",
        }
        text = caption.get(name, "a picture")
        (folder / name).with_suffix(".txt").write_text(text)
    return reasons


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def animated(photo: np.ndarray) -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(photo[i : i + 64, :64]) for i in (0, 40)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of few bytes whose header says side x side pixels."""
    chunk = lambda kind, data: (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
