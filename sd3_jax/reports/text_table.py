"""A table of text, for Markdown and for a page."""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table under its caption; all columns but the first `names` hold numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1

    def columns(self) -> list[tuple[str, str]]:
        """Each column's title and the class of its cells in templates/parts.html."""
        kinds = ["" if i < self.names else "number" for i in range(len(self.head))]
        return list(zip(self.head, kinds))

    def markdown(self, *, right: bool = True) -> str:
        """The table without its caption; `right` aligns numbers to the right."""
        rules = ["---" if i < self.names else "---:" for i in range(len(self.head))]
        escape = r"\|"  # of a name; it would end the cell
        line = lambda cells: f"| {' | '.join(x.replace('|', escape) for x in cells)} |"
        below = line(rules) if right else "|" + "---|" * len(self.head)
        return "\n".join([line(self.head), below, *map(line, self.rows)])
