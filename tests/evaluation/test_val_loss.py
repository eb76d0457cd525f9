"""The validation loss: one source, one copy to the host, the mean at each time."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from configs import sd3_2b
from sd3_jax.assembly import examples
from sd3_jax.distributed import sharding
from sd3_jax.evaluation.val_loss import TIMES, val_loss
from sd3_jax.training.held_out_loss import Validation


def loss_at(params, key, batch, t):
    return params["w"] * jnp.mean(batch["x"]) + jnp.mean(t)


def test_losses_come_to_the_host_together(monkeypatch):
    copies, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: copies.append(1) or get(x))
    batches = [{"x": jnp.full(2, i, jnp.float32)} for i in range(5)]
    found = dict(val_loss(loss_at, {"w": 3.0}, jax.random.key(0), batches))
    assert copies == [1]
    assert found["loss"] == np.mean([3.0 * i + t for i in range(5) for t in TIMES])
    assert found["loss_t0.0625"] == 3.0 * 2 + 0.0625


def test_the_source_is_opened_once(monkeypatch):
    opened, source = [], examples.source
    spy = lambda *args, **options: opened.append(options) or source(*args, **options)
    monkeypatch.setattr(examples, "source", spy)
    config = sd3_2b.get_config("tiny")
    config.eval.batch_size = 2
    at = lambda params, key, batch, t: params["w"] + jnp.mean(batch["pooled"]) * t[0]
    parts = SimpleNamespace(objective=SimpleNamespace(loss_at=at), encoders={})
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    validation = Validation(config, parts, mesh)
    assert validation({"w": 1.0}) == validation({"w": 1.0})
    assert opened == [{"held_out": True}]
