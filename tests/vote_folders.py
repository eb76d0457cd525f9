"""Folders of small pictures for tests of votes: of `sample`, and plain ones."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, side: int = 16, enlarged: int = 1) -> None:
    """Write a picture of noise that depends on its path's last parts."""
    seed = zlib.crc32("/".join(path.parts[-3:]).encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.repeat(enlarged, 0).repeat(enlarged, 1)).save(path)


def painted(path: Path, side: int) -> np.ndarray:
    """The pixels of `picture`, not enlarged."""
    image = np.asarray(Image.open(path).convert("RGB"))
    factor = image.shape[0] // side
    return image[::factor, ::factor]


def sample_folder(
    folder: Path,
    prompts: Sequence[str],
    *,
    per_prompt: int = 1,
    side: int = 16,
    enlarged: int = 1,
) -> Path:
    """A folder as the `sample` job leaves it."""
    lines = []
    for prompt in prompts:
        for number in range(per_prompt):
            name = f"samples/{len(lines):04d}.png"
            picture(folder / name, side, enlarged)
            line = dict(file=name, prompt=prompt, number=number, seed=number)
            line |= dict(weights="1234", settings=dict(height=side, width=side))
            lines.append(json.dumps(line) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))
    return folder


def plain_folder(folder: Path, prompts: Sequence[str], *, captions: bool) -> Path:
    """A folder of pictures, with a text file each or a number in each name."""
    for i, prompt in enumerate(prompts):
        picture(folder / f"{i:04d}.png")
        if captions:
            (folder / f"{i:04d}.png").rename(folder / f"picture-{i}.png")
            (folder / f"picture-{i}.txt").write_text(prompt + "\n")
    return folder
