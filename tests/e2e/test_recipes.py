"""Every recipe in every variant is sound; what is not the digits' trains as well."""

import importlib
import math
from pathlib import Path

import jax
import pytest

from sd3_jax import main, metrics
from sd3_jax.jobs import assemble
from sd3_jax.validate import validate

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
    made = assemble.parts(config)
    params = jax.eval_shape(made.objective.init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params["denoiser"]))
    if name in PARAMETERS and variant != "tiny":
        assert count == PARAMETERS[name]
    assert variant != "tiny" or count < 300_000


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
