"""The large recipes compiled for TPU slices, each in a process of its own.

    python benchmarks/plan.py [WORD ...]      # or make plan; words choose rows

Writes the tables in benchmarks/plan.md; rows that were not chosen stay. Two to four
minutes a row on two idle cores.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "plan"


class Row(NamedTuple):
    recipe: str
    slice: str
    keys: tuple[str, ...]  # of the config, as on the command line
    note: str = ""  # what else the row's name says

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.recipe, self.note, self.slice]))

    @property
    def folder(self) -> Path:
        return RUNS / re.sub(r"\W+", "_", self.name)


TRAINING = [
    Row("sd3_8b:1024", "v5p-128", ("plan.per_chip=4", "model.remat=mlp")),
    Row("sd3_8b:1024", "v6e-256", ("plan.per_chip=4",)),
    Row("sd3_8b:1024", "v5e-256", ("plan.per_chip=1",)),
    Row("sd3_8b:1024", "tpu7x-128", ("plan.per_chip=4", "model.remat=mlp")),
    Row("sd3_8b:512", "v6e-256", ("plan.per_chip=8",)),
    Row("sd3_8b:256", "v5e-256", ("plan.per_chip=4",)),
    Row("sd3_2b:1024", "v5p-128", ("plan.per_chip=4", "mesh.data=4")),
    Row("sd3_2b:1024", "v6e-256", ("plan.per_chip=4", "mesh.data=4")),
    Row("sd3_2b:512", "v5e-256", ("plan.per_chip=4", "mesh.data=8")),
    Row("sd3_2b:256", "v5e-16", ("plan.per_chip=8",)),
    Row("sd3_2b:256", "2xv5e-16", ("plan.per_chip=8", "mesh.data=2")),
    Row("sd35_medium:1024", "v5p-128", ("plan.per_chip=4", "mesh.data=4")),
    Row("sd35_medium:512", "v5e-256", ("plan.per_chip=4", "mesh.data=8")),
    Row("sd35_medium:256", "v5e-16", ("plan.per_chip=8",)),
    # As many images as i1 (arXiv 2606.11289) gives a chip, and a depth near its size.
    Row(
        *("sd3_2b:256", "v5p-128"),
        ("plan.per_chip=8", "mesh.data=4", "model.depth=28", "model.remat=mlp"),
        "depth 28",
    ),
    Row(
        *("sd3_2b:1024", "v5p-128"),
        ("plan.per_chip=2", "mesh.data=4", "model.depth=28", "model.remat=mlp"),
        "depth 28",
    ),
]
SAMPLING = [
    Row(
        *("released:sd35_large", "v6e-8"),
        ("plan.per_chip=1", "plan.job=sample"),
        "40 steps, guidance",
    ),
]
span = lambda values, form: "–".join(dict.fromkeys(format(x, form) for x in values))
COLUMNS = {  # of the table, and of a row of plan.json
    "mesh": lambda x: x["spelt"],
    "remat": lambda x: x["remat"] or "none",
    "images/chip": lambda x: f"{x['batch']:g}",
    "peak GiB (of)": lambda x: f"{x['peak']:.1f} ({x['capacity']:g})",
    "memory": lambda x: x["verdict"],
    "matmul ms": lambda x: f"{x['compute']:.4g}",
    "serial ms": lambda x: f"{x['serial']:.4g}",
    "HBM ms": lambda x: f"{x['hbm']:.3g}",
    "ICI ms": lambda x: f"{x['links']:.3g}",
    "DCN ms": lambda x: f"{x['other_slices']:.3g}",
    "scheduled ms": lambda x: f"{x['scheduled']:.4g}",
    "binds": lambda x: x["binds"],
    "bound MFU": lambda x: f"{x['mfu']:.3f}",
    "scheduled MFU": lambda x: f"{x['mfu_scheduled']:.3f}",
    "forecast MFU": lambda x: span(x["forecast_mfu"], ".2f"),
    "bound images/s/chip": lambda x: f"{x['rate']:.3g}",
    "forecast images/s/chip": lambda x: span(x["forecast_rate"], ".3g"),
    "sent / least": lambda x: (
        f"{x['sent_over_least']:.2f}" if "sent_over_least" in x else ""
    ),
    "adaLN's share": lambda x: f"{x['adaln_bytes'] / all_sent(x):.1%}",
    "overlapped": lambda x: f"{x['overlapped']:.0%}",
    "beside matmuls": lambda x: f"{x['beside_matmuls']:.0%}",
    "compile s": lambda x: f"{x['seconds']:.0f}",
    "compiler": lambda x: x["compiler"],
}


def all_sent(row: dict) -> float:
    return max(sum(row["sent_bytes"].values()) + row["sent_between_slices"], 1.0)


def main(words: list[str]) -> None:
    for row in TRAINING + SAMPLING:
        if not words or any(word in row.name for word in words):
            plan(row)
            write(HERE / "plan.md")


def plan(row: Row) -> None:
    path = "configs/" + row.recipe.replace(":", ".py:")
    flags = [f"--config.{key}" for key in (f"plan.slices={row.slice}", *row.keys)]
    subprocess.run(
        [sys.executable, "-m", "sd3_jax.main", "plan", f"--config={path}"]
        + [f"--workdir={row.folder}", "--config.plan.hlo=true", *flags],
        check=True,
    )


def write(path: Path) -> None:
    """The tables, of every row that is in runs/plan or in the tables already."""
    text = path.read_text()
    for title, rows in ("training", TRAINING), ("sampling", SAMPLING):
        block = re.compile(rf"(?s)(?<=<!-- {title} -->\n).*?(?=<!-- end -->)")
        kept = {
            line.split("|")[1].strip(): line
            for line in block.search(text)[0].splitlines()[2:]
        }
        lines = [line for row in rows for line in lines_of(row, kept)]
        head = f"| {' | '.join(['recipe, slice', *COLUMNS])} |"
        rule = "|---" * (len(COLUMNS) + 1) + "|"
        table = "\n".join([head, rule, *lines]) + "\n"
        text = block.sub(lambda _, table=table: table, text)
    path.write_text(text)


def lines_of(row: Row, kept: dict[str, str]) -> list[str]:
    """The row's programs, from its folder or else as the table has them."""
    file = row.folder / "plan.json"
    if not file.exists():
        return [line for name, line in kept.items() if name.startswith(row.name)]
    lines = []
    for program in json.loads(file.read_text()):
        name = row.name
        if program["program"] != "train":
            name += f": {program['program']}"
        cells = (
            [f"needs {program['needs']}"]
            if "needs" in program
            else [cell(program) for cell in COLUMNS.values()]
        )
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
