import pytest

from sd3_jax.training import checkpoint


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Reads that fail are tried again at once."""
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0,) * len(checkpoint.PAUSES))
