"""Plans of records agree with what the records' own code writes and chooses."""

import json
import math
import os

import ml_dtypes
import numpy as np
import pytest

from sd3_jax.data import buckets, records
from sd3_jax.data.records import Record
from sd3_jax.data.shards import Writer
from sd3_jax.tools.plan import storage, synthetic_web

TABLE = buckets.table(1024, 1024, count=9)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "uint8": np.uint8}
SMALL = dict(text_tokens=83, context_dim=8, pooled_dim=4, batch_size=16, part=100)


def zeros(kinds) -> dict[str, np.ndarray]:
    return {k: np.zeros(shape, DTYPES[dtype]) for k, (dtype, shape) in kinds.items()}


def test_sizes_are_a_function_of_the_seed_and_the_number():
    many = synthetic_web.sizes(synthetic_web.BLOCK + 10, seed=3)
    assert many.shape == (synthetic_web.BLOCK + 10, 2) and many.min() >= 16
    assert (synthetic_web.sizes(100, seed=3) == many[:100]).all()
    assert (synthetic_web.sizes(100, seed=4) != many[:100]).any()
    assert (many[: synthetic_web.BLOCK][:10] != many[synthetic_web.BLOCK :]).any()
    assert 900 < np.median(many.max(1)) < 1100
    assert synthetic_web.sizes(0).shape == (0, 2)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("side", [256, 1024])
def test_a_million_fits_are_each_the_buckets_own(count, side):
    table = buckets.table(side, side, count=count)
    pictures = np.concatenate(
        [synthetic_web.sizes(2_000), [[1, 1], [77, 77], [3, 900]]]
    )
    of, enlarged, kept = synthetic_web.fits(pictures, table)
    for (h, w), i, larger, share in zip(pictures.tolist(), of, enlarged, kept):
        found = buckets.fit(h, w, table)
        if found.bucket != table[i]:  # as near as the other, but for the last bit
            away = lambda b, a: abs(math.log(b.width / b.height) - a)
            aspect = math.log(w / h)
            assert math.isclose(away(found.bucket, aspect), away(table[i], aspect))
            continue
        assert math.isclose(found.enlarged, larger) and math.isclose(found.kept, share)


@pytest.mark.parametrize("latents", ["moments", "sample", "image"])
@pytest.mark.parametrize("tokens", [0, 77, 154])
def test_bytes_are_those_of_a_record(latents, tokens):
    given = dict(latents=latents, latents_dtype="float16", channels=16, factor=8)
    given |= dict(text_tokens=tokens, context_dim=24, pooled_dim=12)
    held = storage.arrays(256, 384, **given, text_dtype="bfloat16")
    for source, caption, made_by in (("7", "", ""), ("ü" * 30, 'a "fox"\n', "human")):
        record = Record(zeros(held), source, caption, (9, 9), (0, 0, 9, 9), made_by)
        data = records.encode(record)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = header["__metadata__"]
        assert storage.record_bytes(held, about) == len(data)


def test_a_plans_record_is_written_in_as_many_bytes():
    made = storage.plan(1000, buckets=[(64, 96)], caption=11, source=5, **SMALL)
    held = {
        "moments": np.zeros((8, 12, 32), np.float16),
        "clip": np.zeros((77, 4), ml_dtypes.bfloat16),
        "t5": np.zeros((6, 8), ml_dtypes.bfloat16),
        "pooled": np.zeros(4, ml_dtypes.bfloat16),
    }
    crop = (100, 100, 1000, 1000)  # of as many digits
    record = Record(held, "12345", "a red fox !", (9999, 9999), crop, "synthetic")
    (row,) = made.shapes
    assert row["record_bytes"] == len(records.encode(record))
    for name, x in held.items():
        assert made.tensors[name] == {"dtype": str(x.dtype), "bytes": [x.nbytes]}


@pytest.mark.parametrize("count, side", [(1, 4), (50, 4), (3000, 4), (5, 128)])
def test_a_shards_size(tmp_path, count, side):
    tensors = {"latents": np.zeros((side, side, 16), np.float16)}
    record = Record(tensors, "somewhere", "a fox")
    with Writer(tmp_path / "a.arecord") as shard:
        for _ in range(count):
            shard.write(record)
    size = os.path.getsize(tmp_path / "a.arecord")
    made = storage.shard_bytes(count, len(records.encode(record)))
    assert abs(made - size) <= max(2**16, 0.002 * size)


def test_a_billion_is_a_million_scaled():
    table = buckets.table(256, 256, count=5)
    given = dict(buckets=table, sample=20_000, part=10_000, batch_size=4096)
    few, many = (storage.plan(n, **given) for n in (20_000, 10**9))
    assert sum(row["pictures"] for row in few.shapes) == 20_000
    assert sum(row["pictures"] for row in many.shapes) == 10**9
    for a, b in zip(few.shapes, many.shapes):
        assert math.isclose(a["pictures"] / 20_000, b["pictures"] / 1e9, rel_tol=1e-6)
        assert (a["kept"], a["enlarged"]) == (b["kept"], b["enlarged"])
    assert many.shards == 5 * 10**5 and few.shards == 10
    payload = 10**9 * many.record_bytes
    assert payload < many.bytes < 1.01 * payload
    assert many.epoch == sum(row["pictures"] // 4096 for row in many.shapes)
    assert 0 <= many.left_over < 5 * 4096 / 10**9
    assert math.isclose(many.reading, 4096 * many.record_bytes / 0.5)
    assert json.loads(json.dumps(many._asdict()))["pictures"] == 10**9
    text = many.text()
    assert "1,000,000,000 invented pictures, scaled from 20,000" in text
    assert all(f"{b.height}x{b.width}" in text for b in table)


def test_hours():
    assert storage.hours(3600 * 10, images_per_second=5, chips=2) == 1
    made = storage.plan(7200, buckets=TABLE, images_per_second=2.0, chips=1, **SMALL)
    assert made.hours == 1 and "1.0 hours on 1 chip at 2.0 images/s" in made.text()
    # The paper's times add up to what it measured them at: 256 px and T5's 77 tokens.
    assert math.isclose(storage.table_7_rate(256**2, 154), 1e3 / 23.13)
    assert storage.table_7_rate(1024**2, 154) < storage.table_7_rate(256**2, 154)
    assert storage.table_7_rate(256**2, 0, encoded=False) == math.inf


def test_nothing_to_encode_takes_no_hours_and_no_infinity():
    made = storage.plan(1000, buckets=TABLE, latents="image", text_tokens=0)
    assert made.hours == 0 and "inf" not in made.text()
    json.dumps(made._asdict(), allow_nan=False)


def test_the_papers_own_bytes():
    """Table 7: 65.5 kB of moments, 630.7 of T5's tokens, 121.3 + 202.2 of CLIPs'."""
    made = storage.plan(10, buckets=[(256, 256)], text_tokens=154)
    sizes = {name: x["bytes"][0] for name, x in made.tensors.items()}
    assert sizes["moments"] == 65_536 and sizes["t5"] == 630_784
    pooled_in_float32 = 2 * sizes["pooled"]
    assert abs(sizes["clip"] + pooled_in_float32 - 121_300 - 202_200) < 300


def test_small_plans_hold():
    for n in (0, 1, 2):
        made = storage.plan(n, buckets=TABLE, **SMALL)
        assert made.pictures == n == sum(row["pictures"] for row in made.shapes)
        assert (made.bytes > 0) == (n > 0) and made.text()
    with pytest.raises(ValueError, match='latents "modes": wanted one of moments, sa'):
        storage.plan(1, buckets=TABLE, latents="modes")
