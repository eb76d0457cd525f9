import numpy as np
import pytest

from sd3_jax.diffusion import grids

# 28 steps at shift 3, as the released models are sampled.
HEAD = [1, 0.98738, 0.97411, 0.96013]
TAIL = [0.27805, 0.19983, 0.11091, 0.00893, 0]


def test_released_has_the_published_digits():
    t = grids.released(28, 3.0)
    np.testing.assert_allclose(t[:4], HEAD, atol=5e-6)
    np.testing.assert_allclose(t[-5:], TAIL, atol=5e-6)


@pytest.mark.parametrize("steps", [2, 8, 50])
def test_released_always_ends_at_the_doubly_shifted_t(steps):
    once = 3 * 0.001 / (1 + 2 * 0.001)
    twice = 3 * once / (1 + 2 * once)
    np.testing.assert_allclose(grids.released(steps, 3.0)[-2], twice, rtol=1e-6)


@pytest.mark.parametrize("name", grids.GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 28, 1000])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_falls_from_1_to_0(name, steps, shift):
    t = grids.make(name, steps, shift)
    assert t.shape == (steps + 1,) and t.dtype == np.float32
    assert t[0] == 1 or (name in ("flow", "unipc") and 0.99 < t[0] < 1)
    assert t[-1] == 0 and (np.diff(t) < 0).all()


def test_shifted_by_1_is_linear():
    np.testing.assert_array_equal(grids.shifted(28, 1.0), grids.linear(28))
    np.testing.assert_allclose(grids.linear(4), [1, 0.75, 0.5, 0.25, 0])


def test_shifted_has_the_digits_of_the_formula():
    np.testing.assert_allclose(grids.shifted(4, 3.0), [1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize(
    "name, steps, shift, message",
    [
        (
            "karas",
            28,
            3.0,
            "grid: got 'karas', .* linear, shifted, .* .nearest: karras.",
        ),
        ("simple", 1001, 3.0, "steps: got 1001, expected at most 1000 with .* simple"),
        ("linear", 0, 1.0, "steps: got 0, expected a whole number >= 1"),
        ("released", 28, 0.0, "shift: got 0.0, expected a finite number > 0"),
        ("shifted", 28, np.inf, "shift: got inf, expected a finite number > 0"),
        ("shifted", 28, 1e9, "shift: got .*, expected one that keeps 28 .*"),
    ],
)
def test_make_explains_a_bad_value(name, steps, shift, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        grids.make(name, steps, shift)


def comfyuis(name, steps, shift):
    """comfy/samplers.py, on ModelSamplingDiscreteFlow of comfy/model_sampling.py."""
    sigma = lambda timestep: shift * timestep / (1 + (shift - 1) * timestep)
    table = [sigma(k / 1000) for k in range(1, 1001)]
    if name == "simple":
        stride = len(table) / steps
        return [table[-(1 + int(x * stride))] for x in range(steps)] + [0.0]
    start, end = table[-1], table[0]  # a sigma's timestep is the sigma itself
    if name == "sgm_uniform":
        timesteps = np.linspace(start, end, steps + 1)[:-1]
    else:
        timesteps = np.linspace(start, end, steps)
    return [sigma(t) for t in timesteps] + [0.0]


@pytest.mark.parametrize("steps", [1, 3, 20, 28])
@pytest.mark.parametrize(
    "name, theirs",
    [("sgm_uniform", "sgm_uniform"), ("simple", "simple"), ("released", "normal")],
)
def test_comfyuis_schedulers(name, theirs, steps):
    wanted = comfyuis(theirs, steps, 3.0)
    np.testing.assert_allclose(grids.make(name, steps, 3.0), wanted, rtol=1e-6)
