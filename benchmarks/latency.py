"""One picture of SD3.5 on TPU slices that are not there: the denoising loop's bound.

    python benchmarks/latency.py                   # all rows; 4 to 10 minutes each
    python benchmarks/latency.py v6e-8 ring        # those whose name has both words

Writes the table in benchmarks/latency.md; rows that were not chosen stay. `plan` with
plan.job=sample makes the same rows, and compiles text encoders and decoder as well.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import page_tables

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "latency"
PAGE = HERE / "latency.md"
STEPS = 28


class Row(NamedTuple):
    slice: str
    mesh: str
    method: str = "gather"
    variant: str = "sd35_large"
    keys: tuple[str, ...] = ()  # of the config, as on the command line

    @property
    def name(self) -> str:
        return " ".join([self.variant, *self.keys, self.slice, self.mesh, self.method])

    @property
    def path(self) -> Path:
        return RUNS / (self.name.replace(" ", "_") + ".json")


HALF = ("model.depth=19", "model.width=2432", "model.num_heads=38")
ROWS = [
    Row("v6e-1", ""),
    Row("v6e-8", "data=2 context=4", "gather"),
    Row("v6e-8", "data=2 context=4", "ring"),
    Row("v6e-8", "context=8", "ring"),
    Row("v6e-4", "data=2 context=2", "ulysses"),
    Row("v5e-1", "", keys=HALF),  # 38 blocks in bfloat16 do not fit
    Row("v5e-4", "data=2 tensor=2"),
    Row("v5e-8", "data=2 context=2 tensor=2", "ring"),
    Row("v5e-8", "data=2 context=4", "ring", keys=("quantize.denoiser=int8",)),
    Row("v6e-8", "data=2 context=4", "ulysses", variant="sd35_medium"),
    Row("v6e-8", "data=2 context=4", "ring", variant="sd35_medium"),
]
COLUMNS = {
    "matmul ms": "compute",
    "serial ms": "serial",
    "HBM ms": "hbm",
    "ICI ms": "links",
    "scheduled ms": "scheduled",
}


def main() -> int:
    if sys.argv[1:2] == ["--row"]:
        row = ROWS[int(sys.argv[2])]
        row.path.write_text(json.dumps(compiled(row), indent=2))
        return 0
    RUNS.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(ROWS):
        if all(word in row.name for word in sys.argv[1:]):
            # A process each: libtpu keeps what it compiled.
            subprocess.run([sys.executable, __file__, "--row", str(i)], check=True)
    write_table()
    return 0


def compiled(row: Row) -> dict:
    """The row of `plan` for the denoising loop."""
    from etils import epath

    from sd3_jax import main as command
    from sd3_jax.distributed import sharding
    from sd3_jax.jobs import plan
    from sd3_jax.sampling import compiled as programs
    from sd3_jax.tools.plan import aot, sampling_programs, slices

    keys = (f"sample.steps={STEPS}", "sample.batch_size=1", "plan.job=sample")
    keys += (f"model.context_attention={row.method}", *row.keys)
    flags = [f"--config.{key}" for key in keys]
    recipe = f"--config=configs/released.py:{row.variant}"
    config = command.parse(["plan", recipe, f"--workdir={RUNS}", *flags]).config
    aot.prepare()
    tpu_slice = slices.find(row.slice)
    axes = dict(axis.split("=") for axis in row.mesh.split())
    sizes = {"fsdp": 1} | {axis: int(size) for axis, size in axes.items()}
    mesh = sharding.make_mesh(**sizes, devices=aot.devices(tpu_slice))
    with programs.on(mesh):
        share = 1 / tpu_slice.devices
        steering = sampling_programs.guidance(config)
        case = sampling_programs.denoise(config, tpu_slice, mesh, 1, steering, share)
        return plan.planned(config, tpu_slice, mesh, case, epath.Path(RUNS))


def write_table() -> None:
    done = [
        (row, json.loads(row.path.read_text())) for row in ROWS if row.path.exists()
    ]
    page_tables.fill(PAGE, "rows", "\n".join(table(done)) + "\n")


def table(done: list[tuple[Row, dict]]) -> list[str]:
    from sd3_jax.tools.plan import latency_lines

    names = ["model", "slice", "mesh", "keys and values", "peak GiB (of)", *COLUMNS]
    names += ["bound ms a step", "bound s a picture", "of one chip: bound, scheduled"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row, x in done:
        model = " ".join([row.variant, *row.keys])
        cells = [model, row.slice, row.mesh or "one chip", row.method]
        if "needs" in x:
            lines.append(f"| {' | '.join(cells)} | does not fit: {x['needs']} |")
            continue
        cells.append(f"{x['peak']:.1f} ({x['capacity']:g})")
        cells += [f"{x[name] / STEPS:.2f}" for name in COLUMNS.values()]
        bound = latency_lines.bound(x)
        cells += [f"{bound / STEPS:.2f}", f"{bound / 1e3:.2f}"]
        one = latency_lines.alone(x, [y for r, y in done if r.variant == row.variant])
        times = latency_lines.bound, lambda y: y["scheduled"]
        shares = [latency_lines.efficiency(x, one, time) for time in times if one]
        if one and one["parameters"] < 0.9 * x["parameters"]:
            # Half of the blocks: twice their time is as much as all of them take.
            shares = [2 * share for share in shares]
        cells.append(", ".join(f"{share:.2f}" for share in shares))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
