"""evaluate by features of pictures: CLIP score, FID, KID, precision and recall."""

import json

import multiprocess
import numpy as np
import pytest
from parity import miniature
from PIL import Image

from sd3_jax import main
from sd3_jax.data.records import Record
from sd3_jax.data.shards import Writer
from sd3_jax.errors import UserError
from sd3_jax.evaluation import (
    feature_statistics,
    fid,
    picture_features,
    picture_scores,
    reference_images,
)

PICTURES = 6
HOOKS = """
import numpy as np

def mean(images):
    assert images.dtype == np.uint8 and images.shape[1:] == (64, 64, 3)
    return images.mean((1, 2)).astype(np.float32)

mean.fingerprint = "the first"

def broken(images):
    return images.mean((1, 2), np.float32)[0]
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Of several shapes, one of them damaged."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(7):
        noise = rng.integers(0, 256, (64 + i, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "7.jpg").write_bytes(b"\xff\xd8 no picture")
    return folder


@pytest.fixture
def given(tmp_path, photographs, monkeypatch):
    (tmp_path / "features_by_me.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "captions.txt").write_text("a red fox\ntwo foxes\n")
    return {
        "weights": miniature.folder("sd35_medium"),
        "sample.steps": 1,
        "sample.cfg": 1.0,
        "eval.pictures": PICTURES,
        "eval.prompts_file": tmp_path / "captions.txt",
        "eval.clip": miniature.whole_clip(),
        "eval.real": photographs,
        "eval.scores": "clip_score,fid,kid,precision_recall",
    }


def flags(given):
    return [f"--config.{key}={value}" for key, value in given.items()]


def evaluate(workdir, given):
    recipe = "--config=configs/released.py:tiny"
    code = main.main(["evaluate", recipe, f"--workdir={workdir}", *flags(given)])
    if code:
        return code, None
    rows = json.loads((workdir / "scores.json").read_text())["scores"]
    return code, {row["name"]: row for row in rows}


def test_all_measures_and_again_from_kept_statistics(tmp_path, given, capsys, caplog):
    kept = tmp_path / "kept" / "real.npz"
    code, found = evaluate(tmp_path, given | {"eval.statistics": kept})
    assert code == 0
    assert list(found) == [
        *("CLIP score", "FID, clip", "KID x 1,000, clip"),
        *("precision, clip", "recall, clip"),
    ]
    score = found["CLIP score"]
    assert -1 < score["low"] < score["score"] < score["high"] < 1
    assert found["FID, clip"]["n"] == PICTURES and found["FID, clip"]["real"] == 7
    stored = feature_statistics.load(kept)
    assert stored.about[0] == "clip" and stored.about[2:] == (64, 64)
    assert stored.features.shape == (7, 24)
    assert "FID, clip" in capsys.readouterr().out
    assert "1 of 8 files are not pictures" in caplog.text

    again = given | {"eval.real": kept, "eval.scores": "fid,kid,precision_recall"}
    code, others = evaluate(tmp_path, again)
    assert code == 0 and others == {k: found[k] for k in list(found)[1:]}
    other = again | {"eval.features": "features_by_me:mean"}
    assert evaluate(tmp_path, other)[0] == 2
    assert "extractor: clip, expected features_by_me:mean" in capsys.readouterr().err


def test_features_of_the_users_own(tmp_path, given):
    kept = tmp_path / "real.npz"
    own = {"eval.features": "features_by_me:mean", "eval.statistics": kept}
    c = config("released.py:tiny", **given | own)
    picture_scores.references(c, picture_features.extractor(c, None), ["fid"])
    about, real_ones, rows = feature_statistics.load(kept)
    assert about == ("features_by_me:mean", "the first", 64, 64)
    np.testing.assert_allclose(real_ones.mean, 127.5, atol=2)  # noise is grey
    assert fid.frechet(real_ones, feature_statistics.of(rows)) < 1e-9
    c.eval.features = "features_by_me:broken"
    with pytest.raises(UserError, match=r"returned float32 of shape \(3,\)"):
        picture_scores.references(c, picture_features.extractor(c, None), ["fid"])


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"eval.clip": ""},
            'config.eval.clip = "": clip_score needs the weights of CLIP',
        ),
        ({"eval.clip": "no/such.safetensors"}, "config.eval.clip: weights"),
        (
            {"eval.features": "clp"},
            'config.eval.features = "clp": expected clip, pixels',
        ),
        ({"eval.features": "features_by_me:men"}, 'did you mean "mean"?'),
        ({"eval.features": "no/inception.pt"}, "no/inception.pt: no such file"),
        ({"eval.features": "pixels"}, "12288 numbers a picture, but FID"),
        ({"eval.real": "no/such"}, "config.eval.real: no/such"),
        ({"eval.real": "no/such.npz"}, "no/such.npz: cannot be read"),
        ({"eval.real": "a.npz,b"}, "expected one .npz of statistics, or pictures"),
        ({"eval.statistics": "real"}, "expected a path that ends with .npz"),
        ({"eval.prompts_file": "no/such"}, "config.eval.prompts_file = no/such: no s"),
        (
            {"eval.prompts_file": ""},
            "set config.eval.prompts_file, and config.eval",
        ),
        (
            {"eval.statistics": "a.npz", "eval.scores": "clip_score"},
            "are used only with fid",
        ),
        ({"eval.scores": "digits"}, '"digits" needs a trained run'),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(tmp_path, given, capsys, changes, words):
    early = {"weights": "owner/none"}  # said before they are looked for
    assert evaluate(tmp_path, given | early | changes)[0] == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error, error


def config(recipe, **given):
    argv = ["evaluate", f"--config=configs/{recipe}", "--workdir=unused"]
    return main.parse([*argv, *flags(given)]).config


def test_held_out_digits_are_the_captions_own():
    c = config("quickstart.py:tiny", **{"eval.pictures": 70})
    captions, pictures = (
        reference_images.captions(c),
        list(reference_images.mine(c, 64)),
    )
    assert [len(x) for x in pictures] == [64, 6] and len(captions) == 70
    c.eval.pictures = 3
    assert reference_images.captions(c) == captions[:3]
    np.testing.assert_array_equal(next(reference_images.mine(c, 64)), pictures[0][:3])


def test_held_out_records_give_their_pictures_or_what_decodes_to_them(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 64, 64, 3), np.uint8)
    latents = rng.normal(size=(5, 8, 8, 16)).astype(np.float32)
    for name, x in (("image", image), ("latents", latents)):
        with Writer(tmp_path / f"{name}.arecord") as shard:
            for i in range(5):
                shard.write(Record({name: x[i]}, f"number {i}", f"fox {i}"))
    own = {"data.name": "records", "eval.pictures": 5, "encode.dtype": "float32"}
    own |= {"encode.weights": miniature.folder("sd35_medium")}
    for name in ("image", "latents"):
        c = config("sd3_2b.py:tiny", **own, **{"data.held_out": tmp_path / f"{name}.*"})
        numbers = [int(caption.split()[1]) for caption in reference_images.captions(c)]
        assert sorted(numbers) == [0, 1, 2, 3, 4]
        (found,) = reference_images.mine(c, 64)
        assert found.shape == (5, 64, 64, 3) and found.dtype == np.uint8
        if name == "image":
            np.testing.assert_array_equal(found, image[numbers])
    c.eval.pictures = 6
    with pytest.raises(UserError, match="has 5 records; set"):
        reference_images.captions(c)


def test_a_share_that_was_taken_is_put_back():
    x = np.arange(22).reshape(11, 2)
    for count in (1, 2, 4, 12):
        parts = [x[i::count] for i in range(count)]
        np.testing.assert_array_equal(picture_features.interleaved(parts), x)
        for i, part in enumerate(parts):  # in batches, of which some have none of it
            some = [
                x[at : at + 3][picture_features.share(at, i, count)]
                for at in (0, 3, 6, 9)
            ]
            np.testing.assert_array_equal(np.concatenate(some), part)
    unequal = [x[0:1], x[1:4], x[4:6]]  # where some files are unreadable
    np.testing.assert_array_equal(
        picture_features.interleaved(unequal), x[[0, 1, 4, 2, 5, 3]]
    )


def test_two_processes_are_one_to_float64():
    worker = "tests/jobs/gather_worker.py"
    results = multiprocess.run([worker, "9"], processes=2, devices=1)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    means = {r.stdout.splitlines()[-1] for r in results}
    assert len(means) == 1 and len(means.pop()) == 5 * 16
