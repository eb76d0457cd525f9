"""Every formulation against the paper's closed forms, in float64, and on Gaussians."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd3_jax.diffusion import grids, timesteps
from sd3_jax.diffusion.formulations import PATHS, make
from sd3_jax.diffusion.losses import loss_at
from sd3_jax.diffusion.multistep_weights import MULTISTEP
from sd3_jax.diffusion.paths import expand
from sd3_jax.diffusion.solvers import SOLVERS, draws
from sd3_jax.diffusion.stochastic_solvers import STOCHASTIC
from sd3_jax.diffusion.variants import VARIANTS

EACH = pytest.mark.parametrize("path", PATHS)
FLOW = dict(mean=0.0, std=1.0, mode_scale=1.29, shift=1.0)


def variant(name):
    flow = FLOW | VARIANTS[name]
    return make(flow.pop("path"), timesteps.make(flow.pop("density"), **flow))


def network(x, time):
    """Some function of both."""
    return jnp.sin(3 * x + 0.2) + 0.3 * jnp.cos(2 * expand(time, x)) * x


def test_the_variants_are_the_papers_61():
    assert len(VARIANTS) == 61
    of = lambda start: sum(name.startswith(start) for name in VARIANTS)
    assert of("rf/lognorm") == 30 and of("rf/mode") + 1 == 9 and of("edm(") == 15
    for name in (
        *("rf/lognorm(0.00,1.00)", "rf/lognorm(-0.50,1.00)", "rf/mode(1.29)"),
        *("rf/mode(1.75)", "rf/cosmap", "edm(-1.20,1.20)", "edm(0.00,0.60)"),
        *("eps/linear", "v/linear", "eps/cos", "v/cos", "edm/rf", "edm/cos", "rf"),
    ):
        assert name in VARIANTS


def log_snr(t):
    return 2 * jnp.log((1 - t) / t)


def weights(path):
    """w (sec. 1.2 of the paper's family) of the log-SNR, the density of the log-SNR
    that `sample` makes, and the constant between its loss and the paper's L_w."""
    sech = lambda x: 1 / jnp.cosh(x)
    normal = lambda x, m, s: (
        jnp.exp(-(((x - m) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
    )
    # Each schedule's own u, uniform: p(lambda) = |du / dlambda|.
    cos = lambda l: sech(l / 2) / (2 * math.pi)
    return {
        "rf": (lambda l: jnp.exp(-l / 2), lambda l: sech(l / 4) ** 2 / 8, 1.0),
        "eps/cos": (lambda l: sech(l / 2), cos, math.pi),
        "v/cos": (lambda l: jnp.exp(-l / 2), cos, math.pi / 2),
        "edm": (
            lambda l: normal(l, 2.4, 2.4) * (jnp.exp(-l) + 0.25),
            lambda l: normal(l, 2.4, 2.4),
            1 / 8,
        ),
    }[path]


@pytest.mark.parametrize("path", ["rf", "edm", "eps/cos", "v/cos"])
def test_the_loss_is_the_papers_closed_form(path, key):
    """L_w = -1/2 E_{t ~ U} w lambda' |eps_theta - eps|^2 = 1/2 int w |.|^2 dlambda,
    so that with lambda ~ p it is E w / (2 p) |eps_theta - eps|^2."""
    with jax.enable_x64():
        form = make(path, timesteps.Uniform())
        x0 = jax.random.normal(key, (64, 6), jnp.float64)
        t = jnp.linspace(0.02, 0.98, 64, dtype=jnp.float64)
        _, aux = loss_at(key, form.answer(network), x0, t, path=form)
        noise = jax.random.normal(key, x0.shape, jnp.float32)
        xt = form.interpolate(x0, noise, t)
        v = form.velocity(network)(xt, t)
        predicted = xt + (1 - expand(t, xt)) * v  # eps_theta, of rectified flow's x_t
        error = jnp.mean((predicted - noise) ** 2, axis=1)
        weight, density, constant = weights(path)
        lambda_ = log_snr(t)
        closed = weight(lambda_) / (2 * density(lambda_)) * error
        np.testing.assert_allclose(constant * aux["error"], closed, rtol=1e-6)


@pytest.mark.parametrize("path", ["eps/linear", "v/linear"])
def test_the_linear_schedules_have_unit_weight(path, key):
    """On the network's own target, at its own z = a x0 + b noise, a^2 + b^2 = 1."""
    with jax.enable_x64():
        form = make(path, timesteps.Linear())
        x0 = jax.random.normal(key, (64, 6), jnp.float64)
        noise = jax.random.normal(key, x0.shape, jnp.float32)
        beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        steps = np.arange(64) * 15
        a = np.sqrt(np.cumprod(1 - beta))[steps]
        b = np.sqrt(1 - a**2)
        _, aux = loss_at(
            key, form.answer(network), x0, jnp.array(b / (a + b)), path=form
        )
        z = a[:, None] * x0 + b[:, None] * noise
        target = noise if path[0] == "e" else a[:, None] * noise - b[:, None] * x0
        error = (network(z, jnp.array(steps / 999)) - target) ** 2
        np.testing.assert_allclose(aux["error"], error.mean(1), rtol=1e-5)


def test_edms_input_and_output_are_karras(key):
    """Table 1 of Karras et al. 2022, in z = x0 + sigma noise."""
    with jax.enable_x64():
        form = make("edm", timesteps.LogitNormal(-1.2, 1.2))
        sigma = jnp.exp(jnp.linspace(-6.0, 4.3, 64, dtype=jnp.float64))
        t = sigma / (1 + sigma)
        z = jax.random.normal(key, (64, 6), jnp.float64) * (1 + sigma[:, None])
        s, total = sigma[:, None], jnp.sqrt(sigma[:, None] ** 2 + 0.25)
        answer = network(z / total, jnp.log(sigma) / 4)
        denoised = 0.25 / total**2 * z + s * 0.5 / total * answer
        slope = (z - denoised) / s  # the noise that is left
        v = form.velocity(network)((1 - t)[:, None] * z, t)
        np.testing.assert_allclose(v, slope - denoised, rtol=1e-5, atol=1e-6)


@EACH
def test_the_right_answer_gives_the_right_velocity(path, key):
    form = make(path, timesteps.Uniform())
    x0, noise = jax.random.normal(key, (2, 16, 5))
    t = jnp.linspace(0.01, 0.9, 16)
    xt = form.interpolate(x0, noise, t)
    v = form.velocity(lambda x, time: form.target(x0, noise, t))(xt, t)
    chex.assert_trees_all_close(v, noise - x0, atol=2e-5)
    loss, _ = loss_at(
        key, lambda xt, t: form.target(x0, noise, t) + 1, x0, t, path=form
    )
    assert jnp.isfinite(loss)


@EACH
def test_the_clock_rises_and_all_is_finite_to_the_last_t(path):
    form = make(path, timesteps.Uniform())
    t = jnp.append(jnp.linspace(1e-3, 0.99, 50), 1.0) * form.last
    time = form.clock(t)
    assert (jnp.diff(time) >= 0).all() and time[-1] > time[0]
    x = jnp.ones((51, 2))
    chex.assert_tree_all_finite(form.velocity(network)(x, t))
    assert form.grid(grids.linear(5))[0] == np.float32(form.last)


MEAN = np.array([0.3, -0.2])
COVARIANCE = np.array([[0.30, 0.12], [0.12, 0.15]])


def ideal(form):
    """The best answer a network can give on N(MEAN, COVARIANCE): its target's
    conditional mean, which is linear in x0's and noise's."""

    def answer(xt, t):
        s = t[0]  # all are at the same
        gain = jnp.linalg.inv((1 - s) ** 2 * COVARIANCE + s**2 * np.eye(2))
        off = (xt - (1 - s) * MEAN) @ gain
        x0, noise = MEAN + (1 - s) * off @ COVARIANCE, s * off
        return form.target(x0, noise, t)

    return lambda xt, t: form.prediction.velocity(xt, answer(xt, t), t)


# Those that one loop runs differ in weights alone: two paths, with last = 1 and < 1.
SAMPLED = [
    (path, solver)
    for path in PATHS
    for solver in sorted({*SOLVERS} - {"lcm", "adaptive"})
    if path in ("rf", "eps/linear") or solver not in {*MULTISTEP, *STOCHASTIC}
]


@pytest.mark.parametrize("path, solver", SAMPLED)
def test_gaussian_data_is_sampled_with_no_training(path, solver, key):
    form = make(path, timesteps.Uniform())
    velocity = ideal(form)
    first_order = solver in ("euler", "euler_ancestral")
    grid = form.grid(grids.linear(400 if first_order else 150))
    noise = jax.random.normal(key, (20_000, 2))
    noise = (noise - noise.mean(0)) @ np.linalg.inv(
        np.linalg.cholesky(np.cov(noise.T)).T
    )
    options, allowed = {}, 0.01
    if draws(SOLVERS[solver]):
        new = lambda i: jax.random.normal(jax.random.fold_in(key, i), noise.shape)
        options, allowed = dict(draw=new), 0.02  # of 20,000 samples
    x = SOLVERS[solver](velocity, form.spread * noise, grid, **options)
    # Where sampling starts there is still some signal, which pure noise has not
    # (Lin et al. 2023); that much of the mean and of the deviation is lost.
    lost = 1 - form.last
    np.testing.assert_allclose(x.mean(0), MEAN, atol=allowed + lost * 0.5)
    np.testing.assert_allclose(np.cov(x.T), COVARIANCE, atol=allowed + lost * 0.1)


@functools.cache
def training(path):
    """run(key, t (20, 256)): losses of 20 steps at these times, and samples then; one
    program for all variants of a path."""
    form, tx = make(path, timesteps.Uniform()), optax.adam(1e-2)
    data = MEAN + jax.random.normal(jax.random.key(5), (256, 2)) * 0.5

    def net(w, x, time):
        h = jnp.concatenate([x, time[:, None], time[:, None] ** 2], axis=1)
        return jnp.tanh(h @ w["in"]) @ w["out"]

    def run(key, t):
        first, last, *keys = jax.random.split(key, 22)

        def step(carry, drawn):
            (w, state), (key, t) = carry, drawn
            answer = lambda w: form.answer(lambda x, time: net(w, x, time))
            loss = lambda w: loss_at(key, answer(w), data, t, path=form)[0]
            value, grads = jax.value_and_grad(loss)(w)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(w, updates), state), value

        w = {"in": jax.random.normal(first, (4, 32)) / 2, "out": jnp.zeros((32, 2))}
        (w, _), losses = jax.lax.scan(step, (w, tx.init(w)), (jnp.stack(keys), t))
        v = form.velocity(lambda x, time: net(w, x, time))
        noise = form.spread * jax.random.normal(last, (64, 2))
        return losses, SOLVERS["euler"](v, noise, form.grid(grids.linear(8)))

    return jax.jit(run)


def test_each_of_the_61_trains_20_steps_and_samples(key):
    seen = set()
    for name, flow in VARIANTS.items():
        t = variant(name).density.sample(key, (20, 256))
        losses, x = training(flow["path"])(key, t)
        chex.assert_tree_all_finite((losses, x))
        assert losses[-5:].mean() < losses[:5].mean(), name
        # A network that knows little is asked about noise alone, near t = 1.
        assert jnp.abs(x).max() < (1e3 if name == "eps/cos" else 20), name
        seen.add(float(losses[-1]))
    # rf/mode(0) is rf and so is not there: no two are the same
    assert len(seen) == 61


def test_a_variants_config_makes_it():
    assert variant("rf/mode(1.29)").density.density.scale == pytest.approx(
        1.2917, abs=1e-4
    )
    assert variant("edm(-1.20,1.20)").density.density == timesteps.LogitNormal(
        -1.2, 1.2
    )
    assert variant("eps/linear").last == pytest.approx(0.936, abs=1e-3)
