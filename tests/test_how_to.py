"""Commands on the pages of docs/: their jobs, recipes and keys exist, with such values.

tests/test_docs.py runs the Python of these pages.
"""

import re
import subprocess
from pathlib import Path

import pytest
from doc_blocks import blocks

from sd3_jax.config import command_line
from sd3_jax.config.validation import validate
from sd3_jax.jobs import JOBS

ROOT = Path(__file__).parents[1]
FOLDERS = "how-to", "reference", "explanation"
PAGES = sorted(path for name in FOLDERS for path in (ROOT / "docs" / name).glob("*.md"))


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
        for block in blocks(page)
        if block.language == "bash"
        for words in commands(block.code)
        if "--help" not in words
    )
]


@pytest.mark.parametrize("argv", CALLS)
def test_a_command_names_a_job_a_recipe_and_keys_that_exist(argv):
    (job, *action), flags = command_line.split(argv)
    if action:  # `vote export`
        key = f"--config.{JOBS[job].action}"
        flags[key] = command_line.read_action([job, *action], flags)
    recipe = flags.pop("--config", "") or JOBS[job].recipe
    flags.pop("--workdir", None)
    config = command_line.load(recipe)
    for name, text in flags.items():
        command_line.override(config, name.removeprefix("--config."), text)
    validate(config)
