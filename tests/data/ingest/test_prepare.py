"""A preference's other picture: found by its column, cut to the first one's bucket."""

import json

import numpy as np
import pytest
from PIL import Image

from sd3_jax.data.buckets import Bucket
from sd3_jax.data.ingest import captions, input_parts, prepare
from sd3_jax.data.ingest.items import Rejected

ROWS = [
    {"file_name": "a.png", "caption": "a fox", "worse": "other/b.png"},
    {"file_name": "c.png", "caption": "a fox", "worse": "other/none.png"},
    {"file_name": "d.png", "caption": "a fox"},
    {"file_name": "e.png", "caption": "a fox", "worse": "other/broken.png"},
    {"file_name": "f.png", "caption": "a fox", "worse": "other/../../b.png"},
    {"file_name": "g.png", "caption": "a fox", "worse": "other\\b.png"},
    {"file_name": "h.png", "caption": "a fox", "worse": "other\\..\\..\\b.png"},
]


@pytest.fixture
def ready(tmp_path):
    """What becomes of each picture, by its name."""
    folder = tmp_path / "pictures"
    (folder / "other").mkdir(parents=True)
    for i, row in enumerate(ROWS):
        colour = (10 * i, 50, 90)
        Image.new("RGB", (64, 48), colour).save(folder / row["file_name"])
    Image.new("RGB", (40, 80), (200, 0, 0)).save(folder / "other" / "b.png")
    (folder / "other" / "broken.png").write_bytes(b"\x89PNG and no more")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "metadata.jsonl").write_text(lines)
    settings = prepare.Settings(
        buckets=[Bucket(32, 32), Bucket(24, 32)],
        captions=captions.parse(("caption=1",)),
        rejected="worse",
        folder=str(folder),
    )
    (part,) = input_parts.plan((str(folder),))
    found = [prepare.prepare(item, settings) for item in input_parts.items(part)]
    return {one.source.rpartition("/")[2]: one for one in found}


def test_the_other_picture_has_the_same_shape(ready):
    made = ready["a.png"]
    assert made.image.shape == made.rejected.shape == (*made.bucket, 3)
    assert (made.rejected == (200, 0, 0)).all() and (made.image == (0, 50, 90)).all()
    assert isinstance(made.rejected, np.ndarray)


def test_backslashes_separate_folders_as_in_file_name(ready):
    assert (ready["g.png"].rejected == (200, 0, 0)).all()
    assert ready["h.png"].reason == 'bad "worse": outside the folder'


def test_a_picture_without_another_is_rejected_with_its_reason(ready):
    reasons = {k: x.reason for k, x in ready.items() if isinstance(x, Rejected)}
    assert reasons["c.png"].startswith('bad "worse": cannot be read')
    assert reasons["d.png"] == 'has no "worse", the rejected picture'
    assert reasons["e.png"].startswith('bad "worse": ')
    assert reasons["f.png"] == 'bad "worse": outside the folder'
