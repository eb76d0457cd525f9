"""The names in the tables of docs/reference/argument_names.md exist, on both sides."""

import inspect
import re
from pathlib import Path

import diffusers

from sd3_jax import api
from sd3_jax.config import schema, unknown_keys

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "argument_names.md"
PIPELINES = ("", "Img2Img", "Inpaint", "ControlNet")
KEYS = {
    key
    for name, group in schema.GROUPS.items()
    for key, _ in schema.flat(group.keys, f"{name}." if name else "")
}


def columns(section: str) -> dict[str, list[str]]:
    """The names in backticks of a section's table, by its column."""
    pattern = rf"^## {section}\n(.*?)(?=^## |\Z)"
    (text,) = re.findall(pattern, PAGE.read_text(), re.M | re.S)
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    heads, *cells = rows
    assert all(len(row) == len(heads) for row in cells), section
    return {
        head: [x for row in cells for x in re.findall("`([^`]+)`", row[i])]
        for i, head in enumerate(heads)
    }


def parameters(function) -> set[str]:
    return {*inspect.signature(function).parameters} - {"self"}


def test_every_argument_of_the_pipeline_has_a_row():
    pipelines = (f"StableDiffusion3{kind}Pipeline" for kind in PIPELINES)
    first, *others = [parameters(getattr(diffusers, x).__call__) for x in pipelines]
    (theirs, *_) = columns("diffusers: call the pipeline").values()
    assert not first - {*theirs}
    assert not {*theirs} - first.union(*others)
    assert len(theirs) == len({*theirs})


def test_our_functions_have_these_arguments():
    call = columns("diffusers: call the pipeline")["`sd3_jax.generate`"]
    load = columns("diffusers: load and save")["`sd3_jax`"]
    assert len(call) > 20 and len(load) > 8
    more = columns("diffusers: adapters and guiders")["`sd3_jax`"]
    for name in call + load + more:
        pattern = r"(bundle\.)?(?:(\w+)\()?(\w*)=?\)?"
        of_bundle, function, keyword = re.fullmatch(pattern, name).groups()
        home = api.Bundle if of_bundle else api
        if of_bundle and not function:
            assert hasattr(home, keyword), name
            continue
        arguments = parameters(getattr(home, function or "generate"))
        assert not keyword or keyword in arguments, name


def test_our_keys_exist():
    sections = re.findall(r"^## (.+)$", PAGE.read_text(), re.M)
    keys = [key for section in sections for key in columns(section)["key"]]
    assert len(sections) == 5 and len(keys) > 80
    assert not {*keys} - KEYS - {"--workdir"}


def test_a_name_that_the_command_line_knows_has_the_table_s_key():
    rows = [
        line.split("|")[1:-1] for line in PAGE.read_text().split("\n") if "|" in line
    ]
    seen = 0
    for name, key in unknown_keys.OTHER_NAMES.items():
        cells = [row[1:] for row in rows if f"`{name}`" in row[0]]
        seen += bool(cells)
        assert not cells or f"`{key}`" in str(cells), name
    assert seen > 15
    assert {*unknown_keys.OTHER_NAMES.values()} <= KEYS
