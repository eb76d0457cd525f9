"""DPO by a hidden rule on the digits: thick strokes are preferred (preference.md).

    sd3-jax train --config=configs/quickstart.py --workdir=runs/quickstart
    python benchmarks/preference.py runs/quickstart runs/preference [FLAGS of train]

Paints pairs of pictures of a caption by the run, prefers of two that are right the one
with more ink, trains configs/dpo.py:digits on these pairs, and paints again: other
noise, the same for both models.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from sd3_jax import main
from sd3_jax.assembly import model_parts
from sd3_jax.data.records import Record
from sd3_jax.data.shards import Writer
from sd3_jax.distributed import sharding
from sd3_jax.evaluation import digit_scenes
from sd3_jax.evaluation.digit_reader import INK, matches
from sd3_jax.monitoring import metrics
from sd3_jax.sampling.job.sampler import TrainedSampler

PAIRS, SCORED, HELD_OUT = 3_000, 1_200, 128
RECIPE = "configs/dpo.py:digits"


def painter(workdir, *flags):
    argv = ["sample", f"--config={RECIPE}", f"--workdir={workdir}", *flags]
    config = main.parse(argv).config
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        parts = model_parts.build_parts(config)
        params, _ = model_parts.trained_params(config, parts, workdir, mesh)
    made = TrainedSampler(config, parts, mesh)

    def paint(captions, numbers):
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            return made(params, captions, numbers)

    return paint


def ink(images):
    """How many pixels of each are not paper."""
    return (images.max(-1) / 255 > INK).sum(axis=(1, 2))


def write_pairs(paint, folder):
    """Shards of preferences, and how many there are."""
    scenes = digit_scenes.sample_scenes("single", "train", PAIRS)
    captions, numbers = [str(scene) for scene in scenes], np.arange(2 * PAIRS)
    a, b = (paint(captions, numbers[i::2].tolist()) for i in range(2))
    thick, kept = ink(a) - ink(b), []
    for i, scene in enumerate(scenes):
        if thick[i] and matches(scene, a[i]) and matches(scene, b[i]):
            better, worse = (a, b) if thick[i] > 0 else (b, a)
            pair = {"image": better[i], "rejected_image": worse[i]}
            kept.append(Record(pair, f"pair {i}", captions[i]))
    for name, some in ("val", kept[:HELD_OUT]), ("train", kept[HELD_OUT:]):
        with Writer(folder / f"{name}-0.arecord") as shard:
            for record in some:
                shard.write(record)
    return len(kept)


def look(paint):
    """Of each scored picture, whether it is right, and its ink."""
    scenes = digit_scenes.sample_scenes("single", "train", SCORED)
    numbers = list(range(1_000_000, 1_000_000 + SCORED))
    images = paint([str(scene) for scene in scenes], numbers)
    right = np.array([matches(*pair) for pair in zip(scenes, images)])
    return right, ink(images), np.array([str(scene) for scene in scenes])


def run(base: str, workdir: str, *flags: str) -> None:
    folder, tuned = Path(workdir), Path(workdir) / "dpo"
    folder.mkdir(parents=True, exist_ok=True)
    before = painter(base)
    pairs = write_pairs(before, folder)
    argv = ["train", f"--config={RECIPE}", f"--workdir={tuned}", *flags]
    argv += [f"--config.tune.base={base}"]
    argv += [f"--config.data.records={folder}/train-0.arecord"]
    argv += [f"--config.data.held_out={folder}/val-0.arecord"]
    assert main.main(argv) == 0
    rows = [x for x in metrics.read(tuned) if x["kind"] == "train"]
    found = {"pairs": pairs, "loss": [x["loss"] for x in rows]}
    found["accuracy"] = [x["accuracy"] for x in rows]
    (right, first, names), (after, last, _) = look(before), look(painter(tuned))
    middle = {name: np.median(first[names == name]) for name in set(names)}
    limit = np.array([middle[name] for name in names])
    found |= {
        "preferred before": float((first > limit).mean()),
        "preferred after": float((last > limit).mean()),
        "right before": float(right.mean()),
        "right after": float(after.mean()),
        "ink before": float(first.mean()),
        "ink after": float(last.mean()),
        "pictures": SCORED,
    }
    (folder / "preference.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(*sys.argv[1:])
