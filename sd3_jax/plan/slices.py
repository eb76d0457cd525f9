"""TPU slices by name: topology, memory, and the rates that bound a program.

Peaks and capacities are the published ones; rates between chips are one-way sums over
a chip's links. A v5p's name counts cores, two a chip, and a tpu7x's counts the two
devices that JAX sees of a chip.
"""

import re
from typing import NamedTuple

from sd3_jax.errors import UserError, nearest


class Generation(NamedTuple):
    """Per JAX device: FLOP/s in bfloat16, bytes of HBM as the compiler counts them,
    bytes/s of HBM and out of its links, and the width of the matrix unit."""

    topology: str
    kind: str  # jax.Device.device_kind
    peak: float
    hbm: float
    hbm_rate: float
    link_rate: float
    matrix: int
    named: int = 1  # what the slice's name counts for each chip
    devices: int = 1  # JAX devices a chip
    dims: int = 2


GB = 2**30
GENERATIONS = {
    "v5e": Generation("v5e", "TPU v5 lite", 197e12, 15.75 * GB, 0.82e12, 1.8e11, 128),
    "v5p": Generation(
        "v5", "TPU v5", 459e12, 95.74 * GB, 2.76e12, 5.4e11, 128, named=2, dims=3
    ),
    "v6e": Generation("v6e", "TPU v6 lite", 918e12, 31.25 * GB, 1.64e12, 3.6e11, 256),
    "tpu7x": Generation(
        "tpu7x",
        "TPU7x",
        1153.5e12,
        94.75 * GB,
        3.69e12,
        3.0e11,
        256,
        named=2,
        devices=2,
        dims=3,
    ),
}
FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
SOLID = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
}


class Slice(NamedTuple):
    name: str
    generation: Generation
    chips: int
    topology: str  # as libtpu names it

    @property
    def devices(self) -> int:
        return self.chips * self.generation.devices


def find(name: str) -> Slice:
    """ "v5e-256", "v5p-128", "v6e-256" or "tpu7x-128"."""
    told = re.fullmatch(r"([a-z0-9]+)-(\d+)", name)
    if told is None or told[1] not in GENERATIONS:
        known = [f"{g}-128" for g in GENERATIONS]
        raise UserError(f'config.plan.slices: "{name}"{nearest(name, known)}')
    made = GENERATIONS[told[1]]
    shapes = FLAT if made.dims == 2 else SOLID
    chips, rest = divmod(int(told[2]), made.named)
    if rest or chips not in shapes:
        sizes = [f"{told[1]}-{n * made.named}" for n in shapes]
        raise UserError(
            f'config.plan.slices: "{name}": wanted one of {", ".join(sizes)}'
        )
    return Slice(name, made, chips, f"{made.topology}:{shapes[chips]}")
