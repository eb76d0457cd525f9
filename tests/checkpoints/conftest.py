import pytest

from sd3_jax.checkpoints import step_folders


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Reads that fail are tried again at once."""
    monkeypatch.setattr(step_folders, "PAUSES", (0.0,) * len(step_folders.PAUSES))
