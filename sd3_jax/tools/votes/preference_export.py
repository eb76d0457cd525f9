"""Votes as records of preferences: what DPO trains on (data/records.py)."""

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from numpy import ndarray

from sd3_jax import files
from sd3_jax.data.images import BadImage, read_own
from sd3_jax.data.records import Record
from sd3_jax.data.shards import Writer
from sd3_jax.errors import UserError
from sd3_jax.tools.votes.picture_sources import PictureKey, Source
from sd3_jax.tools.votes.vote_results import Verdict

log = logging.getLogger(__name__)
SPLITS = ("train", "val")


class Exported(NamedTuple):
    """Shards by split, and how many pairs were written or dropped, by reason."""

    shards: dict[str, list[epath.Path]]
    written: dict[str, int]
    dropped: dict[str, int]


class Unusable(Exception):
    """Why a decided pair cannot be trained on."""


def write_preferences(
    verdicts: Sequence[Verdict],
    sources: Mapping[str, Source],
    folder: epath.Path,
    *,
    held_out: float,
    seed: int = 0,
) -> Exported:
    """Write a shard for each split and size to `folder`, and return what was written.

    The picture with more votes is preferred; pairs with as many votes for each side are
    dropped and counted. All pairs of a prompt are in one split. UserError if a split
    would be empty.
    """
    decided, dropped = _decided(verdicts)
    # By prompt and not by pair: a held-out pair of a prompt that is trained on would
    # measure memory.
    held_prompts = held_out_prompts([x.prompt for x in decided], held_out, seed)
    rows: dict[tuple[str, int, int], list[Verdict]] = defaultdict(list)
    written: dict[str, int] = dict.fromkeys(SPLITS, 0)
    # Sizes first, so that one pair is in memory at a time when the shards are written.
    for verdict in decided:
        try:
            better, _ = read_pair(verdict, sources)
        except Unusable as reason:
            dropped[str(reason)] += 1
            continue
        split = "val" if verdict.prompt in held_prompts else "train"
        rows[split, *better.shape[:2]].append(verdict)
        written[split] += 1
    needed = SPLITS if held_out else SPLITS[:1]
    if empty := [split for split in needed if not written[split]]:
        reasons = "".join(f", {n} {reason}" for reason, n in dropped.items())
        raise UserError(
            f"no preference for {' and '.join(empty)}: of {len(verdicts)} pairs"
            f" {sum(written.values())} are decided{reasons}; collect more votes, or set"
            " --config.vote.held_out=0"
        )
    shards: dict[str, list[epath.Path]] = {split: [] for split in SPLITS}
    for (split, height, width), chosen in sorted(rows.items()):
        # A shard has pictures of one size, which its name ends with.
        path = folder / f"{split}-00000-{height}x{width}.arecord"
        with Writer(path) as shard:
            for verdict in chosen:
                better, worse = read_pair(verdict, sources)
                tensors = {"image": better, "rejected_image": worse}
                shard.write(Record(tensors, f"vote {verdict.pair}", verdict.prompt))
        shards[split].append(path)
    # An earlier export may have had pictures of other sizes.
    current_names = {path.name for paths in shards.values() for path in paths}
    for path in files.children(folder):
        if path.suffix == ".arecord" and path.name not in current_names:
            path.unlink()
    return Exported(shards, written, dict(dropped))


def held_out_prompts(prompts: Sequence[str], share: float, seed: int) -> set[str]:
    """The prompts of the held-out split: a share of them, at least one, by hash.

    A prompt's rank depends on it and on the seed alone, so few prompts change their
    split when votes are added.
    """
    unique = set(prompts)
    count = math.ceil(share * len(unique)) if share else 0
    rank = lambda prompt: hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return set(sorted(unique, key=rank)[:count])


def painted_pixels(
    image: UInt8[ndarray, "h w 3"], size: tuple[int, int] | None
) -> UInt8[ndarray, "a b 3"]:
    """A picture as the model painted it, at `size`, height and width.

    `sample` writes tiny pictures enlarged by a whole factor. A picture that is not one
    of `size` enlarged is returned as it is.
    """
    # At least 1: a picture may be smaller than `size`.
    factor = max(1, image.shape[0] // size[0]) if size else 1
    # Only if pixels repeat exactly: a JPEG or a resized picture is not undone.
    small = image[::factor, ::factor]
    same = np.array_equal(small.repeat(factor, 0).repeat(factor, 1), image)
    return small if factor > 1 and same and small.shape[:2] == size else image


def _decided(verdicts: Sequence[Verdict]) -> tuple[list[Verdict], Counter]:
    decided, dropped = [], Counter()
    for verdict in verdicts:
        if verdict.margin:
            decided.append(verdict)
        elif verdict.outcomes["first"]:
            dropped["with as many votes for each picture"] += 1
        else:
            worst = verdict.outcomes["bad"] > verdict.outcomes["tie"]
            dropped["both bad" if worst else "ties"] += 1
    return decided, dropped


def read_pair(
    verdict: Verdict, sources: Mapping[str, Source]
) -> tuple[UInt8[ndarray, "h w 3"], UInt8[ndarray, "h w 3"]]:
    """The better and the worse picture; Unusable, with the reason, if it cannot be."""
    # The winner first.
    names = [verdict.first, verdict.second][:: 1 if verdict.margin > 0 else -1]
    key, images = PictureKey(verdict.prompt, verdict.number), []
    for name in names:
        source = sources.get(name)
        if source is None or key not in source.pictures:
            raise Unusable("without a picture")
        try:
            image, _ = read_own(source.pictures[key])
        except BadImage as error:
            log.warning("not exported: %s", error)
            raise Unusable("unreadable") from None
        images.append(painted_pixels(image, source.sizes.get(key)))
    # The two pictures of a DPO pair are stacked in training.
    if images[0].shape != images[1].shape:
        raise Unusable("of two sizes")
    return images[0], images[1]
