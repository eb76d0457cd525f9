"""Commands and Python of the pages in docs/: keys exist, values are allowed, code runs.

Python blocks of a page run in order, in one namespace, on a miniature model.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from parity import miniature
from parity.test_pipelines import control_net, original_names

from sd3_jax.config import command_line
from sd3_jax.config.validation import validate
from sd3_jax.jobs import JOBS

ROOT = Path(__file__).parents[1]
FOLDERS = "how-to", "reference", "explanation"
PAGES = sorted(path for name in FOLDERS for path in (ROOT / "docs" / name).glob("*.md"))
# The pages show a released model's sizes; the miniature's are smaller.
SMALL = {
    "(1024, 768)": "(64, 48)",
    "(768, 1024)": "(48, 64)",
    "(1, 1024, 1024, 3)": "(1, 64, 64, 3)",
    "=1024": "=64",
    "[:300]": "[:16]",
    "(7, 8, 9)": "(1,)",
    "steps=60": "steps=2",
    "steps=28": "steps=2",
    "max_sequence_length=256": "max_sequence_length=20",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(block: str) -> list[list[str]]:
    """The words of each sd3-jax command, after the shell's own substitutions."""
    lines = block.replace("\\\n", " ").split("\n")
    kept = [x for x in lines if re.match(r'\s*(sd3-jax |[A-Z]+=")', x)]
    shim = r"""sd3-jax() { printf '%s\0' "$@"; printf '\n\0'; }"""
    script = "\n".join(["set -f", shim, *kept])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    calls = done.stdout.split("\n\0")[:-1]
    return [call.split("\0")[:-1] for call in calls]


CALLS = [
    pytest.param(words, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, words in enumerate(
        words
        for block in blocks(page, "bash")
        for words in commands(block)
        if "--help" not in words
    )
]


@pytest.mark.parametrize("argv", CALLS)
def test_a_command_names_a_job_a_recipe_and_keys_that_exist(argv):
    (job,), flags = command_line.split(argv)
    recipe = flags.pop("--config", "") or JOBS[job].recipe
    flags.pop("--workdir", None)
    config = command_line.load(recipe)
    for name, text in flags.items():
        command_line.override(config, name.removeprefix("--config."), text)
    validate(config)


def save_canny_net(path: Path) -> None:
    transformer = miniature.transformer(**miniature.KINDS["sd35_large"])
    net = control_net(SimpleNamespace(transformer=transformer), "single")
    kind = {"control_type": torch.tensor([1], dtype=torch.int32)}
    safetensors.torch.save_file(original_names(net.state_dict()) | kind, path)


@pytest.mark.parametrize(
    "page", [x for x in PAGES if blocks(x, "python")], ids=lambda x: x.stem
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for size in ("medium", "large"):
        Path(f"sd3.5_{size}").symlink_to(miniature.folder(f"sd35_{size}"))
    PIL.Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save("photo.png")
    save_canny_net(Path("sd3.5_large_controlnet_canny.safetensors"))
    names = {"__name__": page.stem}
    for block in blocks(page, "python"):
        for size, small in SMALL.items():
            block = block.replace(size, small)
        exec(compile(block, page.name, "exec"), names)
