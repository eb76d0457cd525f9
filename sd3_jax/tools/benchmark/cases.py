"""Cases to time, as dictionaries that both sides read, and their seeded inputs.

Numpy only: the process that runs PyTorch imports this, and no jax with it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sd3_jax.errors import UserError, nearest

Spec = dict[str, Any]  # goes to the sides as JSON
KINDS = {  # by kind, the component that it runs and the words that it takes
    "forward": ("denoiser", ("side", "batch", "depth", "length", "unroll")),
    "train": ("denoiser", ("side", "batch", "depth", "length", "unroll", "remat")),
    "sample": ("denoiser", ("side", "batch", "depth", "length", "unroll", "steps")),
    "vae_encode": ("vae", ("side", "batch")),
    "vae_decode": ("vae", ("side", "batch")),
    "t5": ("t5", ("batch", "length")),
    "clip": ("clip_l", ("batch", "length")),
}
NEEDS = {  # modules of theirs
    "matmul": ("torch",),
    "t5": ("torch", "transformers"),
    "clip": ("torch", "transformers"),
}
DIFFUSERS = ("torch", "diffusers")  # what all others need
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}  # of the whole's norm
CHECKED_STEPS = 3  # of training, whose losses both sides must have
SCALING, SHIFT = 1.5305, 0.0609  # of SD3's autoencoder
FACTOR = 8  # pixels along a latent's side


def parse(text: str, defaults: Mapping[str, Any]) -> Spec:
    """ "train side=256 batch=4": a kind, and what differs from the defaults."""
    kind, *words = text.split() or [""]
    if kind not in KINDS:
        raise UserError(f'config.benchmark.cases: "{kind}"{nearest(kind, KINDS)}')
    spec = {"kind": kind, "name": " ".join([kind, *words]), **defaults}
    spec["component"], known = KINDS[kind]
    for word in words:
        key, _, value = word.partition("=")
        if key not in known:
            raise UserError(
                f'config.benchmark.cases: "{text}": {key}{nearest(key, known)}'
            )
        spec[key] = value if key == "remat" else int(value) if value.isdecimal() else 0
        if not spec[key]:
            raise UserError(
                f'config.benchmark.cases: "{text}": expected {key}=NUMBER, 1 or more'
            )
    # `side` is in pixels, height and width in latents.
    if side := spec.pop("side", 0):
        unit = FACTOR * spec["patch"]
        if side % unit:
            raise UserError(
                f'config.benchmark.cases: "{text}": side = {side}: expected a multiple'
                " of"
                f" {unit}"
            )
        spec["height"] = spec["width"] = side // FACTOR
    return spec


def rectangle(tokens: int, patch: int) -> tuple[int, int]:
    """The sides, in latents, of the squarest picture of so many tokens."""
    # The largest divisor up to the root gives the squarest picture; 1 always divides.
    rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return rows * patch, tokens // rows * patch


# --- inputs and outputs


def inputs(spec: Spec) -> dict[str, np.ndarray]:
    """The inputs of a case, equal on both sides: NHWC, t in (0, 1)."""
    # numpy on both sides: torch and jax draw different numbers from equal seeds.
    rng = np.random.default_rng(spec["seed"])
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    kind = spec["kind"]
    if kind == "matmul":
        n = spec["size"]
        return {"a": normal(n, n), "b": normal(n, n)}
    b, length = spec["batch"], spec.get("length")
    if kind in ("t5", "clip"):
        vocab = spec["config"]["vocab_size"]
        return {"ids": rng.integers(3, vocab, (b, length), dtype=np.int32)}
    h, w, config = spec["height"], spec["width"], spec["config"]
    if kind == "vae_encode":
        shape = (b, FACTOR * h, FACTOR * w, 3)
        return {"image": rng.random(shape, np.float32)}
    if kind == "vae_decode":
        return {"latents": normal(b, h, w, config["latent_channels"])}
    arrays = {
        "latents": normal(b, h, w, config["in_channels"]),
        "t": np.linspace(0.05, 0.95, b, dtype=np.float32),
        "context": normal(b, length, config["joint_attention_dim"]),
        "pooled": normal(b, config["pooled_projection_dim"]),
    }
    if kind == "train":
        arrays["noise"] = normal(*arrays["latents"].shape)
    # The negative prompt's embeddings, for guidance.
    if kind == "sample":
        arrays |= {f"no_{k}": normal(*arrays[k].shape) for k in ("context", "pooled")}
    return arrays


def gap(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> tuple[float, str]:
    """The largest |ours - theirs| / |theirs| among the outputs, and its name."""
    if set(ours) != set(theirs):
        raise ValueError(f"ours gives {sorted(ours)}, theirs {sorted(theirs)}")
    errors = []
    for name, b in theirs.items():
        a, b = (np.asarray(x, np.float64) for x in (ours[name], b))
        if a.shape != b.shape:
            return math.inf, f"{name}, of shape {a.shape} and {b.shape}"
        # Relative to the whole array's norm: single elements near 0 say nothing.
        error = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
        errors.append((error if math.isfinite(error) else math.inf, name))
    return max(errors)


def weight(
    rng: np.random.Generator, name: str, shape: Sequence[int], block: np.ndarray
) -> np.ndarray:
    """A random tensor of a diffusers file, of a size that keeps activations near 1.

    Its numbers repeat after a million, because drawing billions takes minutes.
    """
    start = int(rng.integers(block.size))
    x = np.resize(np.roll(block, start), shape)
    if len(shape) > 1:
        # 1 / sqrt(fan in), so that activations neither grow nor vanish with depth.
        return x * np.float32(math.prod(shape[1:]) ** -0.5)
    return 0.1 * x if name.endswith("bias") else 1 + 0.1 * x


# Configurations as diffusers and transformers have them; the denoiser's is that of
# weights.components


def vae(*, channels: Sequence[int], layers: int, latent_channels: int) -> dict:
    levels = len(channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": SCALING,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def t5(*, depth: int, width: int, num_heads: int, mlp: int, vocab: int, **_) -> dict:
    return {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": 64,
        "d_ff": mlp,
        "num_layers": depth,
        "num_heads": num_heads,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    }


def clip(*, depth: int, width: int, num_heads: int, mlp: int, vocab: int, **_) -> dict:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "projection_dim": width,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
