"""Parquet files of a few kB that decode to gigabytes take little, and are told of."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd3_jax.data.ingest import input_parts
from sd3_jax.data.ingest.input_parts import Rejected

ROWS, MEGA = 64, 10**6
WIDE = 2**28  # of a dictionary


def picture():
    data = io.BytesIO()
    Image.new("RGB", (16, 16)).save(data, "PNG")
    return data.getvalue()


def write(path, columns, **options):
    options = dict(compression="zstd", dictionary_pagesize_limit=WIDE) | options
    pq.write_table(pa.table(columns), path, store_schema=False, **options)


def repeated(*values, rows=ROWS, kind=None):
    """The values in turn, each of which is in memory once."""
    places = pa.array([i % len(values) for i in range(rows)], pa.int32())
    return pa.DictionaryArray.from_arrays(places, pa.array(values, kind))


def files(folder):
    """Each with long values that stand there once, for all rows."""
    pictures, long = repeated(picture()), repeated("x" * (30 * MEGA), "a fox")
    write(folder / "text.parquet", {"image": pictures, "text": long})
    ends = list(range(0, 10 * ROWS + 1, 10))
    tags = pa.ListArray.from_arrays(ends, repeated("y" * (3 * MEGA), rows=10 * ROWS))
    write(folder / "list.parquet", {"image": pictures, "tags": tags})
    inside = pa.StructArray.from_arrays([repeated("x" * (30 * MEGA))], ["a"])
    write(folder / "struct.parquet", {"image": pictures, "of": inside})
    large = repeated(b"z" * (150 * MEGA))
    write(folder / "picture.parquet", {"image": large})
    plain = {"image": pictures, "text": ["w" * (3 * MEGA)] * ROWS}
    write(folder / "plain.parquet", plain, use_dictionary=False)


CHILD = """
import json, resource, sys
from sd3_jax.data.ingest import input_parts as ingest
import pyarrow.compute, pyarrow.parquet

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
start = peak()
for path in sys.argv[1:]:
    (part,) = ingest.plan([path])
    rows = [[x.source, getattr(x, "reason", "taken")] for x in ingest.items(part)]
    print(json.dumps([peak() - start, rows]))
"""
ORDER = ("list", "struct", "text", "plain", "picture")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{name: (MB that it and those before it took at most, {row: reason})}."""
    folder = tmp_path_factory.mktemp("bounds")
    files(folder)
    paths = [str(folder / f"{name}.parquet") for name in ORDER]
    assert max(Path(path).stat().st_size for path in paths) < 200_000
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *paths], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    lines = map(json.loads, child.stdout.splitlines())
    return {
        name: (peak, {source.split(":")[1]: why for source, why in rows})
        for name, (peak, rows) in zip(ORDER, lines)
    }


@pytest.mark.parametrize("name", ORDER)
def test_little_is_decoded(found, name):
    """Values stand in memory a few times, not once a row: 2 GB and more before."""
    peak, rows = found[name]
    assert peak < (1000 if name == "picture" else 400), f"{name}: {peak:.0f} MB"
    assert sum(1 if "-" not in row else ROWS for row in rows) == ROWS


def test_long_rows_are_rejected_by_name(found):
    reasons = {name: set(rows.values()) for name, (_, rows) in found.items()}
    of = lambda name: f"its {name} is too large, more than 1048576 bytes"
    assert reasons["text"] == {of("text"), "taken"}
    assert list(found["text"][1].values()).count("taken") == ROWS // 2
    assert reasons["list"] == {of("tags")} and reasons["struct"] == {of("of")}
    assert reasons["picture"] == {f"more than {2**27} bytes"}
    assert found["plain"][1]["0-63"].startswith("too large to decode: text has 192")


def test_what_is_not_large_is_as_it_was(tmp_path):
    texts = [["a fox", None, "b"], [], None, ["c" * 1000] * 3]
    rows = [{"a": "x", "b": [1, 2]}, None, {"a": None, "b": None}, {"a": "y", "b": []}]
    columns = {
        "image": [picture()] * 4,
        "texts": texts,
        "of": rows,
        "n": [1, 2, None, 4],
    }
    columns["json"] = [{"caption": f"row {i}"} for i in range(4)]
    write(tmp_path / "x.parquet", columns)
    (part,) = input_parts.plan([str(tmp_path / "x.parquet")])
    items = list(input_parts.items(part))
    assert not [x for x in items if isinstance(x, Rejected)]
    assert [x.columns["texts"] for x in items] == texts
    assert [x.columns["of"] for x in items] == rows
    assert [x.columns["n"] for x in items] == columns["n"]
    assert [x.columns["caption"] for x in items] == [f"row {i}" for i in range(4)]
    assert all(x.read() == picture() for x in items)
