"""What a caller asks for, checked and brought to the arrays a program takes."""

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from sd3_jax.diffusion import grids
from sd3_jax.errors import UserError, nearest
from sd3_jax.pipelines.bundle import Bundle, ControlBundle, Prompt
from sd3_jax.pipelines.prompts import Conditioning

Text = str | Prompt
Texts = Text | Sequence[Text] | Conditioning


class ControlInput(NamedTuple):
    """A ControlNet and what it is to follow.

    `image` (b or 1, H, W, 3) in [0, 1], as the net's preprocessor leaves it, or the
    condition as latents. It acts `scale` strong from `start` to `stop`, shares of the
    steps. For an inpainting net the image is what is to be repainted where `mask` (b
    or 1, H, W, 1) is 1.
    """

    net: ControlBundle
    image: Float[Array | np.ndarray, "b _ _ _"]
    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    mask: Float[Array | np.ndarray, "b H W 1"] | None = None


def listed(texts: Text | Sequence[Text]) -> list[Text]:
    return [texts] if isinstance(texts, str | Prompt) else list(texts)


def size(bundle: Bundle, height: int | None, width: int | None, image) -> tuple:
    """(h, w, c) of the latents; pixels are the image's, or those of the training."""
    denoiser = bundle.part("denoiser")
    unit = bundle.factor * denoiser.patch
    most = unit * denoiser.pos_size
    given = None
    if image is not None:
        factor = 1 if image.shape[-1] == 3 else bundle.factor
        given = [side * factor for side in image.shape[1:3]]
    usual = bundle.configs["denoiser"].get("sample_size", 128) * bundle.factor
    sides = []
    for i, (name, side) in enumerate((("height", height), ("width", width))):
        if side is None:
            side = usual if given is None else given[i]
        if side < 1 or side % unit or side > most:
            near = min(max(1, round(side / unit)) * unit, most)
            raise UserError(
                f"{name} {side}: wanted a multiple of {unit}, at most {most}; the"
                f" nearest is {near}"
            )
        if given is not None and side != given[i]:
            raise UserError(
                f"{name} {side}: the image's is {given[i]}; wanted the same"
            )
        sides.append(side // bundle.factor)
    return (*sides, denoiser.channels)


def encoded(
    bundle: Bundle,
    prompts: Texts,
    negative: Texts | None,
    *,
    length: int,
    per_prompt: int,
    clip_skip: int,
    guided: bool,
) -> tuple[Conditioning, Conditioning]:
    """cond and uncond, p0, p0, p1, p1, … if there are two of each."""
    if per_prompt < 1:
        raise UserError(f"images_per_prompt {per_prompt}: wanted 1 or more")
    if isinstance(prompts, Conditioning):
        cond = prompts
    else:
        prompts = listed(prompts)
        if not prompts:
            raise UserError("no prompts: wanted at least one")
        cond = bundle.encode_prompts(prompts, length, clip_skip=clip_skip)
    n = cond.pooled.shape[0]
    uncond = cond  # not looked at without guidance
    if guided and isinstance(negative, Conditioning):
        uncond = negative
    elif guided:
        texts = listed("" if negative is None else negative)
        texts = texts * n if len(texts) == 1 else texts
        if len(texts) != n:
            raise UserError(
                f"{len(texts)} negative prompts for {n} prompts: wanted one, or as many"
            )
        length = cond.context.shape[1] - 77
        uncond = bundle.encode_prompts(texts, length)
    if {x.shape for x in uncond} != {x.shape for x in cond}:
        raise UserError(
            f"embeddings of {[x.shape for x in cond]} and negative ones of"
            f" {[x.shape for x in uncond]}: wanted the same shapes"
        )
    repeat = lambda x: jnp.repeat(x, per_prompt, axis=0)
    return jax.tree.map(repeat, (cond, uncond)) if per_prompt > 1 else (cond, uncond)


def image_keys(
    prompts: Texts, seed: int | Sequence[int], per_prompt: int
) -> Key[Array, " b"]:
    """A key for every picture: of its seed, its prompt and its number for the prompt.

    Embeddings are told apart by their place.
    """
    if isinstance(prompts, Conditioning):
        names = list(range(prompts.pooled.shape[0]))
    else:
        names = [zlib.crc32(repr(p).encode()) for p in listed(prompts)]
    seeds = [seed] * len(names) if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) != len(names):
        raise UserError(
            f"{len(seeds)} seeds for {len(names)} prompts: wanted one, or as many"
        )
    if not all(0 <= s < 2**32 for s in seeds):
        raise UserError(f"seed {seed}: wanted integers from 0 to {2**32 - 1}")
    fold = jax.random.fold_in
    rows = [
        np.array([s, name, number], np.uint32)
        for s, name in zip(seeds, names)
        for number in range(per_prompt)
    ]
    make = lambda row: fold(fold(jax.random.key(row[0]), row[1]), row[2])
    return jax.vmap(make)(np.stack(rows))


