"""metadata.csv of pandas, Excel and people: read as it is meant, or refused by line."""

import pytest

from sd3_jax.data.ingest import captions, filters, input_parts
from sd3_jax.data.ingest.input_parts import Rejected


def ingested(folder, text):
    """Items by source, and reasons, of a.png to c.png with this metadata.csv."""
    for name in "a", "b", "c":
        (folder / f"{name}.png").write_bytes(b"")
    data = text.encode() if isinstance(text, str) else text
    (folder / "metadata.csv").write_bytes(data)
    (part,) = input_parts.plan([str(folder)])
    items = list(input_parts.items(part))
    kept = {x.source: x for x in items if not isinstance(x, Rejected)}
    return kept, {x.source: x.reason for x in items if isinstance(x, Rejected)}


def caption(item, spec="caption"):
    drawn = captions.draw(item.columns, captions.parse([spec]), seed=0, source="a")
    return drawn.text


def test_numerals_and_nulls_mean_the_same_in_every_column(tmp_path):
    rows = "a.png,{0},{0},{0}\nb.png,42,42,42\nc.png,007,007,007\n"
    for null in "nan", "NaN", "None", "null", "", "<NA>", " ":
        text = "file_name,text,TEXT,mine\n" + rows.format(null)
        kept, _ = ingested(tmp_path, text)
        for spec in "text", "TEXT", "mine", "caption":
            texts = [caption(item, spec) for item in kept.values()]
            assert texts == ["", "42", "007"], (null, spec)
    passes = filters.parse(["mine>41"])
    assert not filters.refuse(passes, kept["b.png"].columns)
    assert filters.refuse(passes, kept["a.png"].columns).reason == "no mine"


HEADERS = {
    "tabs": "file_name\ttext\na.png\ta fox, red\n",
    "semicolons": "file_name;text\r\na.png;a fox, red\r\n",
    "quoted names": '"file_name";"text"\n"a.png";"a fox, red"\n',
    "spaces": 'file_name , text \na.png, "a fox, red"\n',
    "UTF-16": 'file_name,text\na.png,"a fox, red"\n'.encode("utf-16"),
    "UTF-8 with a mark": b'\xef\xbb\xbffile_name,text\na.png,"a fox, red"\n',
    "an index": ',file_name,text\n0,a.png,"a fox, red"\n',
    "no name, twice": 'file_name,text,,\na.png,"a fox, red",,\n',
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(tmp_path, case):
    kept, rejected = ingested(tmp_path, HEADERS[case])
    assert caption(kept["a.png"]) == "a fox, red" and not rejected


QUOTE = "a quote that is not closed; close it, or write a quote in a caption twice"
BROKEN = {
    "to the end": ('a.png,fine\nb.png,"a fox\nc.png,a hen\n', f"line 3: {QUOTE}"),
    "to the next": ('a.png,"a fox\nb.png,"a hen"\n', f"line 2: {QUOTE}"),
    "to a last one": ('a.png,"a fox\nb.png,a hen"\n', f"line 2: {QUOTE}, and takes"),
    "inside": ('a.png,"a "red" fox"\n', f"line 2: {QUOTE}"),
    "in a long caption": (
        f'a.png,"{"x" * 2**20}y"\n',
        "line 2: a value of more than 1048576 char",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_rows_that_cannot_be_told_apart_are_refused_by_line(tmp_path, case):
    text, reason = BROKEN[case]
    kept, rejected = ingested(tmp_path, f"file_name,text\n{text}")
    assert not kept and rejected["metadata.csv"].startswith(f"cannot be read: {reason}")
    assert rejected["a.png"].startswith(f"its metadata.csv cannot be read: {reason}")


def test_captions_of_several_lines_and_long_ones_are_read(tmp_path):
    text = f'file_name,text\na.png,"a ""red"" fox\nin snow"\n\nb.png,{"x" * 200_000}\n'
    kept, rejected = ingested(tmp_path, text + "c.png,one,too many\n")
    assert caption(kept["a.png"]) == 'a "red" fox\nin snow'
    assert caption(kept["b.png"]).startswith("xxx")
    assert rejected["metadata.csv:6"].startswith("a line that cannot be read: more")


def test_a_column_twice_is_refused(tmp_path):
    kept, rejected = ingested(tmp_path, "file_name,text,text \na.png,a fox,a hen\n")
    why = 'line 1: the column "text" comes 2 times; rename or remove one'
    assert not kept and rejected["metadata.csv"] == f"cannot be read: {why}"


@pytest.mark.parametrize(
    "text", ['file_name,"te\nxt"\na.png,fox\n', "file_name," * 2**17]
)
def test_a_header_that_does_not_end_is_refused(tmp_path, text):
    kept, rejected = ingested(tmp_path, text)
    words = "cannot be read: line 1: expected the columns' names"
    assert not kept and rejected["metadata.csv"].startswith(words)
