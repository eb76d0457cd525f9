"""The job: what is a duplicate of what, as precompute leaves it out."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from sd3_jax.data.ingest import prepare
from sd3_jax.errors import UserError
from sd3_jax.jobs import dedup
from sd3_jax.tools.dedup import dedup_page

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import dedup as benchmark  # noqa: E402

FILES = ("duplicates.jsonl", "dedup.json", "duplicates.html")


def config(folder, **changes):
    settings = dict(embed="hash", threshold=0.0, clusters=0, probes=4)
    settings |= dict(batch_size=4, threads=2, pairs=8)
    return ConfigDict(
        {"ingest": {"inputs": (str(folder),)}, "dedup": settings | changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures, the first three again at half the size, and one that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    photos = benchmark.photographs("portrait")
    for number, picture in enumerate(benchmark.crops(photos, 12, seed=3)[0]):
        Image.fromarray(picture).save(folder / f"{number:02}.png")
        if number < 3:
            half = [side // 2 for side in picture.shape[1::-1]]
            Image.fromarray(picture).resize(half).save(folder / f"a{number}.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def ran(config, workdir):
    dedup.run(config, workdir)
    rows = (workdir / "duplicates.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows], json.loads(
        (workdir / "dedup.json").read_text()
    )


def mean(pictures):
    """An embedding of other hands: colours, in a coarse grid."""
    small = [Image.fromarray(x).resize((4, 4), Image.Resampling.BOX) for x in pictures]
    x = np.stack([np.asarray(x, np.float32).ravel() for x in small])
    return x - x.mean(axis=1, keepdims=True)


def test_smaller_copies_go(folder, tmp_path, capsys):
    rows, about = ran(config(folder), tmp_path)
    names = [(Path(row["source"]).name, Path(row["kept"]).name) for row in rows]
    assert names == [(f"a{i}.jpg", f"{i:02}.png") for i in range(3)]
    assert all(0.92 <= row["similarity"] <= 1 for row in rows)
    assert about["pictures"] == 15 and about["removed"] == 3
    assert sum(about["unreadable"].values()) == 1
    assert about["settings"]["threshold"] == 0.92
    assert "15 pictures, 3 of them near-duplicates" in capsys.readouterr().out
    html = (tmp_path / "duplicates.html").read_text()
    assert html.count("data:image/jpeg;base64,") >= 6 and "img-src data:" in html
    lines = (tmp_path / "duplicates.jsonl").read_text().splitlines()
    gone = prepare.parse_exclusions(lines, "duplicates.jsonl")
    assert {*gone} == {row["source"] for row in rows}


def test_another_embedding_finds_the_same_and_twice_the_same(folder, tmp_path):
    name = "dedup_embedding:mean"
    sys.modules["dedup_embedding"] = type(sys)("dedup_embedding")
    sys.modules["dedup_embedding"].mean = mean
    made = [
        ran(config(folder, embed=name, threshold=0.995), tmp_path / part)[0]
        for part in "ab"
    ]
    assert made[0] == made[1]
    assert {Path(row["source"]).name for row in made[0]} >= {"a0.jpg", "a1.jpg"}


def test_no_picture_that_can_be_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    rows, about = ran(config(tmp_path / "in"), tmp_path / "out")
    assert rows == [] and about["pictures"] == 0
    assert all((tmp_path / "out" / name).exists() for name in FILES)


def test_bins_have_the_threshold_as_an_edge_and_all_counts():
    alike = np.array([0.1, 0.5, 0.92, 0.95, 1.0], np.float32)
    bins = dedup_page.histogram(alike, 0.92)
    assert 0.92 in [start for start, _, _ in bins]
    assert sum(count for start, _, count in bins if start >= 0.92) == 3
    # A bin of one pair is seen beside one of thousands.
    panel = dedup_page.panel(
        dedup_page.histogram(np.repeat(alike, 5000)[1:], 0.92), 0.92
    )
    assert "logarithmic" in panel.caption and panel.svg.startswith("<svg")


def test_what_is_no_embedding(folder, tmp_path):
    with pytest.raises(UserError, match='config.dedup.embed = "sscd": expected "hash"'):
        dedup.run(config(folder, embed="sscd"), tmp_path)
