import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax.diffusion import guidance_schedules
from sd3_jax.diffusion.guidance import Schedule, Weakened, guided
from sd3_jax.diffusion.guidance_methods import METHODS
from sd3_jax.diffusion.solvers import SOLVERS, draws, euler


class Recorder:
    """velocity(x, t, cond) = cond["w"] x, which keeps the batch sizes it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, cond):
        self.batches.append((len(x), len(t), len(cond["w"])))
        return cond["w"][:, None, None] * x


@pytest.fixture
def x(key):
    return jax.random.normal(key, (3, 8, 8))


cond, uncond = {"w": jnp.array([1.0, 2.0, 3.0])}, {"w": jnp.array([0.5, 0.5, 4.0])}


def test_extrapolates_from_uncond_through_cond(x):
    velocity = Recorder()
    v = guided(velocity, cond, uncond, scale=5.0)(x, jnp.full(3, 0.5))
    w = uncond["w"] + 5 * (cond["w"] - uncond["w"])
    chex.assert_trees_all_close(v, w[:, None, None] * x, rtol=1e-5)
    assert velocity.batches == [(6, 6, 6)]


@pytest.mark.parametrize("scale", [1, 1.0, 0.999, 0.5, 0.0, -3.0])
def test_a_scale_of_1_or_less_costs_one_pass_and_no_uncond(x, scale):
    velocity, never = Recorder(), Weakened(None, 2.8, (0.0, 1.0))
    for skip in (None, never):  # nor are layers skipped, as in diffusers
        v = guided(velocity, cond, None, scale=scale, weakened=skip)(
            x, jnp.full(3, 0.5)
        )
        chex.assert_trees_all_equal(v, cond["w"][:, None, None] * x)
    assert velocity.batches == [(3, 3, 3)] * 2


def test_outside_the_interval_is_the_conditional(x):
    inside = guided(Recorder(), cond, uncond, scale=5.0)
    v = guided(Recorder(), cond, uncond, scale=5.0, interval=(0.25, 0.5))
    for t in (0.25, 0.4, 0.5):
        t = jnp.full(3, t)
        chex.assert_trees_all_equal(v(x, t), inside(x, t))
    for t in (0.24, 0.51):
        chex.assert_trees_all_equal(v(x, jnp.full(3, t)), cond["w"][:, None, None] * x)


def test_the_interval_is_decided_for_each_example(x):
    v = guided(Recorder(), cond, uncond, scale=5.0, interval=(0.0, 0.5))
    mixed = v(x, jnp.array([0.1, 0.9, 0.1]))
    chex.assert_trees_all_equal(mixed[1], 2.0 * x[1])
    chex.assert_trees_all_equal(mixed[::2], v(x, jnp.full(3, 0.1))[::2])


def test_rescale_keeps_the_std_of_the_conditional(x):
    t = jnp.full(3, 0.5)
    std = lambda rescale: jnp.std(
        guided(Recorder(), cond, uncond, scale=5.0, rescale=rescale)(x, t), axis=(1, 2)
    )
    kept, halfway, free = std(1.0), std(0.5), std(0.0)
    chex.assert_trees_all_close(kept, cond["w"] * jnp.std(x, axis=(1, 2)), rtol=1e-5)
    chex.assert_trees_all_close(halfway, (kept + free) / 2, rtol=1e-5)
    assert (jnp.abs(free - kept) > 0.1).all()


def test_rescale_of_an_untrained_network_is_0(x):
    v = guided(lambda x, t, cond: 0 * x, cond, uncond, scale=5.0, rescale=0.7)
    chex.assert_trees_all_equal(v(x, jnp.full(3, 0.5)), jnp.zeros_like(x))


def test_bfloat16_networks_are_combined_in_float32(x):
    t = jnp.full(3, 0.5)
    velocity = lambda x, t, cond: Recorder()(x, t, cond).astype(jnp.bfloat16)
    v = guided(velocity, cond, uncond, scale=5.0)(x, t)
    v_u, v_c = (velocity(x, t, c).astype(jnp.float32) for c in (uncond, cond))
    chex.assert_trees_all_equal(v, v_u + 5 * (v_c - v_u))


def test_guidance_and_solver_trace_the_network_once(x):
    velocity = Recorder()
    v = guided(velocity, cond, uncond, scale=5.0, interval=(0.2, 0.8), rescale=0.5)
    jax.jit(lambda x: euler(v, x, jnp.linspace(1, 0, 11))).lower(x)
    assert velocity.batches == [(6, 6, 6)]


@pytest.mark.parametrize(
    "option, message",
    [
        (dict(scale=float("nan")), "scale: got nan, expected a finite number"),
        (dict(scale=float("inf")), "scale: got inf, expected a finite number"),
        (dict(scale=-float("inf")), "scale: got -inf, expected a finite number"),
        (
            dict(scale=0.0, rescale=2.0),
            "rescale: got 2.0, expected a number in \\[0, 1\\]",
        ),
        (
            dict(interval=(0.5, 0.2)),
            "interval: got \\(0.5, 0.2\\), expected 0 <= start .*",
        ),
        (
            dict(interval=(0.0, 1.5)),
            "interval: got \\(0.0, 1.5\\), expected 0 <= start .*",
        ),
        (dict(rescale=1.5), "rescale: got 1.5, expected a number in \\[0, 1\\]"),
    ],
)
def test_bad_options_are_explained(option, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        guided(Recorder(), cond, uncond, **{"scale": 5.0} | option)


GRID = np.append(np.linspace(1, 0.1, 6), 0).astype(np.float32)


def by_grid(method, solver=euler, steps=None, **options):
    """A run of a method along GRID, of a velocity that bends."""
    velocity = lambda x, t, cond: jnp.sin(Recorder()(x, t, cond)) + t[:, None, None] * x
    options = dict(scale=4.0, grid=GRID) | options
    v = guided(velocity, cond, uncond, method=method, **options)
    x = jax.random.normal(jax.random.key(1), (3, 8, 8))
    return solver(v, x, GRID, steps=steps)


def test_cfg_pp_renoises_with_the_unconditional_noise():
    """The paper's update, of x0 and noise, against Euler's of our velocity."""
    velocity = lambda x, t, c: jnp.sin(c["w"][:, None, None] * x) + t * x
    x = jax.random.normal(jax.random.key(1), (3, 8, 8))
    for t, t_next in zip(GRID[:-1], GRID[1:]):
        v_c, v_u = velocity(x, t, cond), velocity(x, t, uncond)
        x0, noise = x - t * (v_u + 0.6 * (v_c - v_u)), x + (1 - t) * v_u
        x = (1 - t_next) * x0 + t_next * noise
    ours = by_grid("cfg_pp", scale=0.6)
    chex.assert_trees_all_close(ours, x, rtol=1e-4, atol=1e-5)
    padded = np.pad(GRID, (0, 5))
    same = by_grid("cfg_pp", scale=0.6, grid=padded)
    chex.assert_trees_all_close(same, ours, rtol=1e-6)


def test_apg_on_x0_is_the_papers_algorithm(x):
    """Algorithm 1 in numpy, two steps with momentum."""
    w_c, w_u = (np.asarray(c["w"])[:, None, None] for c in (cond, uncond))
    v = guided(
        Recorder(),
        cond,
        uncond,
        scale=4.0,
        method="apg_x0",
        options=dict(eta=0.2, momentum=-0.5, threshold=3.0),
    )
    x, average = np.asarray(x), 0.0
    ours = euler(v, jnp.asarray(x), GRID[1:4])
    for t, t_next in zip(GRID[1:3], GRID[2:4]):
        cond_x0, uncond_x0 = x - t * w_c * x, x - t * w_u * x
        diff = average = (cond_x0 - uncond_x0) - 0.5 * average
        norm = np.sqrt((diff**2).sum((1, 2), keepdims=True))
        diff = diff * np.minimum(1, 3.0 / norm)
        unit = cond_x0 / np.sqrt((cond_x0**2).sum((1, 2), keepdims=True))
        parallel = (diff * unit).sum((1, 2), keepdims=True) * unit
        x0 = cond_x0 + 3.0 * (diff - parallel + 0.2 * parallel)
        x = x + (t_next - t) * (x - x0) / t
    chex.assert_trees_all_close(ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "solver", [x for x in SOLVERS if x != "adaptive" and not draws(SOLVERS[x])]
)
def test_every_solver_carries_the_momentum(solver):
    run = lambda m, **more: by_grid(
        "apg", SOLVERS[solver], options=dict(momentum=m), **more
    )
    assert not np.allclose(run(0.0), run(0.5), rtol=1e-3)
    # As a loop whose number of steps is data, in which no tracer may leak.
    counted = run(0.5, steps=jnp.int32(len(GRID) - 1))
    chex.assert_trees_all_close(counted, run(0.5), rtol=1e-5, atol=1e-6)


def test_the_state_of_guidance_needs_a_loop(x):
    v = guided(Recorder(), cond, uncond, scale=4.0, method="apg")
    with pytest.raises(ValueError, match="does not carry"):
        v(x, jnp.full(3, 0.5))


def test_zero_is_a_velocity_for_every_method(x):
    """Untrained networks: no division by their norms."""
    for method in METHODS:
        zero = lambda x, t, cond: 0 * x
        options = dict(scale=0.5 if method == "cfg_pp" else 4.0, rescale=0.5)
        v = guided(zero, cond, uncond, method=method, grid=GRID, weak=zero, **options)
        chex.assert_trees_all_equal(euler(v, x, GRID), x)


def test_a_schedule_is_the_scale_at_each_time(x):
    scales = guidance_schedules.scales([(1.0, 0.5), (0.0, 2.0)], 5.0, GRID)
    np.testing.assert_allclose(scales, 1 + 4 * (2 - 1.5 * GRID), rtol=1e-6)
    v = guided(Recorder(), cond, uncond, scale=Schedule(GRID, scales))
    padded = Schedule(np.pad(GRID, (0, 3)), np.pad(scales, (0, 3), mode="edge"))
    also = guided(Recorder(), cond, uncond, scale=padded)
    for t, scale in zip(GRID, scales):
        t = jnp.full(3, t)
        plain = guided(Recorder(), cond, uncond, scale=float(scale))(x, t)
        chex.assert_trees_all_close(v(x, t), plain, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(also(x, t), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_rise_and_keep_the_mean(name):
    t = np.linspace(1, 0, 1001)
    scales = guidance_schedules.scales(name, 5.0, t)
    assert (np.diff(scales) >= 0).all()
    np.testing.assert_allclose(scales.mean(), 5.0, rtol=1e-3)
    assert guidance_schedules.parsed("1:0.5, 0.25:2") == [(1.0, 0.5), (0.25, 2.0)]
    for wrong in ("1:2:3", "2:1", "0.5:1,0.5:2", "1:nan", "lineal"):
        with pytest.raises(ValueError, match="schedule: got"):
            guidance_schedules.parsed(wrong)


def test_a_method_that_reads_the_grid_wants_one():
    with pytest.raises(ValueError, match="grid: got None, expected that of the"):
        guided(Recorder(), cond, uncond, scale=4.0, method="cfg_zero")
    with pytest.raises(ValueError, match="nearest: tangential"):
        guided(Recorder(), cond, uncond, scale=4.0, method="tangentail")
