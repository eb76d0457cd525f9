"""The large recipes compiled for TPU slices, each in a process of its own.

    python benchmarks/plan.py [WORD ...]      # or make plan; words choose rows

Writes the table in benchmarks/plan.md; rows that were not chosen stay. Two minutes a
row on two cores.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "plan"
ROWS = {  # recipe and slice: what config.plan and the recipe are told
    "sd3_8b:1024 v5p-128": ("plan.per_chip=4",),
    "sd3_8b:1024 v6e-256": ("plan.per_chip=4",),
    "sd3_8b:1024 v5e-256": ("plan.per_chip=1",),
    "sd3_2b:256 v5e-16": ("plan.per_chip=8",),
    "sd3_2b:1024 v5p-128": ("plan.per_chip=4", "mesh.data=4"),
    "sd3_2b:1024 v6e-256": ("plan.per_chip=4", "mesh.data=4"),
    "sd3_8b:1024 tpu7x-128": ("plan.per_chip=4",),
    "sd35_medium:1024 v5p-128": ("plan.per_chip=4", "mesh.data=4"),
    "sd3_8b:512 v6e-256": ("plan.per_chip=8",),
    "sd3_8b:256 v5e-256": ("plan.per_chip=4",),
    "sd3_2b:512 v5e-256": ("plan.per_chip=4", "mesh.data=8"),
    "sd35_medium:256 v5e-16": ("plan.per_chip=8",),
    "sd35_medium:512 v5e-256": ("plan.per_chip=4", "mesh.data=8"),
    "sd3_2b:256 2xv5e-16": ("plan.per_chip=8", "mesh.data=2"),
}
COLUMNS = {  # of the table, and of a row of plan.json
    "mesh": lambda x: x["spelt"],
    "images/chip": lambda x: f"{x['batch']:g}",
    "HBM GB (of)": lambda x: f"{x['peak']:.1f} ({x['capacity']:g})",
    "compute ms": lambda x: f"{x['compute']:.4g}",
    "HBM ms": lambda x: f"{x['memory']:.3g}",
    "links ms": lambda x: f"{x['links']:.3g}",
    "bound MFU": lambda x: f"{x['mfu']:.3f}",
    "images/s/chip": lambda x: f"{x['rate']:.3g}",
    "sent / least": lambda x: f"{x['sent_over_least']:.2f}",
    "by all-reduce": lambda x: (
        f"{x['all_reduced'] / sum(x['sent_bytes'].values()):.0%}"
    ),
    "gathers beside work": lambda x: f"{x['gathers_overlapped']:.0%}",
    "compile s": lambda x: f"{x['seconds']:.0f}",
}
sum_of = lambda x: sum(x.values())
TABLE = re.compile(r"(?s)(?<=<!-- rows -->\n).*(?=<!-- end -->)")


def main(words: list[str]) -> None:
    for name, told in ROWS.items():
        if not words or any(word in name for word in words):
            plan(name, told)
            write(HERE / "plan.md")


def folder(name: str) -> Path:
    return RUNS / re.sub(r"\W+", "_", name)


def plan(name: str, told: tuple[str, ...]) -> None:
    recipe, where = name.split()
    path = recipe.replace(":", ".py:")
    flags = [f"--config.{key}" for key in (f"plan.slices={where}", *told)]
    subprocess.run(
        [sys.executable, "-m", "sd3_jax.main", "plan", f"--config=configs/{path}"]
        + [f"--workdir={folder(name)}", "--config.plan.hlo=true", *flags],
        check=True,
    )


def write(path: Path) -> None:
    """The table, of every row that is in runs/plan or in the table already."""
    text = path.read_text()
    kept = {
        line.split("|")[1].strip(): line
        for line in TABLE.search(text)[0].splitlines()[2:]
    }
    for name in ROWS:
        found = folder(name) / "plan.json"
        if found.exists():
            (row,) = json.loads(found.read_text())
            cells = (
                [f"needs {row['needs']}"]
                if "needs" in row
                else [cell(row) for cell in COLUMNS.values()]
            )
            kept[name] = f"| {' | '.join([name, *cells])} |"
    head = f"| {' | '.join(['recipe, slice', *COLUMNS])} |"
    rule = "|---" * (len(COLUMNS) + 1) + "|"
    lines = [head, rule, *(kept[name] for name in ROWS if name in kept)]
    path.write_text(TABLE.sub(lambda _: "\n".join(lines) + "\n", text))


if __name__ == "__main__":
    main(sys.argv[1:])
