"""As in a container: a user without a name or a home, a read-only install, and a
workdir of another owner's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USER = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
TINY = ["--config=quickstart:tiny", "--config.model.depth=1"]
TRAIN = [
    "train",
    *TINY,
    "--config.train.sample_every=99",
    "--config.train.eval_every=99",
]
TRAIN += ["--config.checkpoint.every=2", "--config.train.changes=train.steps"]


def permitted():
    try:
        return subprocess.run([*USER, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def installed(tmp_path):
    """A copy of the package that nobody may write to, and folders of root's or ours."""
    (tmp_path / "install").mkdir()
    skip = shutil.ignore_patterns("__pycache__")
    for name in "sd3_jax", "configs":
        shutil.copytree(ROOT / name, tmp_path / "install" / name, ignore=skip)
    for name in "work", "tmp":
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o1777 if name == "tmp" else 0o777)
        if os.getuid() == 0:  # a workdir that another user made
            os.chown(tmp_path / name, 1234, 1234)
    subprocess.run(["chmod", "-R", "a-w,a+rX", tmp_path / "install"], check=True)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    yield tmp_path
    subprocess.run(["chmod", "-R", "u+w", tmp_path / "install"], check=True)


@pytest.mark.skipif(not permitted(), reason="unshare --user is not permitted here")
def test_a_user_without_a_name_trains_samples_and_resumes(installed):
    env = dict(
        PATH=os.environ["PATH"],
        PYTHONPATH=str(installed / "install"),
        TMPDIR=str(installed / "tmp"),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_backend_optimization_level=0",
    )

    def run(*argv):
        argv = [*argv, f"--workdir={installed / 'work' / 'run'}"]
        done = subprocess.run(
            [*USER, sys.executable, "-m", "sd3_jax.main", *argv],
            cwd=installed / "work",
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    run(*TRAIN, "--config.train.steps=2")
    assert "resuming from step 2" in run(*TRAIN, "--config.train.steps=3")
    run("sample", *TINY, "--config.sample.prompt=a red one")
    assert (installed / "work" / "run" / "samples.png").is_file()
    assert not list((installed / "install").rglob("*.pyc"))
