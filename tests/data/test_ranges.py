"""Shards in buckets, of which ArrayRecord's own reader is the oracle."""

import contextlib

import numpy as np
import pytest
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)

from sd3_jax import files
from sd3_jax.data import ranges, shards
from sd3_jax.data.ingest import folders, items, listing, parquet, tars
from sd3_jax.errors import RetryableError, UserError

BLOCK = ranges.BLOCK
LENGTHS = [0, 1, 300, BLOCK - 88, BLOCK - 64, BLOCK - 24, BLOCK, 2 * BLOCK, 100_000]
PLAIN = "group_size:1,uncompressed"


def write(path, rows, options=PLAIN):
    writer = ArrayRecordWriter(str(path), options)
    for row in rows:
        writer.write(row)
    writer.close()


@pytest.fixture
def local_ranges(monkeypatch):
    """Ranges of local files, as of a bucket's; the list of those that were read."""
    requests = []

    def read_range(path, start, end):
        requests.append((start, end))
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    monkeypatch.setattr(files, "read_range", read_range)
    return requests


@pytest.mark.parametrize("seed", range(6))
def test_records_are_those_of_array_record(local_ranges, tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path / "a"
    rows = [rng.bytes(rng.choice(LENGTHS)) for _ in range(rng.integers(1, 60))]
    write(path, rows)
    ours, theirs = ranges.RangeReader(str(path)), ArrayRecordReader(str(path))
    assert ours.num_records() == theirs.num_records() == len(rows)
    assert ours.writer_options_string() == theirs.writer_options_string()
    assert ours.read(range(len(rows))) == theirs.read_all() == rows


def test_a_record_is_one_request_and_an_index_at_most_two(local_ranges, tmp_path):
    write(tmp_path / "a", [b"x" * 20] * 40_000)
    reader = ranges.RangeReader(str(tmp_path / "a"))
    assert len(local_ranges) == 2  # the index is longer than what is read at once
    local_ranges.clear()
    assert reader.read([39_999, 7]) == [b"x" * 20] * 2
    assert len(local_ranges) == 2 and sum(b - a for a, b in local_ranges) < 400


def test_damage_is_an_error_that_says_so(local_ranges, tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.bytes(200) for _ in range(30)]
    write(tmp_path / "a", rows)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "b").write_bytes(whole[:-1])
    with pytest.raises(RuntimeError, match="not a whole number of blocks"):
        ranges.RangeReader(str(tmp_path / "b"))
    for _ in range(400):
        data = bytearray(whole)
        used = int(rng.choice([8_000, BLOCK, len(whole) - BLOCK]))  # where bytes are
        data[(used + rng.integers(-8_000, 200)) % len(data)] ^= 1 << rng.integers(8)
        (tmp_path / "b").write_bytes(data)
        try:
            reader = ranges.RangeReader(str(tmp_path / "b"))
            assert len(reader.read(range(reader.num_records()))) <= len(rows)
        except RuntimeError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("options", "reason"),
    [("group_size:4,uncompressed", "several"), ("group_size:1", "a compressed chunk")],
)
def test_shards_of_other_writers_are_refused(local_ranges, tmp_path, options, reason):
    write(tmp_path / "a", [b"x" * 500] * 9, options)
    with pytest.raises(RuntimeError, match=reason):
        ranges.RangeReader(str(tmp_path / "a")).read([0])


def test_the_local_copy_of_a_shard_has_no_name(tmp_path, monkeypatch):
    """A kill leaves nothing in TMPDIR."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(shards.tempfile, "tempdir", None)
    uploads = []
    monkeypatch.setattr(files, "upload", lambda *paths: uploads.append(paths))
    monkeypatch.setattr(shards, "inspect", lambda path: shards.Shard(path, 0, 0, 1))
    with shards.Writer("gs://b/train-0.arecord") as shard:
        shard.add(b"x")
        assert not list(tmp_path.iterdir())
    ((_, path),) = uploads
    assert str(path) == "gs://b/train-0.arecord"
    with pytest.raises(KeyError), shards.Writer("gs://b/c.arecord"):
        raise KeyError
    assert len(uploads) == 1 and not list(tmp_path.iterdir())


def test_only_faults_that_may_pass_are_tried_again(monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    left = [TimeoutError("slow"), ConnectionError("cut")]

    def call():
        if left:
            raise left.pop()
        return "all"

    assert files.retried(call, "gs://b/x") == "all"
    left = [ConnectionError("cut")] * 9
    with pytest.raises(RetryableError, match="gs://b/x: cut"):
        files.retried(call, "gs://b/x")
    assert len(left) == 6
    left = [PermissionError("Forbidden: b/x\nno")]
    with pytest.raises(UserError, match="gs://b/x: Forbidden: b/x no"):
        files.retried(call, "gs://b/x")


class Store:
    """An object store's client whose every answer is an error."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        def fail(*_, **__):
            raise self.error

        return fail


READS = {
    "a picture": lambda: items.read_at("gs://b/a.png"),
    "a picture in a tar": lambda: items.read_at("gs://b/a.tar", 512, 9),
    "a caption": lambda: items.read_columns("gs://b/a.txt", "txt"),
    "a caption in a tar": lambda: items.read_columns("gs://b/a.tar", "txt", 512, 9),
    "a tar": lambda: list(tars.members("gs://b/a.tar")),
    "a path": lambda: listing.look("gs://b/a"),
    "times": lambda: listing.stats(["gs://b/a"]),
    "a folder": lambda: list(folders.plan("gs://b", "", 9)),
    "a parquet file": lambda: parquet.plan("gs://b/a.parquet", "", 9),
}


@pytest.mark.parametrize("what", READS)
def test_a_fault_that_may_pass_rejects_no_picture(what, monkeypatch):
    """Of a picture that was once rejected nobody would ask again."""
    store = Store(ConnectionError("reset by peer"))
    monkeypatch.setattr(files, "PAUSES", ())
    monkeypatch.setattr(files, "_store", lambda path: (store, path))
    monkeypatch.setattr(
        "etils.epath.backend._FileSystemSpecBackend.fs", lambda self, path: store
    )
    with pytest.raises(RetryableError, match="cannot be read: reset by peer"):
        READS[what]()
    store.error = PermissionError("Forbidden")
    with contextlib.suppress(UserError):
        READS[what]()
