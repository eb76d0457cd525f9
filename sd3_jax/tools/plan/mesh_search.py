"""Ranks meshes, batch sizes and remat by bounds that need no compiler."""

from collections.abc import Iterator
from typing import NamedTuple

from sd3_jax.models.mmdit import MMDiT
from sd3_jax.tools.plan import bounds
from sd3_jax.tools.plan.slices import Slice

# Of a block: what is kept of each token for the backward pass, in widths of bfloat16
# (attention's heads of 64 lie in 128 lanes), and what share of its linear maps is run
# again: fc1 is 4 of 12 d^2.
KEPT = {"mlp": 12, "attention": 8, "full": 1}  # what is searched
AGAIN = {"attention": 1 / 3, "offload": 1 / 3, "full": 1.0}
STATE = 16  # bytes a parameter: it, its average, and two moments, in float32
ROOM = 0.75  # of HBM; gathered weights and a block's own work want the rest


class Candidate(NamedTuple):
    data: int
    fsdp: int
    per_chip: int
    remat: str

    def keys(self, batch: int, chips: int) -> dict:
        """The recipe's keys for this candidate."""
        return {
            "mesh.data": self.data,
            "mesh.fsdp": self.fsdp,
            "model.remat": self.remat,
            "optim.accumulate": batch // (self.per_chip * chips),
        }


class Estimate(NamedTuple):
    mfu: float
    links: float  # over compute
    memory: float  # bytes, at least


def ordered(model: MMDiT, tpu_slice: Slice, *, batch: int, params: int, work, total):
    """Candidates that may fit, the most promising first, each with its Estimate."""
    estimates = [
        (candidate, estimate(candidate, model, tpu_slice, batch, params, work, total))
        for candidate in candidates(tpu_slice, batch, model.width)
    ]
    fitting = [x for x in estimates if x[1].memory < tpu_slice.generation.hbm]
    return sorted(fitting, key=lambda x: rank(x[1], tpu_slice.generation.hbm))


def rank(x: Estimate, hbm: float) -> tuple:
    # False sorts before True: what surely fits first, then by MFU; the traffic decides
    # between equal ones.
    return x.memory > ROOM * hbm, -round(x.mfu, 3), x.links


def candidates(tpu_slice: Slice, batch: int, width: int) -> Iterator[Candidate]:
    share = batch // tpu_slice.chips
    # Powers of two, as all slices' sides are.
    for power in range(tpu_slice.devices.bit_length()):
        fsdp = 2**power
        data, rest = divmod(tpu_slice.devices, fsdp)
        # fsdp stays within a slice: its all-gathers would be too slow between slices.
        if rest or width % fsdp or data % tpu_slice.slices:
            continue
        per_chip = tpu_slice.generation.devices  # each of a chip's devices takes a row
        while per_chip <= share:
            if batch % (per_chip * tpu_slice.chips) == 0:
                for remat in KEPT:
                    yield Candidate(data, fsdp, per_chip, remat)
            per_chip *= 2


def estimate(x: Candidate, model: MMDiT, tpu_slice: Slice, batch, params, work, total):
    chip, images = tpu_slice.generation, x.per_chip / tpu_slice.generation.devices
    head, again = model.width // model.num_heads, AGAIN.get(x.remat, 0.0)
    compute = images * bounds.training(work, chip, head=head, again=again).total
    sent = bounds.least_wire(params, x.fsdp, x.data)
    links = sent / (chip.link_rate * tpu_slice.links(x.fsdp))
    # Accumulated gradients are one more float32 array of parameters.
    accumulates = batch > x.per_chip * tpu_slice.chips
    state = (STATE + 4 * accumulates) * params / x.fsdp
    # 2 bytes of bfloat16; the last block's activations are used at once.
    kept = 2 * KEPT[x.remat] * model.width * work.tokens * (model.depth - 1) * images
    # At best compute and traffic overlap fully, so the longer of both counts.
    mfu = 3 * total * images / chip.peak / max(compute, links)
    return Estimate(mfu, links / compute, state + kept)
