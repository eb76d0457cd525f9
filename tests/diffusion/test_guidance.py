import chex
import jax
import jax.numpy as jnp
import pytest

from sd3_jax.diffusion.guidance import Schedule, Weakened, guided
from sd3_jax.diffusion.solvers import euler


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
