"""Prompts with a category and a challenge each, as PartiPrompts has them.

PartiPrompts.tsv (Yu et al. 2022, arXiv 2206.10789) has the columns Prompt, Category,
Challenge and Note. A .jsonl has these names in lower case; other files have a prompt on
each line.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.data import prompt_text
from sd3_jax.errors import UserError, prefixed
from sd3_jax.foreign_text import parse_json, shown


class PromptRow(NamedTuple):
    """A prompt; `category` and `challenge` are empty where the file has none."""

    prompt: str
    category: str = ""
    challenge: str = ""


def read(path: epath.PathLike, name: str) -> list[PromptRow]:
    """The prompts of a file; errors call it `name`, which ends like the path."""
    data = files.read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}") from None
    # Not splitlines(), which also splits a prompt at U+2028 and at a form feed.
    return rows(re.split("\r\n|\n|\r", text), name)


def rows(lines: Sequence[str], name: str) -> list[PromptRow]:
    """The prompts of a file's lines; UserError, with the line, for one that is wrong.

    The suffix of `name` is that of the file; errors begin with it. A prompt that
    appears twice is an error if its categories differ, and one row if not.
    """
    by_prompt: dict[str, PromptRow] = {}
    for number, row in _numbered_rows(lines, name):
        if by_prompt.setdefault(row.prompt, row) != row:
            raise UserError(
                f'{name}, line {number}: "{shown(row.prompt, 60)}" appears twice, with'
                " other categories; remove one of the lines"
            )
    if not by_prompt:
        raise UserError(f"{name}: holds no prompt")
    return list(by_prompt.values())


def table_prompts(lines: Sequence[str], name: str) -> Iterator[tuple[int, str]]:
    """(line number, prompt) of each row of a .tsv; UserError without its header."""
    if not lines or "prompt" not in _titles(lines[0]):
        raise UserError(
            f'{name}: the first line has no column "Prompt"; expected PartiPrompts\''
            " header: Prompt, Category, Challenge, Note, with tabs between"
        )
    at = _titles(lines[0]).index("prompt")
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            cells = [*map(_unquoted, line.split("\t"))]
            yield number, cells[at] if at < len(cells) else ""


def _numbered_rows(lines, name) -> Iterator[tuple[int, PromptRow]]:
    if name.endswith(".tsv"):
        parsed = _table_rows(lines, name)
    elif name.endswith(".jsonl"):
        parsed = ((n, _object_row, x) for n, x in enumerate(lines, 1))
    else:
        parsed = ((n, PromptRow, x) for n, x in enumerate(lines, 1))
    for number, parse, line in parsed:
        if not line.strip():
            continue
        with prefixed(f"{name}, line {number}"):
            row = parse(line.strip())
            yield number, row._replace(prompt=prompt_text.checked(row.prompt))


def _table_rows(lines, name):
    columns = _titles(lines[0]) if lines else []
    prompts = dict(table_prompts(lines, name))

    def row(line: str) -> PromptRow:
        # zip ends with the shorter: PartiPrompts' last column is often left out.
        cells = dict(zip(columns, map(_unquoted, line.split("\t"))))
        return PromptRow(
            cells["prompt"], cells.get("category", ""), cells.get("challenge", "")
        )

    for number in prompts:
        yield number, row, lines[number - 1]


def _object_row(line: str) -> PromptRow:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    texts = isinstance(fields, dict) and [
        fields.get(name, "") for name in PromptRow._fields
    ]
    if not texts or not all(isinstance(x, str) for x in texts) or not texts[0]:
        raise UserError('expected {"prompt": TEXT, "category": TEXT, …}')
    return PromptRow(*texts)


def _titles(line: str) -> list[str]:
    return [cell.strip().lower() for cell in line.split("\t")]


def _unquoted(cell: str) -> str:
    """A cell without the quotes that spreadsheets put around it, as in CSV."""
    inner = cell[1:-1].replace('""', "")
    # A prompt may begin with a quoted word: only a whole cell in quotes is unquoted.
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner:
        return cell
    return cell[1:-1].replace('""', '"')
