"""Checks a caller's arguments and turns them into the arrays that a program takes."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from sd3_jax.diffusion import grids, guidance
from sd3_jax.diffusion.guidance_methods import METHODS
from sd3_jax.diffusion.solvers import SOLVERS
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import argument_checks
from sd3_jax.sampling.adapters.adapter_bank import Sets
from sd3_jax.sampling.bundle import Bundle, Prompt
from sd3_jax.sampling.images import input_images
from sd3_jax.sampling.images.input_images import Pictures
from sd3_jax.sampling.text import prompt_tokens
from sd3_jax.sampling.text.prompts import Conditioning

log = logging.getLogger(__name__)
Text = str | Prompt
Texts = Text | Sequence[Text] | Conditioning


def listed(texts: Text | Sequence[Text], name: str = "prompts") -> list[Text]:
    # A Prompt is a NamedTuple, so a tuple to isinstance, but it is one prompt.
    several = isinstance(texts, list | tuple) and not isinstance(texts, Prompt)
    texts = list(texts) if several or hasattr(texts, "__array__") else [texts]
    for text in texts:
        if not isinstance(text, str | Prompt):
            raise UserError(
                f"{name}: {shown(repr(text))}: expected a text or a Prompt, a list of"
                " these, or the Conditioning that encode_prompts returns"
            )
    return texts


# --- sizes


def size(bundle: Bundle, height: int | None, width: int | None, image) -> tuple:
    """(h, w, c) of the latents; pixels are the image's, or those of the training."""
    denoiser = bundle.part("denoiser")
    # One patch of latents covers `unit` pixels, and the position table has pos_size
    # patches a side: both limits follow from the model, not from memory.
    unit = bundle.factor * denoiser.patch
    most = unit * denoiser.pos_size
    image_sides = None
    if image is not None:
        factor = 1 if image.shape[-1] == 3 else bundle.factor
        image_sides = [side * factor for side in image.shape[1:3]]
    # sample_size is in latents: 128 of them are the 1024 pixels of the released models.
    usual = bundle.configs["denoiser"].get("sample_size", 128) * bundle.factor
    if image_sides is not None:
        _require_sides(image_sides, unit, most)
    sides = []
    for i, (name, side) in enumerate((("height", height), ("width", width))):
        if side is None:
            side = usual if image_sides is None else image_sides[i]
        side = argument_checks.whole(name, side, 1, 2**16)
        if side != (near := _nearest(side, unit, most)):
            raise UserError(
                f"{name} {side}: expected a multiple of {unit}, at most {most}; the"
                f" nearest is {near}"
            )
        if image_sides is not None and side != image_sides[i]:
            raise UserError(
                f"{name} {side}: must equal that of the image, {image_sides[i]}"
            )
        sides.append(side // bundle.factor)
    return (*sides, denoiser.channels)


def _nearest(side: int, unit: int, most: int) -> int:
    """The nearest multiple of unit that the model takes."""
    return min(max(1, round(side / unit)) * unit, most)


def _require_sides(image_sides: list[int], unit: int, most: int) -> None:
    near = [_nearest(side, unit, most) for side in image_sides]
    if near != image_sides:
        height, width = image_sides
        raise UserError(
            f"image of {height} x {width} pixels: expected sides that are multiples"
            f" of {unit}, at most {most}: image.resize(({near[1]}, {near[0]})) of PIL"
        )


# --- texts


def encoded(
    bundle: Bundle,
    prompts: Texts,
    negative: Texts | None,
    *,
    length: int,
    per_prompt: int,
    clip_skip: int,
    guided: bool,
    adapters: Sets | None = None,
    weighting: str | None = None,
) -> tuple[Conditioning, Conditioning]:
    """cond and uncond, one row for each picture: p0, p0, p1, p1, … for two a prompt.

    A negative prompt is encoded with the adapters of its prompt.
    """
    prompt_tokens.check_weighting(weighting)
    if weighting is not None and isinstance(prompts, Conditioning):
        raise UserError(
            f'prompt_weighting "{weighting}" with embeddings; pass texts, or the'
            " embeddings of encode_prompts(..., weighting=...) without prompt_weighting"
        )
    options = dict(adapters=adapters, weighting=weighting)
    if isinstance(prompts, Conditioning):
        cond = prompts
    else:
        prompts = listed(prompts)
        if not prompts:
            raise UserError("no prompts; give at least one")
        cond = bundle.encode_prompts(prompts, length, clip_skip=clip_skip, **options)
    n = cond.pooled.shape[0]
    uncond = cond  # not looked at without guidance
    if guided and isinstance(negative, Conditioning):
        uncond = negative
    elif guided:
        texts = listed("" if negative is None else negative)
        texts = texts * n if len(texts) == 1 else texts
        if len(texts) != n:
            raise UserError(
                f"{len(texts)} negative prompts for {n} prompts: expected one, or as"
                " many"
            )
        # Both branches run as one doubled batch, so that the negative prompt needs as
        # many tokens of T5 as the positive one: all tokens but CLIP's 77.
        length = cond.context.shape[1] - 77
        if length < 1:
            raise UserError(
                f"embeddings of {length + 77} tokens, which no text has: give"
                " negative_prompts as embeddings too"
            )
        uncond = bundle.encode_prompts(texts, length, **options)
    # cond and uncond are concatenated along the batch.
    if {x.shape for x in uncond} != {x.shape for x in cond}:
        raise UserError(
            f"embeddings of {[x.shape for x in cond]} and negative ones of"
            f" {[x.shape for x in uncond]}: expected the same shapes"
        )
    repeat = lambda x: jnp.repeat(x, per_prompt, axis=0)
    return jax.tree.map(repeat, (cond, uncond)) if per_prompt > 1 else (cond, uncond)


# --- solver and guidance


def settings(
    bundle: Bundle,
    shape: tuple,
    *,
    steps: Any,
    solver: str | None,
    grid: str | None,
    shift: float | None,
    mu: float | None,
    sigmas: Sequence[float] | np.ndarray | None,
) -> tuple[str, Float[np.ndarray, " n"]]:
    """The solver and its times t; what the caller leaves out is the model's default."""
    # The number of steps is a shape of the program, so it must be known on the host.
    if not isinstance(steps, int | np.integer) or steps < 1:
        raise UserError(f"steps {shown(steps)}: expected an integer >= 1")
    if solver is not None:
        argument_checks.choice("solver", solver, list(SOLVERS))
    if grid is not None:
        argument_checks.choice("grid", grid, list(grids.GRIDS))
    shift = None if shift is None else argument_checks.number("shift", shift)
    mu = None if mu is None else argument_checks.number("mu", mu)
    if sigmas is not None:
        sigmas = [
            argument_checks.number("sigmas", x, 0, 1) for x in np.atleast_1d(sigmas)
        ]
    # A dynamic shift depends on the number of image tokens, h w / patch^2.
    tokens = shape[0] * shape[1] // bundle.part("denoiser").patch ** 2
    return bundle.scheduler.sampler(
        steps, tokens, solver=solver, grid=grid, shift=shift, mu=mu, sigmas=sigmas
    )


def has_text(texts: Texts | None) -> bool:
    """Whether any of the texts is not empty: a negative prompt is "" by default."""
    if texts is None or isinstance(texts, Conditioning):
        return texts is not None
    return any(any(x) if isinstance(x, Prompt) else bool(x) for x in listed(texts))


def guided(
    scale: guidance.Number,
    interval: tuple[guidance.Number, guidance.Number],
    rescale: guidance.Number,
    method: str = "cfg",
    **other: bool,
) -> bool:
    """Whether there is guidance. Without it, options that only guidance uses are
    named in a warning: `other` has such options, True where the caller set them."""
    # Python numbers are checked here; inside the compiled program they are arrays.
    guidance.check(scale, interval, rescale)
    if guidance.guides(scale, method):
        return True
    other["guidance_interval"] = tuple(interval) != (0.0, 1.0)
    other["guidance_rescale"] = rescale != 0
    other["guidance_method"] = method != "cfg"
    least = METHODS[method].least
    # Ignored options are reported instead of refused: one recipe may serve models with
    # guidance and models that are distilled from it.
    if unused := [name for name, is_set in other.items() if is_set]:
        warn_once(
            f"guidance {scale:g} disables guidance, so these are not used:"
            f" {', '.join(unused)}; set guidance above {least:g} to use them"
        )
    return False


@functools.cache
def warn_once(text: str) -> None:
    """A warning that a job, which makes the same call for every batch, logs once."""
    log.warning("%s", text)


# --- images, latents and embeddings


def starting_image(
    bundle: Bundle, image: Pictures | None
) -> Float[Array | np.ndarray, "b _ _ _"] | None:
    """generate's image: pixels in [0, 1], or latents unchanged."""
    # Latents are told from pixels by their channels, 16 against 1, 3 or 4.
    channels = bundle.part("denoiser").channels
    if image is None:
        return None
    if input_images.are_latents(image, channels):
        return input_images.latents(image, channels, "image")
    return input_images.pixels(image)


def require_embeddings(bundle: Bundle, texts: Texts | None, name: str) -> None:
    """UserError for embeddings of another shape or dtype than the denoiser reads."""
    if not isinstance(texts, Conditioning):
        return
    config = bundle.configs["denoiser"]
    for part, axes, key in (
        ("context", 3, "joint_attention_dim"),
        ("pooled", 2, "pooled_projection_dim"),
    ):
        x, width = getattr(texts, part), config.get(key)
        if x.ndim != axes or width not in (None, x.shape[-1]) or not all(x.shape):
            layout = "(b, tokens" if axes == 3 else "(b"
            raise UserError(
                f"{name}: {part} of shape {tuple(x.shape)}: expected {layout}, {width})"
            )
        # Integers here are usually token ids, passed in place of embeddings.
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"{name}: {part} of dtype {x.dtype}: expected floats")
        input_images.finite(x, f"{name}: {part}")
    # Both describe the same prompts, row by row.
    if len(texts.context) != len(texts.pooled):
        raise UserError(
            f"{name}: context of {len(texts.context)} rows and pooled of"
            f" {len(texts.pooled)}: expected as many"
        )


def latents_of(
    bundle: Bundle,
    image: Array | np.ndarray,
    keys: Key[Array, " b"] | None,
    shape: tuple,
) -> Float[Array, "b h w c"]:
    """The latents of pictures, drawn with each row's key; latents are unchanged."""
    if image.shape[-1] == 3:
        return bundle.encode_image(image, keys)
    # Latents are not resized: interpolating them gives no latents of a resized picture.
    if image.shape[1:] != shape:
        raise UserError(f"latents of {image.shape[1:]}: expected {shape} each")
    return jnp.asarray(image, jnp.float32)