def times(
    bundle: Bundle,
    *,
    grid: str | None,
    solver: str,
    steps: int,
    shift: float | None,
    mu: float | None,
    sigmas: Sequence[float] | np.ndarray | None,
    shape: tuple,
) -> Float[np.ndarray, " n"]:
    """The t's to visit, by the model's own scheduler where the caller is silent."""
    scheduler = bundle.scheduler
    shift = scheduler["shift"] if shift is None else shift
    if mu is not None or (grid is None and scheduler["use_dynamic_shifting"]):
        tokens = shape[0] * shape[1] // bundle.part("denoiser").patch ** 2
        base = scheduler["base_image_seq_len"], scheduler["base_shift"]
        most = scheduler["max_image_seq_len"], scheduler["max_shift"]
        mu = grids.linear_mu(tokens, base=base, most=most) if mu is None else mu
        if sigmas is None:
            return grids.dynamic(steps, mu)
        shift = math.exp(mu)
    if sigmas is not None:
        return grids.custom([float(t) for t in sigmas], shift)
    usual = "flow" if solver == "dpmpp_2m_flow" else "released"
    return grids.make(grid or usual, steps, shift)


def rows_of(x: Array | np.ndarray, rows: int, per_prompt: int, what: str) -> Array:
    """One for all, one for each prompt, or one for each picture."""
    n = x.shape[0]
    if n == rows:
        return jnp.asarray(x)
    if n in (1, rows // per_prompt):
        return jnp.repeat(jnp.asarray(x), rows // n, axis=0)
    raise UserError(f"{n} of {what} for {rows} pictures: wanted 1 or {rows}")


def latents_of(
    bundle: Bundle,
    image: Array | np.ndarray,
    keys: Key[Array, " b"] | None,
    shape: tuple,
) -> Float[Array, "b h w c"]:
    """A picture's latents, drawn with each row's key; latents as they are."""
    if image.shape[-1] == 3:
        return bundle.encode_image(image, keys)
    if image.shape[1:] != shape:
        raise UserError(f"latents of {image.shape[1:]}: wanted {shape} each")
    return jnp.asarray(image, jnp.float32)


def latent_mask(
    mask: Array | np.ndarray, shape: tuple, factor: int
) -> Float[np.ndarray, "b h w 1"]:
    """1 where at least a half is asked for, by the nearest pixel of each latent."""
    mask = np.asarray(mask, np.float32)
    wanted = shape[0] * factor, shape[1] * factor
    if mask.ndim != 4 or mask.shape[1:] != (*wanted, 1):
        raise UserError(f"mask of {mask.shape}: wanted (1 or b, {wanted}, 1)")
    return (mask[:, ::factor, ::factor] >= 0.5).astype(np.float32)


def controls_of(
    bundle: Bundle,
    controls: Sequence[ControlInput],
    grid: Float[np.ndarray, " n"],
    shape: tuple,
    rows: int,
    per_prompt: int,
) -> tuple[tuple, tuple]:
    """The nets, and for each its variables, hint, scale and window."""
    arrays = []
    for control in controls:
        hint = rows_of(_hint(bundle, control, shape), rows, per_prompt, "control")
        window = grids.control_window(grid, control.start, control.stop)
        scale = np.float32(control.scale)
        arrays.append((control.net.variables, hint, scale, window))
    return tuple(control.net.module for control in controls), tuple(arrays)


def _hint(bundle: Bundle, control: ControlInput, shape: tuple):
    wanted = control.net.module.hint_channels
    image, mask = np.asarray(control.image, np.float32), control.mask
    if image.shape[-1] != 3:
        if image.shape[1:] != (*shape[:2], wanted):
            raise UserError(
                f"control latents of {image.shape[1:]}: wanted {(*shape[:2], wanted)}"
            )
        return image
    pixels = shape[0] * bundle.factor, shape[1] * bundle.factor
    if image.shape[1:3] != pixels:
        raise UserError(f"control image of {image.shape[1:3]}: wanted {pixels}")
    if wanted == shape[2] + 1:  # the inpainting net: the picture left, and where it is
        if mask is None:
            raise UserError("this ControlNet repaints: wanted a mask with its image")
        hidden = np.asarray(mask, np.float32) > 0.5
        left = bundle.encode_image(np.where(hidden, 0.0, image).astype(np.float32))
        keep = 1 - latent_mask(hidden, shape, bundle.factor)
        return jnp.concatenate([left, keep], axis=-1)
    if wanted != shape[2]:
        raise UserError(f"this ControlNet reads {wanted} channels: wanted latents")
    shift = 0.0 if control.net.module.zero_pooled else None  # as they were trained
    return bundle.encode_image(image, shift=shift)


def choose(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise UserError(f'{name} "{value}"{nearest(value, choices)}')
    return value


def layers(bundle: Bundle, given: Sequence[int] | None) -> tuple[int, ...]:
    depth = bundle.part("denoiser").depth
    for i in given or ():
        if not 0 <= i < depth:
            raise UserError(f"skip_layers {i}: wanted layers from 0 to {depth - 1}")
    return tuple(sorted(set(given or ())))
