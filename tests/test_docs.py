"""The documentation: its links resolve, and its blocks of code run on tiny models.

Shell blocks run in bash. `sd3-jax` there is a function that hands its arguments to this
process, which runs the job on `:tiny` or on the miniature of a released model, so that
jax is imported once and programs are shared. Launchers run with --dry-run. A block
below `<!-- not run: REASON -->` does not run.
"""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from doc_blocks import FENCE, Block, blocks
from parity import miniature
from parity.test_pipelines import control_net, original_names
from PIL import Image

from sd3_jax import main
from sd3_jax.distributed import sharding
from sd3_jax.distributed.sharding import make_mesh

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN = (ROOT / "README.md", *sorted((DOCS / "tutorials").glob("*.md")))
GUIDES = sorted({*DOCS.glob("*/*.md")} - {*RUN})  # their Python blocks run
LINKED = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "launch/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
INLINE_CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.M)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- links


def slugs(page: Path) -> set[str]:
    """The anchors that a code host gives to a page's headings."""
    counts, text = Counter(), FENCE.sub("", page.read_text())
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        counts[re.sub(r"[^\w\- ]", "", words).replace(" ", "-")] += 1
    again = {f"{slug}-{i}" for slug, count in counts.items() for i in range(1, count)}
    return counts.keys() | again


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_every_link_to_a_file_or_heading_resolves(page):
    text = INLINE_CODE.sub("", FENCE.sub("", page.read_text()))
    for inline, reference in LINK.findall(text):
        link = inline or reference
        if re.match(r"[a-z]+:", link):  # another site
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}: no such file"
        assert target.is_relative_to(ROOT), f"{name(page)}: {link}: not ours"
        if anchor:
            assert anchor in slugs(target), f"{name(page)}: {link}: no such heading"


def test_the_home_page_answers_twelve_wishes_with_one_link_each():
    rows = re.findall(
        r"^\| (?!I want|---)(.+) \|$", (DOCS / "index.md").read_text(), re.M
    )
    assert len(rows) == 12
    assert all(len(LINK.findall(row)) == 1 for row in rows)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100


# --- blocks

HUB = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3_medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "stabilityai/stable-diffusion-3.5-large-turbo": "sd35_large",
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
}
# What the recipes that start from SD3.5-medium need with its miniature.
MINIATURE = {
    **{"model.depth": 4, "model.width": 64, "model.num_heads": 1},
    **{"model.dual_blocks": 2, "model.pos_size": 24, "model.dtype": "float32"},
    **{"model.context_dim": 160, "model.pooled_dim": 128, "text.length": 100},
}
# Validation and pictures in training are programs that other tests compile.
SHORT = {
    "train": {
        **{"train.steps": 2, "train.eval_every": 99, "train.sample_every": 99},
        "checkpoint.every": 2,
    },
    "evaluate": {"eval.pictures": 8, "eval.examples": 8, "sample.batch_size": 8},
}
TUNED = ("lora", "dreambooth", "finetune")
MOST = {"image.height": 64, "image.width": 64, "sample.steps": 2}
ASSIGNMENTS = re.compile(r"""^(?:export )?(?:\w+=(?:"[^"]*"|\S+) ?)+$""", re.M)
SHIM = r"""
set -euo pipefail
sd3-jax() {
  printf '%s\0' "$@" '' >&"$CALLS"
  read -r code <&"$CODES"
  return "$code"
}
"""


def tiny(words: list[str]) -> list[str]:
    """A job's arguments, for a model that a test has time for."""
    job, *flags = words
    if not flags or "--help" in flags:
        return words
    values = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    stem = Path(values.get("config", "").partition(":")[0]).stem
    if stem:
        values["config"] = f"configs/{stem}.py:tiny"
    smaller = SHORT.get(job, {}) | (MINIATURE if stem in TUNED else {})
    values |= {f"config.{key}": str(value) for key, value in smaller.items()}
    if job == "compare":  # of three miniatures one
        values.setdefault("config.weights", "stabilityai/stable-diffusion-3.5-medium")
    for key, most in MOST.items():
        if int(values.get(f"config.{key}", 0)) > most:
            values[f"config.{key}"] = str(most)
    return [
        job,
        *(f"--{key}={with_miniatures(value)}" for key, value in values.items()),
    ]


def with_miniatures(text: str) -> str:
    """The text with miniatures for names of released models."""
    for hub_name, kind in HUB.items():
        text = text.replace(hub_name, str(miniature.folder(kind)))
    return text


def run_job(words: list[str]) -> int:
    try:
        return main.main(tiny(words))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)


