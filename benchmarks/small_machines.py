"""Memory of sampling on one chip, phase by phase, for TPUs of 16 and 32 GB.

    python benchmarks/small_machines.py [WORD ...]      # words choose rows

Compiles each program of `plan.job=sample` in a process of its own, because the compiler
may take 10 GB and more, and writes the table in benchmarks/small_machines.md. What was
compiled before is read from runs/small_machines.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import page_tables

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "small_machines"
PROGRAMS = ("text", "denoise", "decode")
COMPONENTS = ("t5", "denoiser")
LARGE = "released:sd35_large"
INT8 = {"quantize.denoiser": "int8"}


class Row(NamedTuple):
    note: str
    slice: str
    keys: dict[str, str]  # of the config

    @property
    def name(self) -> str:
        return f"{self.note}, {self.slice}"


ROWS = [
    Row("bfloat16", "v6e-1", {}),
    Row("int8 denoiser", "v5e-1", INT8),
    Row("int8 denoiser and T5", "v5e-1", INT8 | {"quantize.t5": "int8"}),
    Row("bfloat16", "v5e-1", {}),
]
# libtpu needs more than 17 GB to compile these with the flags of launch/.
WITHOUT_FLAGS = {("v6e-1", "decode")}


def main(words: list[str]) -> None:
    for row in ROWS:
        for program in PROGRAMS:
            name = f"{row.name} {program}"
            if not words or all(word in name for word in words):
                compile_apart(row, program)
    write(HERE / "small_machines.md")


def file_of(row: Row, program: str) -> Path:
    # A component that is not quantized is the same program in several rows.
    key = {"text": "quantize.t5", "denoise": "quantize.denoiser"}.get(program)
    kind = row.keys.get(key, "bfloat16") if key else "bfloat16"
    return RUNS / f"{row.slice}-{program}-{kind}.json"


def compile_apart(row: Row, program: str) -> None:
    file = file_of(row, program)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        argument = json.dumps([row.slice, row.keys, program, str(file)])
        subprocess.run([sys.executable, __file__, "--one", argument], check=True)


def compile_one(slice_name: str, keys: dict, program: str, file: str) -> None:
    """Writes the row of one program, as `plan` has it."""
    from configs import released
    from sd3_jax.distributed import sharding
    from sd3_jax.jobs import plan
    from sd3_jax.sampling import compiled
    from sd3_jax.tools.plan import aot, sampling_programs, slices

    config = released.get_config("sd35_large")
    config.update_from_flattened_dict(keys)
    config.plan.job = "sample"
    if (slice_name, program) in WITHOUT_FLAGS:
        config.plan.flags = ""
    aot.prepare()
    tpu_slice = slices.find(slice_name)
    mesh = sharding.make_mesh(**config.mesh, devices=aot.devices(tpu_slice))
    with compiled.on(mesh):
        cases = sampling_programs.cases(config, tpu_slice, mesh, 1)
        case = next(case for case in cases if case.name == program)
        row = plan.planned(config, tpu_slice, mesh, case, Path(file).parent)
    Path(file).write_text(json.dumps(row, indent=2))


# --- the table


def write(path: Path) -> None:
    from sd3_jax.tools.plan import phase_memory

    lines, text = [], []
    for row in ROWS:
        rows = [read(row, program) for program in PROGRAMS]
        weights = [x["weights"] for x in rows]
        rows = phase_memory.with_placements(rows, weights, "sequential")
        kinds = {name: row.keys.get(f"quantize.{name}", "") for name in COMPONENTS}
        text += [f"{row.note}:", *phase_memory.lines(rows, kinds)]
        for placement in ("all", "sequential"):
            cells = [cell(x, placement) for x in rows]
            lines.append(f"| {row.name} | {placement} | {' | '.join(cells)} |")
    head = "| weights, chip | placement | encode GiB | denoise GiB | decode GiB |"
    table = "\n".join([head, "|---" * 5 + "|", *lines])
    page_tables.fill(path, "table", f"{table}\n")
    output = "\n".join(text)
    page_tables.fill(path, "output", f"```text\n{output}\n```\n")


def read(row: Row, program: str) -> dict:
    """A program's row; of a v5e's for one that was not compiled for its slice."""
    file = file_of(row, program)
    if not file.exists():
        file = file_of(row._replace(slice="v5e-1"), program)
        print(f"{row.name} {program}: not compiled, taken from a v5e-1")
        known = json.loads(file_of(row, "denoise").read_text())
        place = {name: known[name] for name in ("slice", "capacity")}
        return json.loads(file.read_text()) | place
    return json.loads(file.read_text())


def cell(row: dict, placement: str) -> str:
    from sd3_jax.tools.plan import bounds

    if "needs" in row:
        return f"needs {row['needs']}"
    verdict = bounds.verdict(row["peaks"][placement], row["capacity"])
    peak = f"{row['peaks'][placement]:.1f}"
    return peak if verdict == "fits" else f"{peak} ({verdict})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        compile_one(*json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
