"""Examples of shards: any index, any host, any epoch; and what is wrong with shards."""

import functools
import json
import logging
import os

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from sd3_jax.data import records, shards, tokenizers
from sd3_jax.data.dataset import Records
from sd3_jax.data.digits import Digits
from sd3_jax.data.loader import Loader
from sd3_jax.data.records import BadRecord, Record
from sd3_jax.data.shards import Writer
from sd3_jax.data.synthetic import Synthetic
from sd3_jax.errors import UserError

SIZE = 6  # of a batch


def record(number: int, side: int = 2) -> Record:
    """A record that says in all of its values which it is."""
    fill = lambda *shape: np.full(shape, number, np.float32)
    tensors = {
        "latents": fill(side, side, 4),
        "context": fill(2, 3),
        "pooled": fill(5).astype(np.float16),
    }
    return Record(tensors, f"picture {number}", f"the number {number}")


def write(path, numbers, **options):
    with Writer(path) as shard:
        for number in numbers:
            shard.write(record(number, **options))
    return str(path)


def write_raw(path, data):
    """As another's program may: whatever bytes."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for one in data:
        writer.write(one)
    writer.close()
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Records 0 to 22 in three shards, of 10, 10 and 3."""
    for place, numbers in enumerate((range(10), range(10, 20), range(20, 23))):
        write(tmp_path / f"train-{place:05d}.arecord", numbers)
    return tmp_path


def numbers(batch) -> list[int]:
    flat = [x.reshape(len(x), -1) for x in batch.values()]
    assert all((x == flat[0][:, :1]).all() for x in flat)  # a row is of one record
    return flat[0][:, 0].astype(int).tolist()


def mixture(folder, **options):
    for place in range(30):
        write(folder / "b" / f"{place}.arecord", [100 + place])
    paths = (f"{folder}/train-*.arecord", f"{folder}/b/*.arecord")
    return Records(paths, weights=(3, 1), **options)


# The order