def run_shell(block: Block, folder: Path, variables: str) -> None:
    """Run a block in bash; its jobs run here, one after the other."""
    calls, call = os.pipe()
    code, codes = os.pipe()
    process = subprocess.Popen(
        ["bash", "-c", SHIM + variables + block.code],
        cwd=folder,
        env=os.environ | {"CALLS": str(call), "CODES": str(code)},
        pass_fds=(call, code),
        stdout=subprocess.DEVNULL,
    )
    os.close(call)
    os.close(code)
    with open(calls, "rb") as requests, open(codes, "w") as replies:
        data = b""
        while byte := requests.read(1):  # none when bash has ended
            data += byte
            if data.endswith(b"\0\0"):
                words, data = data[:-2].decode().split("\0"), b""
                result = run_job(words)
                assert result == 0, f"{words}: exit code {result}"
                print(result, file=replies, flush=True)
    where = f"{name(block.page)}:{block.line}"
    assert process.wait() == 0, f"{where}: exit code {process.returncode}"


def run_python(block: Block, names: dict) -> None:
    code = with_miniatures(block.code).replace("(7, 8, 9)", "(1, 2)")  # layers of four
    code = re.sub(r"\b(1024|768)\b", "64", re.sub(r"steps=\d+", "steps=2", code))
    # Lines are counted as in the page, for the traceback.
    code = "\n" * (block.line - 1) + code
    exec(compile(code, str(block.page), "exec"), names)  # noqa: S102


def save_control_net(path: Path) -> None:
    """A miniature of Stability's canny net, in its layout."""
    pipe = SimpleNamespace(transformer=miniature.transformer(qk_norm="rms_norm"))
    tensors = original_names(control_net(pipe, "single").state_dict())
    kind = {"control_type": torch.tensor([1], dtype=torch.int32)}
    safetensors.torch.save_file(tensors | kind, path)


def save_lora(path: Path) -> None:
    """A LoRA of one layer of the miniatures, in diffusers' names."""
    layer = "transformer.transformer_blocks.0.attn.to_q"
    shapes = {"lora_A": (2, 64), "lora_B": (64, 2)}
    tensors = {f"{layer}.{x}.weight": torch.ones(*n) for x, n in shapes.items()}
    safetensors.torch.save_file(tensors, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that all pages share, with what a reader of them has."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number in range(1, 9):
        pixels = draw.integers(0, 256, (96, 128, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"IMG_{number:04}.jpg")
    Image.fromarray(pixels).save(folder / "photo.png")
    (folder / "sd3.5_medium").symlink_to(miniature.folder("sd35_medium"))
    diffusers.AutoencoderTiny(latent_channels=16).save_pretrained(folder / "taesd3")
    for stem in ("style", "ink", "drawing"):
        save_lora(folder / f"{stem}.safetensors")
    for kind in ("canny", "depth"):
        save_control_net(folder / f"sd3.5_large_controlnet_{kind}.safetensors")
    embedding = {"clip_l": (2, 64), "clip_g": (2, 64), "t5xxl": (2, 160)}
    tensors = {name: torch.ones(shape) for name, shape in embedding.items()}
    safetensors.torch.save_file(tensors, folder / "cat-toy.safetensors")
    (folder / "launch").mkdir()
    for script in (ROOT / "launch").glob("*.sh"):
        dry = folder / "launch" / script.name
        dry.write_text(f'#!/bin/sh\nexec bash {script} "$@" --dry-run\n')
        dry.chmod(0o755)
    return folder


@pytest.mark.parametrize("page", [*RUN, *GUIDES], ids=name)
def test_the_blocks_of_a_page_run_in_order(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    one = make_mesh(devices=jax.devices()[:1])  # quicker than eight virtual ones
    monkeypatch.setattr(sharding, "make_mesh", lambda *args, **axes: one)
    names, variables = {"__name__": "__main__"}, ""
    for block in blocks(page):
        if block.language == "python" and not block.reason:
            run_python(block, names)
        elif block.language == "bash" and page in RUN:
            if not block.reason:
                run_shell(block, folder, variables)
            lines = ASSIGNMENTS.findall(block.code)  # later blocks use them
            variables += "".join(f"{line}\n" for line in lines)


def test_most_blocks_run_and_the_others_say_why():
    code = [block for page in RUN for block in blocks(page)]
    assert all(block.language for block in code), "a block without a language"
    code = [block for block in code if block.language in ("bash", "python")]
    skipped = [block for block in code if block.reason]
    for block in skipped:
        print(f"{name(block.page)}:{block.line}: not run: {block.reason}")
    print(f"{len(code) - len(skipped)} of {len(code)} blocks run")
    assert 2 * len(skipped) <= len(code)
