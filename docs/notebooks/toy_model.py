"""A toy SD3 for the notebooks: the real classes, small, trained for 300 steps.

It is trained on a circle or square in one of three colours; in so few steps it learns
the colours and not the shapes. Its text encoder is random.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sd3_jax
from sd3_jax import tree
from sd3_jax.data import tokenizers
from sd3_jax.diffusion.losses import flow_loss
from sd3_jax.diffusion.paths import RF
from sd3_jax.diffusion.timesteps import LogitNormal
from sd3_jax.distributed.sharding import make_mesh
from sd3_jax.models.clip import ClipText
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.vae import VAE
from sd3_jax.sampling.latents import TO_RGB
from sd3_jax.weights.components import denoiser_config

SIDE = 12  # of the latents; images are twice as large
TEXT = 1  # tokens in the place of T5's; the toy has no T5
COLOURS = dict(red=(200, 40, 40), green=(40, 150, 70), blue=(50, 80, 200))
SHAPES = ("circle", "square")
PROMPTS = [
    f"a {colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)
]
PAPER = 235


def train(steps: int = 300, batch: int = 32) -> sd3_jax.Bundle:
    """Train the denoiser and the decoder, and return a bundle as `load` does."""
    bundle = untrained()
    context, pooled = bundle.encode_prompts([*PROMPTS, ""], TEXT)
    denoiser, vae = bundle.modules["denoiser"], bundle.modules["vae"]
    schedule = optax.cosine_decay_schedule(2e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    params = {k: bundle.variables[k]["params"] for k in ("denoiser", "vae")}

    def loss(params, key, images, labels):
        x0 = latents_of(images)
        velocity = lambda xt, t: denoiser.apply(
            {"params": params["denoiser"]}, xt, t, context[labels], pooled[labels]
        )
        flow, _ = flow_loss(key, velocity, x0, density=LogitNormal(), path=RF)
        decoded = vae.apply({"params": params["vae"]}, x0, method="decode")
        return flow + jnp.mean(jnp.square(decoded - images))

    @jax.jit
    def step(params, state, key, images, labels):
        grads = jax.grad(loss)(params, key, images, labels)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state, random = optimizer.init(params), np.random.default_rng(0)
    for i in range(steps):
        labels = random.integers(len(PROMPTS), size=batch)
        images = np.stack([draw(PROMPTS[label], random) for label in labels])
        labels[random.random(batch) < 0.1] = len(PROMPTS)  # the empty prompt
        key = jax.random.fold_in(jax.random.key(1), i)
        params, state = step(params, state, key, images, labels)
    for name, values in params.items():
        bundle.variables[name]["params"] = values
    return bundle


def untrained() -> sd3_jax.Bundle:
    """The modules with random weights."""
    sizes = dict(depth=2, width=64, num_heads=2)
    denoiser = MMDiT(
        **sizes, channels=16, pos_size=SIDE, dtype=jnp.float32, remat="none"
    )
    vae = VAE(channels=(16, 16), layers=0, groups=4, mid_attention=False)
    vocabulary = tokenizers.packaged_clip("clip_l")
    clip = ClipText(
        **dict(vocab=len(vocabulary), length=77, depth=2, width=64, num_heads=2),
        **dict(mlp=128, activation="quick_gelu", projection=64, dtype=jnp.float32),
    )
    modules = dict(denoiser=denoiser, vae=vae, clip_l=clip)
    text = jnp.zeros((1, 1, 64)), jnp.zeros((1, 64))
    examples = dict(
        denoiser=(jnp.zeros((1, SIDE, SIDE, 16)), jnp.zeros(1), *text),
        vae=(jnp.zeros((1, 4, 4, 3)),),
        clip_l=(jnp.zeros((1, 77), jnp.int32),),
    )
    init = lambda name: jax.jit(modules[name].init)(jax.random.key(0), *examples[name])
    configs = dict(
        denoiser=denoiser_config(
            denoiser, sample_size=SIDE, context_dim=64, pooled_dim=64
        ),
        vae=dict(scaling_factor=1.0, shift_factor=0.0),
        clip_l=dict(max_position_embeddings=77, num_hidden_layers=2),
    )
    return sd3_jax.Bundle(
        modules,
        {name: tree.unbox(init(name)) for name in modules},
        configs,
        {"clip_l": vocabulary},
        make_mesh(devices=jax.devices()[:1]),
        "float32",
        "the toy model",
    )


def latents_of(images):
    """Latents (b, h/2, w/2, 16) whose preview is the image (b, h, w, 3)."""
    b, h, w, _ = images.shape
    small = images.reshape(b, h // 2, 2, w // 2, 2, 3).mean((2, 4))
    return small @ jnp.linalg.pinv(jnp.array(TO_RGB))


def draw(prompt: str, random: np.random.Generator) -> np.ndarray:
    """A picture (h, w, 3) in [-1, 1] of a prompt, near the middle of the canvas."""
    _, colour, shape = prompt.split()
    side = 2 * SIDE
    radius = random.uniform(0.22, 0.3) * side
    centre = side * random.uniform(0.45, 0.55, (2, 1, 1))
    y, x = np.mgrid[:side, :side] - centre
    distance = np.hypot(x, y) if shape == "circle" else 1.1 * np.maximum(abs(x), abs(y))
    cover = np.clip(radius - distance + 0.5, 0, 1)[..., None]  # a smooth edge
    pixels = PAPER + cover * (np.array(COLOURS[colour]) - PAPER)
    return (pixels / 127.5 - 1).astype(np.float32)