def test_every_epoch_is_another_permutation(folder):
    source = Records([f"{folder}/*.arecord"], seed=3)
    assert len(source) == 23 and source.sets[0].numbers == range(23)
    epochs = [numbers(source.batch(np.arange(e * 23, (e + 1) * 23))) for e in range(5)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5
    other = Records([f"{folder}/*.arecord"], seed=4).batch(np.arange(23))
    assert numbers(other) not in epochs


def test_the_order_is_the_one_of_the_runs_so_far(folder):
    """A run goes on as it began; if another grain shuffles otherwise, it is seen."""
    source = Records([f"{folder}/*.arecord"], seed=3)
    astride = source.batch(np.arange(20, 27))  # the end of an epoch
    assert numbers(astride) == [15, 5, 17, 14, 1, 15, 7]
    mixed = mixture(folder).batch(np.arange(8))
    assert numbers(mixed) == [21, 2, 13, 118, 14, 9, 7, 113]


def test_a_mixture_keeps_its_shares_and_the_epochs_of_each_set(folder):
    drawn = numbers(mixture(folder).batch(np.arange(400)))
    first = [n for n in drawn if n < 100]
    second = [n for n in drawn if n >= 100]
    assert (len(first), len(second)) == (300, 100)
    for start in range(0, 400, 20):
        assert abs(sum(n < 100 for n in drawn[start : start + 20]) - 15) <= 1
    for e in range(300 // 23):
        assert sorted(first[e * 23 : (e + 1) * 23]) == list(range(23))
    for e in range(100 // 30):
        assert sorted(second[e * 30 : (e + 1) * 30]) == list(range(100, 130))


def load(source, rows=tuple(range(SIZE)), **options):
    ids = functools.partial(tokenizers.bytes_of, length=7)
    rows = np.array(rows)
    return Loader(source, batch_size=SIZE, rows=rows, tokenize=ids, **options)


APART = np.array([[0, 3, 5], [1, 2, 4]])  # two hosts that take turns
MAKERS = [
    mixture,
    lambda folder: Records([f"{folder}/*.arecord"]),
    lambda folder: mixed(folder),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_step_has_the_same_records_on_any_number_of_hosts(folder, make):
    whole = load(make(folder))
    batches = [numbers(next(whole)) for _ in range(10)]  # more than two epochs
    for hosts in (1, 2, 3):
        shares = np.split(np.arange(SIZE), hosts)
        loaders = [load(make(folder), rows) for rows in shares]
        for batch in batches:
            assert sum((numbers(next(one)) for one in loaders), []) == batch
    uneven = np.split(np.arange(SIZE), [1, 2, 4])  # four hosts
    loaders = [load(make(folder), rows) for rows in uneven]
    for batch in batches:
        assert sum((numbers(next(one)) for one in loaders), []) == batch
    apart = [load(make(folder), rows) for rows in APART]
    for batch in batches:
        both = [numbers(next(one)) for one in apart]
        assert both == [[batch[i] for i in rows] for rows in APART]


@pytest.mark.parametrize("make", MAKERS)
def test_a_run_goes_on_at_any_step(folder, make):
    whole = load(make(folder))
    batches = [numbers(next(whole)) for _ in range(12)]
    for start, threads in [(2, 0), (3, 2), (4, 1), (11, 3)]:  # 23 records: 3 is astride
        again = load(make(folder), start=start, threads=threads)
        for batch in batches[start:]:
            assert numbers(next(again)) == batch


def test_many_threads_read_what_one_does(folder):
    source, alone = mixture(folder), mixture(folder)
    reader = load(source, threads=8, prefetch=16)
    for step in range(60):
        expected = alone.batch(np.arange(step * SIZE, (step + 1) * SIZE))
        assert numbers(next(reader)) == numbers(expected)


def test_more_shards_than_files_may_be_open(folder, monkeypatch):
    monkeypatch.setattr("sd3_jax.data.dataset.OPEN", 2)
    source = mixture(folder)
    for _ in range(2):
        assert sorted(set(numbers(source.batch(np.arange(200))))) == sorted(
            {*range(23), *range(100, 130)}
        )
    assert source._reader.cache_info().currsize == 2


# Buckets

SHAPES = {
    f"{8 * side}x{8 * side}": {
        "latents": (side, side, 4),
        "context": (2, 3),
        "pooled": (5,),
    }
    for side in (1, 2, 3)
}


def bucketed(folder, named=True, **options):
    """Records 0 to 36, of three shapes, in five shards whose order is not theirs."""
    if not folder.joinpath("c").exists():
        begin = 0
        for place, (side, count) in enumerate(
            [(3, 4), (1, 13), (2, 9), (1, 9), (2, 2)]
        ):
            name = f"train-{place:05d}" + f"-{8 * side}x{8 * side}" * named
            write(
                folder / "c" / f"{name}.arecord", range(begin, begin + count), side=side
            )
            begin += count
    options = dict(shapes=SHAPES, batch_size=SIZE) | options
    return Records([f"{folder}/c/*.arecord"], **options)


def mixed(folder, **options):
    bucketed(folder)
    paths = (f"{folder}/c/*.arecord", f"{folder}/train-*.arecord")
    options = dict(shapes=SHAPES, batch_size=SIZE) | options
    return Records(paths, weights=(3, 1), **options)


def side(batch) -> int:
    return batch["latents"].shape[1]


@pytest.mark.parametrize("named", [True, False])
def test_a_batch_is_of_one_bucket_and_every_record_comes_once(folder, named):
    source = bucketed(folder, named)
    assert [(b.name, len(b.sets[0].numbers)) for b in source.buckets] == [
        ("8x8", 22),
        ("16x16", 11),
        ("24x24", 4),
    ]
    loader, drawn = load(source), {1: [], 2: [], 3: []}
    for _ in range(370):
        batch = next(loader)
        drawn[side(batch)] += numbers(batch)
    for found, count in zip(drawn.values(), (22, 11, 4)):
        assert abs(len(found) - 60 * count) <= 3 * SIZE  # sixty epochs
    shapes = {1: [*range(4, 17), *range(26, 35)], 2: [*range(17, 26), 35, 36]}
    for of, own in (shapes | {3: range(4)}).items():
        for start in range(0, len(drawn[of]) - len(own), len(own)):
            assert sorted(drawn[of][start : start + len(own)]) == sorted(own)


def test_the_buckets_of_the_runs_so_far(folder):
    loader = load(bucketed(folder, seed=3))
    batches = [next(loader) for _ in range(8)]
    found = [(side(b), numbers(b)[0]) for b in batches]
    assert found[:4] == [(1, 8), (2, 21), (1, 31), (3, 3)]
    assert found[4:] == [(1, 27), (1, 5), (2, 18), (1, 28)]


def test_a_mixture_keeps_its_shares_over_buckets(folder):
    loader = load(mixed(folder))
    batches = [next(loader) for _ in range(200)]
    steps = [sum(side(b) == one for b in batches) for one in (1, 2, 3)]
    # Three quarters are of the first set, 22, 11 and 4 of 37; the other is all 16 x 16.
    for one, share in zip(steps, (22 / 37 * 0.75, 11 / 37 * 0.75 + 0.25, 3 / 37)):
        assert abs(one - 200 * share) < 3


def test_names_of_a_bucketed_step(folder):
    source = bucketed(folder)
    loader = load(source)
    for step in range(5):
        batch, names = next(loader), loader.names(step)
        places = [source._names.index(name.split(":")[0]) for name in names]
        assert {
            source.shards[p].path.count(f"-{8 * side(batch)}x") for p in places
        } == {1}


def test_a_shard_of_no_bucket(folder):
    shapes = {name: x for name, x in SHAPES.items() if name != "24x24"}
    with pytest.raises(UserError, match="fits no bucket; expected 8x8, 16x16"):
        bucketed(folder, named=False, shapes=shapes)


def test_a_name_that_lies_is_found_out(folder):
    path = write(folder / "d" / "train-0-8x8.arecord", range(5), side=2)
    with pytest.raises(
        BadRecord, match=r"latents: shape \(2, 2, 4\), expected \(1, 1, 4"
    ):
        Records([path], shapes=SHAPES, batch_size=5).batch(np.arange(5))


def test_batches_have_the_first_records_dtypes(folder):
    narrow = record(0)
    narrow.tensors["latents"] = narrow.tensors["latents"].astype(ml_dtypes.bfloat16)
    for name, order in ("exact", (record(1), narrow)), ("not", (narrow, record(1))):
        with Writer(folder / f"{name}.arecord") as shard:
            [shard.write(one) for one in order]
    source = Records([f"{folder}/exact.arecord"])
    batch = source.batch(np.arange(2))
    assert batch["latents"].dtype == np.float32 and batch["pooled"].dtype == np.float16
    with pytest.raises(
        BadRecord, match="dtype float32, expected bfloat16 as in the first record"
    ):
        Records([f"{folder}/not.arecord"]).batch(np.arange(2))
    source.select_fields(["latents", "caption"])
    assert source.batch(np.arange(2)).keys() == {"latents", "caption"}


# Names and identity


def test_examples_have_names(folder):
    source = Records([f"{folder}/*.arecord"])
    batch = numbers(source.batch(np.arange(SIZE, 2 * SIZE)))
    names = [f"train-{n // 10:05d}.arecord:{n % 10}" for n in batch]
    assert load(source, slice(2, 3), start=9).names(1) == names
    write(folder / "more" / "train-00000.arecord", range(50, 53))
    both = Records([f"{folder}/*.arecord", f"{folder}/more/*.arecord"])
    assert f"{folder}/more/train-00000.arecord:2" in both.names(np.arange(26))
    digits = load(Digits(16, 16))
    assert digits.names(2)[:2] == ["digits:12", "digits:13"]
    assert Synthetic(8, 8, 4, 1, 1, 1).names(np.array([104])) == ["synthetic:104"]


def test_identity_is_of_the_data_and_not_of_where_it_lies(folder, tmp_path):
    here = Records([f"{folder}/*.arecord"], seed=1).identity()
    assert here["records"] == 23 and here["shards"] == 3
    there = tmp_path / "elsewhere"
    there.mkdir()
    for path in folder.glob("*.arecord"):
        os.link(path, there / path.name)
    identity = lambda **o: Records([f"{there}/*.arecord"], **o).identity()
    assert identity(seed=1) == here != identity(seed=2)
    write(there / "train-00002.arecord", range(4))
    assert identity(seed=1) != here
    for source in (Digits(16, 16), Synthetic(8, 8, 4, 1, 1, 1)):
        assert json.loads(json.dumps(source.identity())) == source.identity()
    assert Digits(16, 16).identity() != Digits(16, 16, seed=1).identity()


# Mistakes


def broken(folder, name="train-00001.arecord"):
    return folder / name, (folder / name).read_bytes()


def refused(*paths, **options):
    with pytest.raises(UserError) as error:
        Records(list(map(str, paths)), **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def test_shards_that_cannot_be_read(folder):
    every = folder / "*.arecord"
    assert "matches no file" in refused(folder / "*.record")
    assert "no paths" in refused()
    assert "x.arecord: cannot be read: No such file" in refused(folder / "x.arecord")
    assert f"{folder}: is a folder" in refused(folder)
    assert "** is not supported" in refused(folder / "**" / "*.arecord")
    path, data = broken(folder)
    for size in (1, 100, len(data) // 2, len(data) - 65_536, len(data) - 1):
        path.write_bytes(data[:size])
        text = refused(every)
        assert f"{path}: not a shard of records, or truncated or damaged" in text
    path.write_bytes(b"")
    assert f"{path}: has 0 bytes" in refused(every)
    path.write_bytes(os.urandom(200_000))
    assert f"{path}: not a shard" in refused(every)
    write_raw(path, [])
    assert f"{path}: holds 0 records" in refused(every)


def test_the_same_shard_twice(folder, monkeypatch):
    one = folder / "train-00001.arecord"
    assert f"{one}: the same shard is listed twice" in refused(folder / "*d", one)
    assert "twice" in refused(folder / "*1.arecord", folder / "train*", weights=(1, 2))
    (folder / "link.arecord").symlink_to(one)
    text = refused(folder / "*.arecord")
    assert "link.arecord" in text and str(one) in text
    (folder / "link.arecord").unlink()
    os.link(one, folder / "hard.arecord")
    assert "hard.arecord" in refused(folder / "*.arecord")
    (folder / "hard.arecord").unlink()
    monkeypatch.chdir(folder)
    assert "twice" in refused(one, "train-00001.arecord")
    assert "twice" in refused(one, f"../{folder.name}/train-00001.arecord")


@pytest.mark.parametrize(
    "weights, words",
    [
        ((1,), "one for each of 2 paths"),
        ((1, 2, 3), "one for each of 2 paths"),
        ((0, 0), "expected finite numbers > 0"),
        ((1, 0.0), "expected finite numbers > 0"),
        ((1, -0.5), "expected finite numbers > 0"),
        ((1, float("nan")), "expected finite numbers > 0"),
        ((1, float("inf")), "expected finite numbers > 0"),
        ((1, 1e-310), "no weight may be over 1e+06 times another"),
    ],
)
def test_weights_that_are_none(folder, weights, words):
    paths = (folder / "train-00000.arecord", folder / "train-00001.arecord")
    assert words in refused(*paths, weights=weights)


def test_a_name_with_brackets_is_a_name(folder):
    odd = folder / "odd[0:5].arecord"
    (folder / "train-00001.arecord").rename(odd)
    assert len(Records([str(odd)])) == 10  # array_record's own source would take five
    found = shards.expand(f"{folder}/train-0000[02].arecord")
    assert found == [f"{folder}/train-0000{i}.arecord" for i in (0, 2)]


def test_a_shard_that_changes_while_it_is_read(folder):
    source = Records([f"{folder}/train-0000[12].arecord"])
    write(folder / "train-00002.arecord", range(2))
    with pytest.raises(
        UserError, match="train-00002.arecord changed during the run: it has 2"
    ):
        source.batch(np.arange(13))


def test_wide_groups_are_warned_of(tmp_path, caplog):
    writer = ArrayRecordWriter(str(tmp_path / "a.arecord"), "group_size:4")
    for number in range(8):
        writer.write(records.encode(record(number)))
    writer.close()
    with caplog.at_level(logging.WARNING):
        source = Records([f"{tmp_path}/a.arecord"])
    assert "was not written with group_size:1" in caplog.text
    assert sorted(numbers(source.batch(np.arange(8)))) == list(range(8))


# Bad records


def spoil(folder, *bad):
    """Records 0 to 19 in one shard, some of them no records."""
    data = [
        b"not a record" if n in bad else records.encode(record(n)) for n in range(20)
    ]
    return [write_raw(folder / "spoilt.arecord", data)]


def test_the_first_bad_record_ends_a_run(tmp_path):
    paths = spoil(tmp_path, 13)
    loader = load(Records(paths))
    with pytest.raises(BadRecord) as error:
        for _ in range(4):
            next(loader)
    words = f"{paths[0]}:13: not a record: a header of"
    assert str(error.value).startswith(words)
    paths = spoil(tmp_path, 0)  # the first is looked at at once
    with pytest.raises(BadRecord, match=":0: not a record"):
        Records(paths)


def test_a_bit_that_flips_is_found(folder):
    path, data = broken(folder)
    place = data.index(b"picture 14" if b"picture 14" in data else b"\x28\xb5\x2f\xfd")
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    source = Records([f"{folder}/*.arecord"])
    with pytest.raises(BadRecord, match=rf"{path}:\d: Corrupted .* hash mismatch"):
        source.batch(np.arange(23))


def test_a_fault_of_the_disk_is_no_bad_record(folder, monkeypatch):
    source = Records([f"{folder}/*.arecord"], bad_records=0.5)

    class Reader:
        def read(self, _):
            raise RuntimeError("read() failed: Input/output error")

    monkeypatch.setattr(source, "_reader", lambda _: Reader())
    with pytest.raises(UserError, match="cannot be read: read") as error:
        source.batch(np.arange(3))
    assert not isinstance(error.value, BadRecord)


def test_the_next_good_record_takes_a_bad_ones_place(tmp_path, caplog):
    paths = spoil(tmp_path, 0, 7, 8, 19)
    source = Records(paths, bad_records=0.2)
    good = write(tmp_path / "good.arecord", range(20))
    drawn = numbers(Records([good]).batch(np.arange(60)))
    instead = {0: 1, 7: 9, 8: 9, 19: 1}
    expected = [instead.get(n, n) for n in drawn]
    with caplog.at_level(logging.WARNING):
        assert numbers(source.batch(np.arange(60))) == expected
    assert len([r for r in caplog.records if "the next good record" in r.message]) == 4
    for i in reversed(range(60)):  # each alone, and in another order
        assert numbers(Records(paths, bad_records=0.2).batch(np.array([i]))) == [
            expected[i]
        ]


def test_more_bad_records_than_may_be(tmp_path):
    paths = spoil(tmp_path, 3, 7, 8, 15)
    source = Records(paths, bad_records=0.15)
    with pytest.raises(BadRecord, match="4 bad records exceed .* = 0.15 of 20"):
        source.batch(np.arange(20))
    paths = spoil(tmp_path, *range(20))
    with pytest.raises(BadRecord, match="20 bad|19 bad|all records of its set are bad"):
        Records(paths, bad_records=0.94)


def test_a_bad_record_is_replaced_within_its_set(tmp_path):
    paths = spoil(tmp_path, 19)
    other = write(tmp_path / "other.arecord", range(100, 110))
    source = Records([*paths, other], weights=(1, 1), bad_records=0.1)
    drawn = numbers(source.batch(np.arange(40)))
    assert sum(n >= 100 for n in drawn) == 20
    assert drawn.count(0) == 2 and 19 not in drawn


def test_every_record_has_the_shape_of_the_first(tmp_path):
    paths = [write(tmp_path / "a.arecord", range(4))]
    paths.append(write(tmp_path / "b.arecord", range(4), side=3))
    words = r"b.arecord:\d: latents: shape \(3, 3, 4\), expected \(2, 2, 4\)"
    with pytest.raises(BadRecord, match=words):
        Records(paths).batch(np.arange(8))
    drawn = numbers(Records(paths, bad_records=0.5).batch(np.arange(8)))
    assert sorted(drawn)[0] == 0 and len(drawn) == 8


# The writer


def test_a_shard_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "a.arecord"
    with pytest.raises(KeyError):
        with Writer(path) as shard:
            shard.write(record(1))
            assert [p.name for p in path.parent.iterdir()] == ["a.arecord.partial"]
            raise KeyError
    assert not list(path.parent.iterdir())
    with pytest.raises(UserError, match="no record was written"):
        with Writer(path):
            pass
    assert not list(path.parent.iterdir())
    with Writer(path) as shard:
        shard.write(record(1))
        with pytest.raises(BadRecord):
            shard.write(record(2)._replace(source=""))
        assert not path.exists()
    assert shard.count == 1 and [p.name for p in path.parent.iterdir()] == ["a.arecord"]
    assert numbers(Records([str(path)]).batch(np.arange(2))) == [1, 1]


def test_a_killed_writer_leaves_what_nobody_reads(tmp_path):
    path = tmp_path / "a.arecord"
    shard = Writer(path)
    shard.write(record(1))  # and never closed
    (partial,) = tmp_path.iterdir()
    assert "matches no file" in refused(tmp_path / "*.arecord")
    assert f"{partial}: " in refused(tmp_path / "*")
    shard.__exit__(KeyError, None, None)
    assert write(path, [4]) == str(path)  # the next one has no trouble with it


@pytest.mark.parametrize("path", ["/dev/full/a.arecord", "/proc/a.arecord"])
def test_where_no_shard_can_be_written(path):
    with pytest.raises(UserError, match=f"{path}: cannot be written: "):
        write(path, [1])
