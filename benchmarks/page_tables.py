"""What the benchmarks share: tables in their pages, and processes of their own."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """That of a process which imports this checkout, on the CPU."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def fill(page: Path, title: str, block: str) -> None:
    """Replace what is between `<!-- TITLE -->` and the next `<!-- end -->`."""
    # Once: an empty block would match again, up to the end of the next one.
    place = re.compile(rf"(?s)(?<=<!-- {title} -->\n).*?(?=<!-- end -->)")
    page.write_text(place.sub(lambda _: block, page.read_text(), count=1))
