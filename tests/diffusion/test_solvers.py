import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax.diffusion import grids
from sd3_jax.diffusion.solvers import (
    SOLVERS,
    dpmpp_2m,
    draws,
    euler,
    heun,
    lcm,
    of_program,
    same_program,
)

ODE = {name: solver for name, solver in SOLVERS.items() if not draws(solver)}
ON_GRID = {name: solver for name, solver in ODE.items() if name != "adaptive"}
each = pytest.mark.parametrize("solver", ODE.values(), ids=ODE)
each_on_grid = pytest.mark.parametrize("solver", ON_GRID.values(), ids=ON_GRID)
STEPS = [8, 16, 32, 64]


def gaussian(t, mean=0.7, std=0.3):
    """The velocity of data N(mean, std^2), and where it takes x(1) = z by time t."""
    width = lambda t: jnp.sqrt(((1 - t) * std) ** 2 + t**2)
    rate = lambda t: (t - (1 - t) * std**2) / width(t) ** 2  # of log width
    v = lambda x, t: -mean + rate(t)[:, None] * (x - (1 - t)[:, None] * mean)
    return v, lambda z: (1 - t) * mean + width(t) * z


def exponential(t, rate=-1.5):
    """The same for v = rate x."""
    return lambda x, t: rate * x, lambda z: z * np.exp(rate * (t - 1))


def order(solver, problem, end, grid):
    """The slope of log error over log steps."""
    z = jnp.linspace(-2, 2, 6).reshape(3, 2)
    velocity, exact = problem(end)
    errors = [jnp.abs(solver(velocity, z, grid(n)) - exact(z)).max() for n in STEPS]
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


@pytest.mark.parametrize("problem", [gaussian, exponential])
@pytest.mark.parametrize("solver, expected", [(euler, 1), (heun, 2)])
def test_error_falls_at_the_order(solver, expected, problem):
    assert abs(order(solver, problem, 0.0, grids.linear) - expected) < 0.2


@pytest.mark.parametrize("problem", [gaussian, exponential])
def test_dpmpp_2m_is_of_second_order_in_log_t(problem):
    grid = lambda n: np.geomspace(1, 0.3, n + 1).astype(np.float32)
    assert abs(order(dpmpp_2m, problem, 0.3, grid) - 2) < 0.2


@each
def test_straight_lines_are_exact_in_any_number_of_steps(solver, key):
    x0, noise = jax.random.normal(key, (2, 3, 4, 4, 2))
    velocity = lambda x, t: noise - x0
    for grid in (grids.linear(1), grids.released(7, 3.0)):
        chex.assert_trees_all_close(solver(velocity, noise, grid), x0, atol=2e-6)


def official_dpmpp_2m(velocity, x, sigmas):
    """sample_dpmpp_2m of Stability-AI/sd3.5 sd3_impls.py, in numpy float64."""
    old = None
    for i in range(len(sigmas) - 1):
        denoised = x - sigmas[i] * velocity(x, np.full(len(x), sigmas[i]))
        t = -np.log(sigmas[i])
        if sigmas[i + 1] == 0:
            x, old = denoised, denoised  # the limit: sigma_next / sigma = 0
            continue
        t_next = -np.log(sigmas[i + 1])
        h = t_next - t
        d = denoised
        if old is not None:
            r = (t + np.log(sigmas[i - 1])) / h
            d = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x = sigmas[i + 1] / sigmas[i] * x - np.expm1(-h) * d
        old = denoised
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 28])
@pytest.mark.parametrize("start", [0, 1])  # 1: image to image, t < 1 at the start
def test_dpmpp_2m_is_the_official_one(steps, start, key):
    velocity = lambda x, t: jnp.sin(3 * x + t[:, None]) + 0.5 * x
    in_numpy = lambda x, t: np.sin(3 * x + t[:, None]) + 0.5 * x
    x = jax.random.normal(key, (4, 5))
    grid = grids.released(steps + start, 3.0)[start:]
    theirs = official_dpmpp_2m(in_numpy, np.float64(x), np.float64(grid))
    np.testing.assert_allclose(dpmpp_2m(velocity, x, grid), theirs, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_heun_is_the_textbook_one_and_ends_with_euler(steps, key):
    velocity = lambda x, t: np.sin(3 * x + t)
    x = start = np.float64(jax.random.normal(key, (4, 5)))
    grid = grids.shifted(steps, 3.0)
    for t, t_next in zip(np.float64(grid[:-1]), np.float64(grid[1:])):
        v = velocity(x, t)
        v_next = velocity(x + (t_next - t) * v, t_next) if t_next > 0 else v
        x = x + (t_next - t) * (v + v_next) / 2
    in_jax = lambda x, t: jnp.sin(3 * x + t[:, None])
    ours = heun(in_jax, jnp.float32(start), grid)
    np.testing.assert_allclose(ours, x, atol=1e-5)


def test_lcm_meets_the_next_t_with_new_noise(key):
    """Where the network knows x0: every step has it, with noise of its own."""
    x0, start = jax.random.normal(key, (2, 2, 3))
    seen = []

    def velocity(x, t):
        seen.append((x, t[0]))
        return (x - x0) / t[:, None]

    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), x0.shape)
    grid = grids.released(4, 3.0)
    with jax.disable_jit():
        end = lcm(velocity, start, grid, draw=draw)
    np.testing.assert_allclose(end, x0, atol=1e-5)
    for i, (x, t) in enumerate(seen[1:]):
        np.testing.assert_allclose(x, (1 - t) * x0 + t * draw(i), atol=1e-5)


