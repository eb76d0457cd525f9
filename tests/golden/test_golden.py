"""Numbers move on purpose: each recipe's first losses and parameters, as recorded."""

import pytest
from golden import record

RECORDED = record.recorded()
QUICK = (
    "quickstart",
    "backbones",
    "sd35_medium",
    "lora",
    "dpo",
)  # what differs in code
MOVED = (
    "if that is meant, say so in CHANGELOG.md and run tests/golden/record.py --update"
)


def test_every_recipe_that_trains_is_recorded():
    assert tuple(RECORDED) == record.TRAINABLE


@pytest.mark.parametrize("recipe", record.TRAINABLE)
def test_parameters(recipe):
    assert record.parameters(recipe) == RECORDED[recipe]["parameters"], MOVED


@pytest.mark.parametrize(
    "recipe",
    [
        recipe if recipe in QUICK else pytest.param(recipe, marks=pytest.mark.slow)
        for recipe in record.TRAINABLE
    ],
)
def test_first_losses(recipe):
    losses = RECORDED[recipe]["losses"]
    assert record.first_losses(recipe) == pytest.approx(losses, rel=1e-4), MOVED
