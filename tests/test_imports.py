"""Imports point down the house (ARCHITECTURE.md), and PyTorch is not in it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sd3_jax.distributed import jax_internals
from sd3_jax.errors import UserError

ROOT = Path(__file__).parents[1]
# What each package imports of ours, lowest first; design: ARCHITECTURE.md.
FLOOR = {"errors", "foreign_text", "files", "hooks", "tree"}
MAY = {
    "diffusion": {"errors"},
    "distributed": {*FLOOR},
    "monitoring": {*FLOOR},
    "models": {"distributed", "params"},
    "params": {"models", *FLOOR},
    "data": {*FLOOR},
    "weights": {"models", "params", "data", "distributed", *FLOOR},
    "checkpoints": {"distributed", *FLOOR},
    "sampling": {"models", "params", "diffusion", "data", "weights", "distributed"},
    "training": {"sampling", "models", "params", "diffusion", "distributed"},
    "evaluation": {"sampling", "data", "weights", "distributed"},
    "reports": {"data", "monitoring"},
    "serving": {"sampling", "data", "distributed", "pictures", *FLOOR},
    "tools": {"reports", "evaluation", "training", "sampling", "weights", "models"},
}
MAY["sampling"] |= {"pictures", *FLOOR}
MAY["training"] |= {"checkpoints", "monitoring", *FLOOR}
MAY["evaluation"] |= {*FLOOR}
MAY["reports"] |= {*FLOOR}
MAY["tools"] |= {
    "serving",
    "params",
    "diffusion",
    "data",
    "distributed",
    "monitoring",
    *FLOOR,
}
# What knows configs is called by jobs alone, wherever it lies, and may import anything.
DOOR = {
    *("main.py", "config", "jobs", "assembly", "training/trainer.py"),
    *("training/program.py", "training/run_checks.py", "training/resume.py"),
    "training/held_out_loss.py",
    *("sampling/job/sampler.py", "sampling/job/released_sampler.py"),
    *("sampling/job/prompt_file.py", "sampling/job/prompt_lines.py"),
    *("sampling/job/output_filter.py", "sampling/job/repeated_pictures.py"),
    *("sampling/job/painters.py", "sampling/job/task_arguments.py"),
    *("evaluation/picture_scores.py", "evaluation/prompt_scores.py"),
    *("evaluation/picture_features.py", "evaluation/reference_images.py"),
    *("data/ingest/intake.py", "tools/study/run_scores.py"),
    *("sampling/job/task_lines.py", "serving/request_tasks.py", "serving/service.py"),
    *("serving/row_painters.py", "serving/hosts.py", "serving/warm_up.py"),
    *("tools/plan/sampling_programs.py", "tools/benchmark/case_selection.py"),
}


def at_the_door(path: Path) -> bool:
    name = path.relative_to(ROOT / "sd3_jax")
    return name.parts[0] in DOOR or str(name) in DOOR


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
        for path in (ROOT / "sd3_jax" / package).rglob("*.py"):
            used = imported(path) - {package}
            assert at_the_door(path) or used <= allowed, (path, used - allowed)


def test_every_package_has_its_place():
    packages = {path.parent.name for path in (ROOT / "sd3_jax").glob("*/__init__.py")}
    assert packages == MAY.keys() | {name for name in DOOR if ".py" not in name}


def test_configs_stop_at_the_door():
    for path in (ROOT / "sd3_jax").rglob("*.py"):
        known = "ConfigDict" in path.read_text()
        assert at_the_door(path) or not known, path


def test_no_module_name_occurs_twice():
    modules = [path.stem for path in (ROOT / "sd3_jax").rglob("*.py")]
    twice = {name for name in modules if modules.count(name) > 1}
    assert twice == {"__init__"}


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
    with pytest.raises(UserError, match="install jax 0.10"):
        jax_internals.coordination_client()


def test_no_job_imports_pytorch_or_what_few_runs_use():
    code = (
        "import importlib, sys\n"
        "from sd3_jax.jobs import JOBS\n"
        "for job in JOBS: importlib.import_module(f'sd3_jax.jobs.{job}')\n"
        "unwanted = {'torch', 'diffusers', 'tensorflow', 'sklearn', 'transformers'}\n"
        "print(*(unwanted & set(sys.modules)))\n"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == ""
