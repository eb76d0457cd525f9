"""Every recipe in every variant is sound; what is not the digits' trains as well."""

import importlib
import math
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sd3_jax import main, tree
from sd3_jax.assembly import model_parts
from sd3_jax.config.validation import validate
from sd3_jax.monitoring import metrics
from sd3_jax.params import lora
from sd3_jax.params.lora import nested
from sd3_jax.training import optimizer

RECIPES = sorted(p.stem for p in Path("configs").glob("*.py") if p.stem[0] != "_")
RECIPES.remove("base")
PARAMETERS = {
    "sd3_2b": 2_028_328_000,
    "sd35_medium": 2_243_171_520,
    "sd3_8b": 8_056_627_520,
    "sd35_large": 8_056_627_520,
}


def variants():
    for name in RECIPES:
        for variant in ("", *importlib.import_module(f"configs.{name}").VARIANTS):
            yield name, variant


@pytest.mark.parametrize("name, variant", variants())
def test_a_recipe_makes_sense(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    validate(config)
    made = model_parts.build_parts(config)
    params = jax.eval_shape(made.objective.init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params["denoiser"]))
    if name in PARAMETERS and variant != "tiny":
        assert count == PARAMETERS[name]
    assert variant != "tiny" or count < 300_000
    shapes = tree.unbox(params)
    if config.tune.method == "lora":
        add = partial(lora.init, rank=4, targets=config.tune.targets)
        shapes = jax.eval_shape(add, jax.random.key(0), shapes["denoiser"])
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    ranks = tuple((tree.names(path), x.ndim) for path, x in paths)
    optim = config.optim.to_dict() | dict(weight_decay=0.25, warmup=0, clip=0.0)
    assert_only_matrices_decay(ranks, tuple(sorted(optim.items())))


@cache  # many recipes differ in sizes alone
def assert_only_matrices_decay(ranks, optim):
    """Without gradients, leaves move by rate times decay, or not at all."""
    optim = dict(optim)
    del optim["accumulate"]
    tx, rate = optimizer.make(**optim, steps=100)
    params = nested({path: jnp.ones((1,) * ndim) for path, ndim in ranks})
    zeros = jax.tree.map(jnp.zeros_like, params)
    run = jax.jit(lambda params: tx.update(zeros, tx.init(params), params)[0])
    rates = [float(rate(0))] + [optim["muon_lr"]] * (optim["name"] == "muon")
    for path, update in jax.tree_util.tree_leaves_with_path(run(params)):
        leaf, moved = tree.names(path)[-1], -float(update.ravel()[0]) / 0.25
        wanted = [0.0] if leaf in ("bias", "scale", "relative_bias") else rates
        assert any(moved == pytest.approx(x, rel=1e-5, abs=0) for x in wanted), path


def test_a_large_recipe_trains_when_tiny(tmp_path):
    """Precomputed latents and text, dual blocks, a third weight set, accumulation."""
    flags = [
        "--config=configs/sd35_medium.py:tiny",
        f"--workdir={tmp_path}",
        "--config.train.steps=3",
        "--config.model.dual_blocks=1",
        "--config.model.weight_sets=3",
        "--config.optim.accumulate=2",
        "--config.model.dtype=bfloat16",
        "--config.model.remat=full",
    ]
    assert main.main(["train", *flags]) == 0
    losses = [row["loss"] for row in metrics.read(tmp_path) if row["kind"] == "train"]
    assert len(losses) == 3 and all(1 < x < 4 and math.isfinite(x) for x in losses)
