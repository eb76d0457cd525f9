"""Rows with grids, steps, solvers and guidance of their own, in one loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax.diffusion import guidance, solvers

GRIDS = (np.linspace(1, 0, 5), np.linspace(1, 0, 9) ** 1.5, np.linspace(0.8, 0, 3))
SCALES = np.array([1.5, 3.0, 7.0], np.float32)


def velocity(x, t, cond):
    t = t.reshape(-1, 1, 1)
    return jnp.sin(3 * x + cond) * (1 + t)


def padded(grid):
    return np.pad(grid, (0, 12 - len(grid))).astype(np.float32)


def draw(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (1, 4, 2))


@pytest.mark.parametrize(
    "names", [solvers.ONE_EVALUATION, tuple(solvers.STOCHASTIC)], ids=["ode", "sde"]
)
def test_rows_are_what_each_is_alone(names):
    x = jax.random.normal(jax.random.key(0), (3, 4, 2))
    cond = jnp.arange(3.0).reshape(3, 1, 1)
    noisy = {"draw": draw} if names != solvers.ONE_EVALUATION else {}

    @jax.jit
    def run(x, cond, grid, steps, number, scale, interval):
        guided = guidance.guided(
            velocity, cond, -cond, scale=scale, interval=interval, rescale=scale / 10
        )
        solver = solvers.of_program(names, number)
        return solver(guided, x, grid, steps=steps, **noisy)

    grids = np.stack([padded(grid) for grid in GRIDS])
    steps = np.array([len(grid) - 1 for grid in GRIDS], np.int32)
    numbers = np.arange(3, dtype=np.int32)
    low, high = np.float32([0, 0.1, 0.2]), np.float32([1, 0.9, 0.6])
    together = run(x, cond, grids, steps, numbers, SCALES, (low, high))
    assert np.isfinite(together).all()
    for i in range(3):
        row = slice(i, i + 1)
        interval = low[i], high[i]
        numbers_of_row = grids[i], steps[i], numbers[i], SCALES[i], interval
        alone = run(x[row], cond[row], *numbers_of_row)
        # The shapes differ, and so may the last bits, which the steps amplify.
        np.testing.assert_allclose(together[row], alone, rtol=1e-4, atol=1e-4)
