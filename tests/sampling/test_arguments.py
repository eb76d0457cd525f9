"""What callers write for numbers, pairs and texts."""

import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax.errors import UserError
from sd3_jax.sampling import argument_checks
from sd3_jax.sampling.adapters import lora_adapters
from sd3_jax.sampling.images import input_images


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.int8(2), np.array(2.0), jnp.float32(2)]
)
def test_a_number(value):
    number = argument_checks.number("guidance", value)
    assert number == 2 and type(number) is float


@pytest.mark.parametrize(
    "value", [None, "2", True, [2.0], np.array([2.0]), np.nan, np.inf, 1e39, 10**400]
)
def test_no_number(value):
    with pytest.raises(UserError, match="^guidance .*: expected a finite number$"):
        argument_checks.number("guidance", value)


@pytest.mark.parametrize("value", [2.0, "2", True, None, -1, 9])
def test_no_whole_number(value):
    with pytest.raises(UserError, match="^steps .*: expected a whole number 0 to 8$"):
        argument_checks.whole("steps", value, 0, 8)


@pytest.mark.parametrize("value", [None, 0.5, "ab", (0,), (0, 1, 2), (0, "a")])
def test_no_pair(value):
    with pytest.raises(UserError, match="guidance_interval .*: expected"):
        argument_checks.pair("guidance_interval", value)


def test_layers():
    assert argument_checks.skip_layers(np.array([1, 2]), 4) == [
        1,
        2,
    ]
    assert argument_checks.skip_layers(None, 4) == []
    for value in 3, "1", ["a"], [0.5], [True], [4]:
        with pytest.raises(UserError, match="skip_layers"):
            argument_checks.skip_layers(value, 4)


@pytest.mark.parametrize("value", [None, 3, "eulr"])
def test_no_choice(value):
    with pytest.raises(UserError, match="solver .*euler"):
        argument_checks.choice("solver", value, ["euler", "heun"])


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("a=0.8", [("a", 0.8)]),
        (["a", "b=2"], [("a", 1.0), ("b", 2.0)]),
        ({"a": 0.8, "b=2": 1}, [("a", 0.8), ("b=2", 1.0)]),
        ([("a", 0.5)], [("a", 0.5)]),
        ((), []),
    ],
)
def test_loras_and_their_weights(given, wanted):
    assert lora_adapters.listed(given) == wanted


@pytest.mark.parametrize(
    "given", [None, 3, [3], [("a", "0.8")], {"a": np.nan}, "a=nan", [("a", True)]]
)
def test_what_is_no_lora(given):
    with pytest.raises(UserError, match="lora"):
        lora_adapters.listed(given)


def test_times_of_other_ranges_are_refused():
    assert input_images.times(0.5, 2).tolist() == [0.5, 0.5]
    for t in (500.0, -0.1, np.nan, [0.1, 0.2, 0.3]):
        with pytest.raises(UserError, match="expected"):
            input_images.times(t, 2)
