"""Upper bounds of a program's speed, from the work of its parts.

Matrix products are counted analytically: 2 FLOPs a multiply-add, three times the
forward pass for training. All other work is read off the compiled program
(schedule.py).
"""

import math
from typing import NamedTuple

from sd3_jax.models.attention import splash
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.tools.plan.schedule import WAITS, Account
from sd3_jax.tools.plan.slices import Generation

# What published runs on TPUs reach of a bound computed as here. Training: Flux of
# MaxDiffusion on v5p 0.62 to 0.64, Llama 3.1 on v6e 0.62 to 0.73; dense models with
# heads of 128 go higher (0.79 to 0.89 on v5e, v5p). Sampling: one run, Flux on v6e-4.
FORECAST = {"train": (0.62, 0.75), "sample": (0.50, 0.50)}
# The floors of a program's time, and what a plan calls them.
FLOORS = {"serial": "serial", "hbm": "HBM", "links": "ICI", "other_slices": "DCN"}
TIGHT = 0.93  # of HBM; the runtime wants some, and the compiler may err


class Work(NamedTuple):
    """FLOPs of one image's forward pass: linear maps, attention, and attention on
    padded lengths as the kernel runs it."""

    linear: float
    attention: float
    padded: float
    tokens: int  # of image and text


class Compute(NamedTuple):
    """Seconds of one image on one device, by kind of work."""

    linear: float
    recomputed: float  # linear maps run again in the backward pass
    attention: float  # as the model counts it, at full rate
    kernel: float  # the attention kernel's backward makes one product once more
    padding: float
    narrow: float  # heads narrower than the matrix unit

    @property
    def total(self) -> float:
        return sum(self)


def floors(account: Account, chip: Generation) -> dict[str, float]:
    """Seconds that a compiled program takes at least, by what bounds it.

    "hbm" is its bytes over the rate of HBM, "links" those between chips, and
    "other_slices" those between slices. "serial" is the schedule without its waits:
    all operations in order.
    """
    waits = sum(account.by_kind[kind] for kind in WAITS.values())
    return {
        "hbm": account.hbm / chip.hbm_rate,
        "serial": account.seconds - waits,
        "links": account.links["ici"],
        "other_slices": account.links["dcn"],
    }


def training(work: Work, chip: Generation, *, head: int, again: float) -> Compute:
    """Of a training step. `again` is the share of the linear maps that remat repeats;
    at 1 it repeats attention's forward pass as well.

    Attention is two products of equal size; its backward pass is four, and a fused
    kernel makes a fifth, the first one once more. Each has a side as wide as a head,
    which fills only that part of the matrix unit.
    """
    one = work.attention / 2
    # One product is half of attention's forward FLOPs; full remat repeats both.
    fifth = one + (2 * one if again >= 1 else 0)
    return _compute(
        work, chip, head, 3 * work.linear, again * work.linear, 6 * one, fifth
    )


def forward(
    work: Work,
    chip: Generation,
    *,
    head: int,
    eight_bits: float = 0.0,
    rate: float = math.inf,
) -> Compute:
    """Of one call of the model, without gradients; `eight_bits` of the linear maps'
    FLOPs run at `rate`."""
    compute = _compute(work, chip, head, work.linear, 0.0, work.attention, 0.0)
    saved = eight_bits / chip.peak - eight_bits / rate
    return compute._replace(linear=compute.linear - saved)


def _compute(work, chip, head, linear, recomputed, attention, kernel) -> Compute:
    # The kernel works on whole blocks of tokens, padding included.
    stretch = work.padded / work.attention
    # A head of 64 fills half of a matrix unit that is 128 wide.
    fill = min(1.0, head / chip.matrix)
    padding = (attention + kernel) * (stretch - 1)
    narrow = (attention + kernel) * stretch * (1 / fill - 1)
    parts = (linear, recomputed, attention, kernel, padding, narrow)
    return Compute(*(flops / chip.peak for flops in parts))


def least_wire(params: int, shards: int, copies: int) -> float:
    """Bytes a device must send: weights in bfloat16 all-gathered twice and gradients
    reduce-scattered once over `shards`, then all-reduced over `copies` of them."""
    # A ring sends (n - 1) / n of the array from each device; 2 bytes a number, 3 times:
    # gathers of the forward and the backward pass, and the gradients' reduce-scatter.
    ring = 3 * 2 * params * (shards - 1) / shards
    return ring + 2 * 2 * params / shards * (copies - 1) / copies


def work_on(
    chip: Generation, model: MMDiT, *, height: int, width: int, text: int, total: float
) -> Work:
    """The work for latents of this size, with the kernel's block size on this chip."""
    tokens = height * width // model.patch**2
    size = splash.block(tokens + text, splash.MOST[chip.kind])
    padded = -(-(tokens + text) // size) * size
    return work(model, tokens=tokens, text=text, padded=padded, total=total)


def work(model: MMDiT, *, tokens: int, text: int, padded: int, total: float) -> Work:
    """Splits a forward pass's FLOPs; `padded` is the length that the kernel sees."""
    d, joint_tokens = model.width, tokens + text
    # 2 products of 2 n^2 d FLOPs. The last block drops the text: its queries are the
    # image's tokens only.
    joint = 4 * d * ((model.depth - 1) * joint_tokens**2 + tokens * joint_tokens)
    # Dual blocks attend once more over the image's tokens.
    dual = model.dual_blocks * 4 * d * tokens**2
    longer = 4 * d * ((model.depth - 1) * padded**2 + tokens * padded)
    return Work(total - joint - dual, joint + dual, longer + dual, joint_tokens)


def verdict(peak: float, capacity: float) -> str:
    """Whether a peak leaves room in HBM: "fits", "tight" or "exceeds"."""
    if peak > capacity:
        return "exceeds"
    return "tight" if peak > TIGHT * capacity else "fits"
