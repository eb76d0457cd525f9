"""docs/reference/config.md, made from the schema.

python -m sd3_jax.config.key_page > docs/reference/config.md
"""

import textwrap
from collections.abc import Iterator

from sd3_jax.config import schema
from sd3_jax.config.schema.key_rules import Key
from sd3_jax.config.value_text import show
from sd3_jax.jobs import JOBS

PAGE = "docs/reference/config.md"
INTRO = """\
# Configuration keys

A recipe sets these keys. A flag sets one for a single run: `--config.optim.lr=3e-4`.
`sd3-jax JOB --help --config=RECIPE` lists the keys that a job reads, with the values
that the recipe gives them. Some keys restrict others: `model.width` is a multiple of
`model.num_heads`. The error then names both.

This page is generated from sd3_jax/config/schema:

    python -m sd3_jax.config.key_page > docs/reference/config.md
"""


def page() -> str:
    return "\n".join([INTRO, *map(section, schema.GROUPS)])


def section(name: str) -> str:
    """A group's keys in a table, below the jobs that read them."""
    group = schema.GROUPS[name]
    lines = [f"## {f'`{name}`: ' if name else ''}{group.about}", ""]
    if name:
        lines += [textwrap.fill(f"Read by {', '.join(readers(name))}.", 100), ""]
    lines += ["| key | default | allowed | what it does |", "|---|---|---|---|"]
    for key, entry in schema.flat(group.keys, f"{name}." if name else ""):
        cells = (f"`{key}`", default(entry), entry.rule.wanted, entry.about)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def readers(group: str) -> Iterator[str]:
    """The jobs that read a group, each with its keys if it reads only some."""
    for job, entry in JOBS.items():
        keys = [x.partition(".")[2] for x in entry.groups if x.startswith(f"{group}.")]
        if group in entry.groups:
            yield f"`{job}`"
        elif keys:
            yield f"`{job}` ({', '.join(f'`{key}`' for key in keys)})"


def default(entry: Key) -> str:
    if entry.default is None:
        return "unset"
    return "empty" if entry.default == "" else f"`{show(entry.default)}`"


if __name__ == "__main__":
    print(page(), end="")
