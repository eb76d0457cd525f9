"""Imports point down the house (ARCHITECTURE.md), and PyTorch is not in it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sd3_jax import jax_internals
from sd3_jax.errors import UserError

ROOT = Path(__file__).parents[1]
BELOW = [
    "errors",
    "files",
    "source_names",
    "tree",
    "metrics",
    "pictures",
    "sharding",
    "hosts",
    "jax_internals",
    "outside",
]
MAY = {
    "diffusion": ["errors"],
    "models": [],
    "data": ["errors", "files", "hooks", "outside"],
    "weights": ["models", *BELOW],
    "pipelines": ["models", "diffusion", "data", "weights", *BELOW],
    "training": ["pipelines", "models", "diffusion", *BELOW],
    "evals": ["pipelines", "models", "diffusion", "data", *BELOW],
    "report": ["data", "errors", "metrics", "pictures"],
    "bench": ["pipelines", "models", "diffusion", "training", "weights", *BELOW],
    "parity": ["pipelines", "models", "diffusion", "data", "weights", *BELOW],
    "plan": ["models", "data", *BELOW],
    "jobs": None,  # anything
}


def imported(path: Path) -> set[str]:
    """The second names of the sd3_jax modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("sd3_jax.")}


def test_imports_point_down():
    for package, allowed in MAY.items():
        for path in (ROOT / "sd3_jax" / package).glob("*.py"):
            used = imported(path) - {package}
            assert allowed is None or used <= set(allowed), (path.name, used)


def test_configs_stop_at_the_door():
    door = {"jobs", "cli.py", "validate.py", "main.py"}
    for path in (ROOT / "sd3_jax").rglob("*.py"):
        if path.relative_to(ROOT / "sd3_jax").parts[0] not in door:
            assert "ConfigDict" not in path.read_text(), path


def test_what_of_jax_has_no_public_name_is_in_one_place():
    for path in (ROOT / "sd3_jax").rglob("*.py"):
        internal = "jax._src" in path.read_text()
        assert internal == (path.name == "jax_internals.py"), path


def test_one_process_does_without_it(monkeypatch, caplog):
    """As if a later jax had moved it."""
    for name in "jax._src.distributed", "jax._src.clusters":
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("jax._src.distributed")
    assert jax_internals.coordination_client() is None
    assert jax_internals.detected_processes() == 1
    assert "set SD3_COORDINATOR" in caplog.text
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    with pytest.raises(UserError, match="wanted jax 0.10"):
        jax_internals.coordination_client()


def test_no_job_imports_pytorch():
    code = (
        "import importlib, sys\n"
        "from sd3_jax.jobs import JOBS\n"
        "for job in JOBS.values(): importlib.import_module(job.module)\n"
        "print(*({'torch', 'diffusers', 'tensorflow'} & set(sys.modules)))\n"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == ""
