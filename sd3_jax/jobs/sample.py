"""Prompts to PNGs from a workdir's checkpoint, with a line of JSON for each."""

import hashlib
import json
import re
import sys

import jax
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

from sd3_jax import pictures, sharding
from sd3_jax.errors import UserError
from sd3_jax.jobs import assemble
from sd3_jax.jobs.paint import Painter
from sd3_jax.metrics import write_whole


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes workdir/samples/<number>-<prompt>.png, samples.jsonl and samples.png."""
    workdir = epath.Path(workdir)
    captions = read_prompts(config, workdir)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        parts = assemble.parts(config)
        params, step = assemble.trained_params(config, parts, workdir, mesh)
        each = [
            caption for caption in captions for _ in range(config.sample.per_prompt)
        ]
        numbers = list(range(config.sample.per_prompt)) * len(captions)
        images = Painter(config, parts, mesh)(params, each, numbers)
    if jax.process_index() == 0:
        save(config, workdir, step, each, numbers, images)


def read_prompts(config: ConfigDict, workdir: epath.Path) -> list[str]:
    """config.sample.prompt, or the lines of prompts_file, or those of the recipe."""
    sample = config.sample
    if sample.prompt and sample.prompts_file:
        raise UserError(
            "config.sample.prompt and config.sample.prompts_file are both given; wanted"
            " one of them"
        )
    if sample.prompt:
        return [sample.prompt]
    if not sample.prompts_file:
        if not config.train.prompts:
            raise UserError(
                "no prompt: wanted --config.sample.prompt=TEXT or"
                " --config.sample.prompts_file=FILE, one prompt a line"
            )
        return list(config.train.prompts)
    path = epath.Path(sample.prompts_file)
    if not path.is_file():
        raise UserError(f"config.sample.prompts_file = {path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"config.sample.prompts_file = {path}: not UTF-8 at byte {error.start}"
        ) from None
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"config.sample.prompts_file = {path}: holds no prompt")
    return captions


def save(config, workdir, step, captions, numbers, images) -> None:
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.sample.to_dict()
    lines = []
    for i, (caption, number, image) in enumerate(zip(captions, numbers, images)):
        name = f"{i:04d}-{slug(caption)}.png"
        line = {
            "file": f"samples/{name}",
            "prompt": caption,
            "number": int(number),
            "step": step,
            "settings": {k: v for k, v in settings.items() if "prompt" not in k},
        }
        info = {"prompt": caption, "sd3_jax": json.dumps(line)}
        pictures.save_png(pictures.grid(image[None]), folder / name, info=info)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(workdir / "samples.jsonl", "".join(lines).encode())
    sheet = pictures.grid(images, columns=min(len(images), 8), captions=captions)
    pictures.save_png(sheet, workdir / "samples.png")
    for line in lines[:8]:
        print(workdir / json.loads(line)["file"])
    if len(lines) > 8:
        print(f"… {len(lines)} pictures, all on {workdir / 'samples.png'}")
    sys.stdout.flush()


def slug(caption: str) -> str:
    """A file name that tells the prompt, and only ever a name."""
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:48]
    return words or hashlib.sha256(caption.encode()).hexdigest()[:8]