PROGRAMS = dict.fromkeys(same_program(name) for name in SOLVERS)


@pytest.mark.parametrize("names", PROGRAMS, ids=lambda names: names[0])
def test_one_program_serves_its_solvers_on_any_grid(names, key):
    """The bits are those of a program of that many steps at XLA's usual optimization.

    At that of the tests, the last bit differs where XLA fuses this cheap velocity.
    """
    velocity = lambda x, t: jnp.sin(3 * x + t[:, None]) + 0.5 * x
    options = {}
    if draws(SOLVERS[names[0]]):
        fold = lambda i: jax.random.normal(jax.random.fold_in(key, i), (4, 5))
        options["draw"] = fold
    x = jax.random.normal(key, (4, 5))

    @jax.jit
    def shared(x, grid, steps, number):
        run = of_program(names, number)
        return run(velocity, x, grid, steps=steps, **options)

    for number, name in enumerate(names):
        solver = functools.partial(SOLVERS[name], velocity, **options)
        alone = jax.jit(solver)
        for steps in (1, 2, 3, 28):
            for grid in (grids.linear(steps), grids.flow(steps, 3.0)):
                padded = np.pad(grid, (0, 32 - steps))
                ours = shared(x, padded, np.int32(steps), np.int32(number))
                np.testing.assert_allclose(
                    ours, alone(x, grid), rtol=2e-6, atol=1e-6, err_msg=name
                )
    assert shared._cache_size() == 1


def test_a_trajectory_has_all_steps():
    with pytest.raises(ValueError, match="trajectory or steps"):
        euler(
            lambda x, t: x, jnp.ones((1, 1)), grids.linear(2), trajectory=True, steps=1
        )


@each
def test_nothing_is_evaluated_at_0(solver):
    velocity = lambda x, t: x + jnp.log(t)[:, None]
    chex.assert_tree_all_finite(solver(velocity, jnp.ones((2, 3)), grids.linear(5)))


@each_on_grid
def test_gradients_are_finite_and_right(solver):
    grid = grids.released(6, 3.0)
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)

    def end(a, grid):
        return solver(lambda x, t: jnp.tanh(a * x) + t[:, None], x, grid).sum()

    da, dgrid = jax.grad(end, argnums=(0, 1))(0.8, jnp.asarray(grid))
    chex.assert_tree_all_finite(dgrid)
    slope = (end(0.8 + 1e-2, grid) - end(0.8 - 1e-2, grid)) / 2e-2
    np.testing.assert_allclose(da, slope, rtol=2e-3, atol=2e-3)


@each
def test_the_program_does_not_grow_with_the_steps(solver):
    def program(steps):
        run = lambda x: solver(lambda x, t: jnp.sin(x), x, grids.linear(steps))
        return jax.jit(run).lower(jnp.ones((2, 3))).as_text().count("\n")

    assert program(4) == program(40)


@each
def test_velocity_sees_float32_and_a_t_for_each_example(solver):
    def velocity(x, t):
        chex.assert_shape((x, t), [(2, 3), (2,)])
        chex.assert_type((x, t), jnp.float32)
        return x.astype(jnp.bfloat16)

    x = solver(velocity, jnp.ones((2, 3), jnp.bfloat16), grids.linear(4))
    assert x.dtype == jnp.float32


@each_on_grid
def test_trajectory_runs_from_the_start_to_the_result(solver):
    run = lambda **kw: solver(lambda x, t: x, jnp.ones((2, 3)), grids.linear(5), **kw)
    xs = run(trajectory=True)
    chex.assert_shape(xs, (6, 2, 3))
    chex.assert_trees_all_equal(xs[0], jnp.ones((2, 3)))
    chex.assert_trees_all_close(xs[-1], run())
    assert (jnp.diff(xs, axis=0) < 0).all()
