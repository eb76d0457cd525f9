"""Prompts with categories: PartiPrompts' table, JSON lines, plain text."""

import pytest

from sd3_jax.data import prompt_sheet
from sd3_jax.data.prompt_sheet import PromptRow
from sd3_jax.errors import UserError

# The header and the layout of PartiPrompts.tsv; the quotes are a spreadsheet's.
SYMBOLS = "Writing & Symbols"
TABLE = """\
Prompt\tCategory\tChallenge\tNote
bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings
"a sign that says ""hi"", twice"\tWorld Knowledge\tWriting & Symbols\t
"Stop" on a red sign\tArtifacts\tWriting & Symbols
a cat
"""


def test_a_table_has_categories():
    rows = prompt_sheet.rows(TABLE.split("\n"), "p.tsv")
    assert rows == [
        PromptRow("bond", "Abstract", "Basic"),
        PromptRow(
            'a sign that says "hi", twice', "World Knowledge", "Writing & Symbols"
        ),
        PromptRow('"Stop" on a red sign', "Artifacts", SYMBOLS),
        PromptRow("a cat"),
    ]


def test_other_files_have_a_prompt_a_line():
    assert prompt_sheet.rows(["a cat", "", "a dog"], "p.txt") == [
        PromptRow("a cat"),
        PromptRow("a dog"),
    ]
    lines = ['{"prompt": "a cat", "category": "Animals", "seed": 3}']
    assert prompt_sheet.rows(lines, "p.jsonl") == [PromptRow("a cat", "Animals")]


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("p.tsv", "bond\tAbstract", 'no column "Prompt"'),
        ("p.tsv", "Prompt\tCategory\na\tX\na\tY", 'line 3: "a" appears twice'),
        ("p.tsv", "Prompt\n", "holds no prompt"),
        ("p.jsonl", '{"prompt": 3}', "line 1: expected"),
        ("p.jsonl", "{", "line 1: not JSON"),
        ("p.txt", "a\x00b", "line 1: .*control characters"),
    ],
)
def test_a_bad_line_is_named(name, text, complaint):
    with pytest.raises(UserError, match=complaint):
        prompt_sheet.rows(text.split("\n"), name)
