"""Prompts with categories: PartiPrompts' table, JSON lines, plain text."""

from pathlib import Path

import pytest

from configs import base
from sd3_jax.data import prompt_sheet
from sd3_jax.data.prompt_sheet import PromptRow
from sd3_jax.errors import UserError
from sd3_jax.sampling.job import prompt_file

# The header and the layout of PartiPrompts.tsv; the quotes are a spreadsheet's.
ROOT = Path(__file__).parents[2]
KEY, SYMBOLS = "sample.prompts_file", "Writing & Symbols"
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


def test_sample_reads_the_table_s_prompts(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(TABLE)
    prompts = prompt_file.prompts(base.get_config(), str(path), KEY)
    assert prompts[:2] == ["bond", 'a sign that says "hi", twice']
    path.write_text("bond\tAbstract\n")
    with pytest.raises(
        UserError, match='p.*tsv: the first line has no column "Prompt"'
    ):
        prompt_file.prompts(base.get_config(), str(path), KEY)


def test_the_prompts_of_the_recipes_have_partiprompts_categories():
    lines = (ROOT / "configs/vote_prompts.tsv").read_text().split("\n")
    rows = prompt_sheet.rows(lines, "vote_prompts.tsv")
    assert len(rows) == 48 and len({row.category for row in rows}) == 12
    assert all(row.challenge for row in rows)


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
