"""TPU slices by name: topology, memory, and the rates that bound a program.

Peaks and capacities are the published ones; a link's rate is one way. A v5p's name
counts cores, two a chip, and a tpu7x's counts the two devices that JAX sees of a chip.
"""

import math
import re
from typing import NamedTuple

from sd3_jax.errors import UserError, near


class Generation(NamedTuple):
    """Per JAX device: FLOP/s in bfloat16 and with operands of eight bits, bytes of HBM
    as the compiler counts them, bytes/s of HBM, of one of its chip's links and to other
    slices, and the width of the matrix unit."""

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
    slice_rate: float = 6.25e9  # 50 Gb/s a chip
    host_rate: float = 3.2e10  # PCIe 4.0 x16, to the host's memory
    int8: float = 0.0  # 0: no faster than bfloat16
    fp8: float = 0.0

    def eight_bits(self, dtype: str) -> float:
        """FLOP/s of products whose operands are both of HLO's `dtype`."""
        return {"s8": self.int8, "f8e4m3fn": self.fp8}[dtype] or self.peak


# The compiler counts HBM in GiB, and reserves some: v5e's 16 are 15.75.
GB = 2**30
GENERATIONS = {
    "v5e": Generation(
        *("v5e", "TPU v5 lite", 197e12, 15.75 * GB, 0.82e12, 4.5e10, 128),
        slice_rate=3.125e9,  # 25 Gb/s
        int8=393e12,
    ),
    "v5p": Generation(
        *("v5", "TPU v5", 459e12, 95.74 * GB, 2.76e12, 9e10, 128),
        named=2,
        dims=3,
        int8=918e12,
    ),
    "v6e": Generation(
        *("v6e", "TPU v6 lite", 918e12, 31.25 * GB, 1.64e12, 9e10, 256),
        slice_rate=12.5e9,  # 100 Gb/s
        int8=1836e12,
    ),
    "tpu7x": Generation(
        "tpu7x",
        "TPU7x",
        1153.5e12,
        94.75 * GB,
        3.69e12,
        1.0e11,
        256,
        named=2,
        devices=2,
        dims=3,
        slice_rate=6.25e9,  # 100 Gb/s a chip, of two devices
        fp8=2307e12,  # no rate of int8 is published
    ),
}
LITEPOD = ("v5litepod", "v5e")
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
    kind: str  # the generation's name
    generation: Generation
    chips: int  # of all slices
    shape: tuple[int, ...]  # chips along each axis of the torus
    slices: int = 1

    @property
    def topology(self) -> str:
        """As libtpu names it."""
        return f"{self.generation.topology}:{'x'.join(map(str, self.shape))}"

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Which axes wrap around: in 3D all or none, in 2D those of 16 chips. Without
        this the compiler replaces all-gathers by all-reduces of whole weights."""
        if len(self.shape) == 3:
            return (all(n % 4 == 0 for n in self.shape),) * 3
        return (*(n == 16 for n in self.shape), False)

    @property
    def devices(self) -> int:
        return self.chips * self.generation.devices

    def links(self, devices: int) -> float:
        """How many links a chip of neighbouring `devices` can send by at least: two
        along an axis that closes to a ring, one along one that has ends."""
        left, links = max(1, devices // self.generation.devices), 0
        # Neighbouring devices fill the last axis of the torus first.
        for size, ring in zip(self.shape[::-1], self.wrap[len(self.shape) - 1 :: -1]):
            filled = min(left, size)
            left //= filled
            if filled > 1:
                links += 2 if ring and filled == size > 2 else 1
        return links or math.inf


def find(name: str) -> Slice:
    """ "v5e-256", "v5p-128", "v6e-256" or "tpu7x-128"; "2xv5e-256" is two of them.

    v5litepod-16, as gcloud says, is v5e-16.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)-(\d+)", name.replace(*LITEPOD))
    if match is None or match[2] not in GENERATIONS or match[1] == "0":
        raise UserError(
            f'config.plan.slices: unknown slice "{name}"; expected GENERATION-SIZE,'
            " such"
            f" as v5e-16 or 2xv5e-16, with {', '.join(GENERATIONS)}{_near(name)}"
        )
    generation = GENERATIONS[match[2]]
    # v5e and v6e have 2D meshes of up to 256 chips, v5p and tpu7x 3D ones.
    shapes = FLAT if generation.dims == 2 else SOLID
    chips, rest = divmod(int(match[3]), generation.named)
    if rest or chips not in shapes:
        sizes = [f"{match[2]}-{n * generation.named}" for n in shapes]
        raise UserError(
            f'config.plan.slices: "{name}": expected one of {", ".join(sizes)}'
        )
    # "v5e-16" is one slice, "2xv5e-16" two of them.
    count = int(match[1] or 1)
    shape = tuple(int(n) for n in shapes[chips].split("x"))
    return Slice(
        name.replace(*LITEPOD), match[2], generation, count * chips, shape, count
    )


def cloud_name(name: str) -> str:
    """The type that Google's tools take: "v5litepod-16" for "v5e-16" or "2xv5e-16"."""
    one = re.sub(r"^\d+x", "", name)
    return one.replace(f"{LITEPOD[1]}-", f"{LITEPOD[0]}-")


def _near(name: str) -> str:
    generation, _, size = name.partition("-")
    guess = near(generation, GENERATIONS)
    return f'; did you mean "{guess}-{size}"?' if guess and size else ""
