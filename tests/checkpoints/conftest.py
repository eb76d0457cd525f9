import pytest

from sd3_jax.checkpoints import manager


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Reads that fail are tried again at once."""
    monkeypatch.setattr(manager, "PAUSES", (0.0,) * len(manager.PAUSES))
