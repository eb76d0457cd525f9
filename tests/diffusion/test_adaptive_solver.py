import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion.test_multistep_solvers import solution, velocity

from sd3_jax.diffusion import grids
from sd3_jax.diffusion.adaptive_solver import adaptive, adaptive_evaluations
from sd3_jax.errors import UserError

X = jnp.linspace(-2, 2, 12).reshape(4, 3)
solve = jax.jit(adaptive_evaluations, static_argnums=0)


def test_the_error_falls_with_the_tolerance():
    exact, errors, counts = solution(np.float64(X), 1.0, 0.0), [], []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        x, evaluations = solve(velocity, X, grids.linear(50), tolerance=tolerance)
        errors.append(np.abs(x - exact).max())
        counts.append(int(evaluations.max()))
        print(f"tolerance {tolerance:g}: {counts[-1]} calls, error {errors[-1]:.1e}")
        assert errors[-1] < tolerance
    assert counts == sorted(counts) and errors[-1] < errors[0] / 100


def test_the_number_of_steps_bounds_the_evaluations():
    """A velocity that no tolerance is met on still reaches t = 0."""
    rough = lambda x, t: jnp.sin(300 * t)[:, None] * 50 + 0 * x
    for steps in (1, 3, 10):
        x, evaluations = solve(rough, X, grids.linear(steps), tolerance=1e-6)
        assert (evaluations == 1 + 3 * steps).all()
        assert jnp.isfinite(x).all()


def test_a_smooth_path_takes_fewer_than_the_bound():
    x, evaluations = solve(lambda x, t: 0 * x + 1, X, grids.released(28, 3.0))
    np.testing.assert_allclose(x, X - 1, atol=1e-5)
    assert (evaluations < 20).all()


def test_a_row_does_not_depend_on_its_batch():
    """Each has steps of its own, though one is far harder."""
    speeds = jnp.array([0.1, 30.0, 1.0, 2.0])[:, None]
    bend = lambda x, t, speed: jnp.sin(speed * 3 * t[:, None]) + x
    together, counts = solve(lambda x, t: bend(x, t, speeds), X, grids.linear(60))
    assert counts[1] > counts[0]
    for i in range(4):
        mine = lambda x, t, i=i: bend(x, t, speeds[i : i + 1])
        alone, count = solve(mine, X[i : i + 1], grids.linear(60))
        np.testing.assert_allclose(alone, together[i : i + 1], atol=1e-6)
        assert count[0] == counts[i]


def test_it_stops_where_the_grid_does_and_never_sees_0():
    grid = np.float32([0.9, 0.6, 0.3])
    exact = solution(np.float64(X), np.float64(grid[0]), np.float64(grid[-1]))
    np.testing.assert_allclose(adaptive(velocity, X, grid), exact, atol=0.01)
    logs = lambda x, t: x + jnp.log(t)[:, None]
    assert jnp.isfinite(adaptive(logs, X, grids.linear(20))).all()


def test_what_is_kept_ends_as_it_is():
    keep = jnp.array([True, False, False])
    after = lambda x, t, i: jnp.where(keep, jnp.reshape(t, (-1, 1)), x)
    x = adaptive(velocity, X, grids.released(20, 3.0), after=after)
    np.testing.assert_array_equal(x[:, 0], 0)
    free = adaptive(velocity, X, grids.released(20, 3.0))
    np.testing.assert_allclose(x[:, 1:], free[:, 1:], atol=0.02)


def test_it_has_no_trajectory():
    with pytest.raises(UserError, match="adaptive has no trajectory"):
        adaptive(velocity, X, grids.linear(4), trajectory=True)
