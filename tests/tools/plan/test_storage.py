"""Bytes of records that precompute announces are those that it writes."""

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from sd3_jax.assembly import record_shapes
from sd3_jax.data.buckets import Bucket
from sd3_jax.tools.plan import storage


def sizes(height, width, length=154, *, encoded=("moments", "clip", "t5", "pooled")):
    config = ConfigDict(
        {
            "model": {"channels": 16, "context_dim": 4096, "pooled_dim": 2048},
            "text": {"length": length},
            "encode": {"latents_dtype": "float16", "text_dtype": "bfloat16"},
        }
    )
    tensors = record_shapes.stored_tensors(config, Bucket(height, width), encoded)
    return {name: storage.tensor_bytes({name: x}) for name, x in tensors.items()}


def test_the_papers_own_bytes():
    """Table 7: 65.5 kB of moments, 630.7 of T5's tokens, 121.3 + 202.2 of CLIPs'."""
    found = sizes(256, 256)
    assert found["moments"] == 65_536 and found["t5"] == 630_784
    pooled_in_float32 = 2 * found["pooled"]
    assert abs(found["clip"] + pooled_in_float32 - 121_300 - 202_200) < 300


def test_bytes_are_those_of_arrays():
    held = {
        "moments": np.zeros((8, 12, 32), np.float16),
        "clip": np.zeros((77, 2048), ml_dtypes.bfloat16),
        "t5": np.zeros((6, 4096), ml_dtypes.bfloat16),
        "pooled": np.zeros(2048, ml_dtypes.bfloat16),
    }
    assert sizes(64, 96, 83) == {name: x.nbytes for name, x in held.items()}
    pictures = sizes(64, 96, encoded=("image", "rejected_image"))
    assert pictures == dict.fromkeys(("image", "rejected_image"), 64 * 96 * 3)


def test_the_largest_bucket_bounds_what_is_listed():
    first, second = storage.lines([900_000, 1_000_000], [4_096, 4])
    assert "900,000 to 1,000,000 bytes" in first
    assert second == "listed: 4,100 files, at most 4.10 GB of tensors"


def test_what_is_not_listed_has_no_sum():
    (record, uncounted) = storage.lines([12, 12], [None, None])
    assert "record: 12 bytes" in record and "not listed: 2 parts" in uncounted
