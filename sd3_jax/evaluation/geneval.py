"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): its rules on a detector's findings.

The rules and their numbers are those of evaluation/evaluate_images.py in
github.com/djghosh13/geneval; its detector is Mask2Former (Swin-S, COCO), its namer of
colours CLIP ViT-L/14. Here both are functions:

    detect(images u8 (n, h, w, 3)) -> n lists of (label, score, (x0, y0, x1, y1))
    colour(crops, label, COLOURS) -> a colour for each crop, u8 (_, _, 3)

A detection may have a mask as well, (h, w) of bool; outside of it the crop is grey.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from sd3_jax.data import prompt_text
from sd3_jax.errors import UserError, nearest
from sd3_jax.evaluation import scorers
from sd3_jax.evaluation.scorers import Asked, Score, Verdict, answers, called
from sd3_jax.foreign_text import parse_json, shown

NAMES = {  # the tags, in the order of the paper's table 5, and what rows call them
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colors",
    "position": "position",
    "color_attr": "color attribution",
}
COLOURS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = ("left of", "right of", "above", "below")
CONFIDENCE, COUNTING = 0.3, 0.9  # a detection's least score; in "counting"
MOST = 16  # detections of a label that count
OFFSET = 0.1  # of both sizes, within which centres are not apart
GREY = 153


class Detection(NamedTuple):
    label: str
    score: float
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
    mask: ndarray | None = None  # (h, w) of bool


def parse(line: str) -> Asked:
    """Parses a line of evaluation_metadata.jsonl; UserError if it is invalid."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError('expected {"tag": …, "include": […], "prompt": TEXT}')
    tag = record.get("tag")
    if tag not in NAMES:
        raise UserError(f'tag "{shown(tag)}"{nearest(str(tag), NAMES)}')
    include, exclude = record.get("include"), record.get("exclude", [])
    if not (isinstance(include, list) and include and isinstance(exclude, list)):
        raise UserError('expected "include": [{"class": …, "count": …}, …]')
    for place, entry in enumerate(include):
        _check(entry, ("class", "count", "color", "position"), place)
    for entry in exclude:
        _check(entry, ("class", "count"), 0)
    wanted = {"include": include, "exclude": exclude}
    return Asked(prompt_text.checked(record["prompt"]), tag, wanted)


def scorer(detect: Callable, colour: Callable | None = None) -> scorers.Scorer:
    """A scorer from the user's functions; only prompts with colours need `colour`."""

    def judge(asked: Sequence[Asked], images: UInt8[ndarray, "n h w 3"]):
        lists = answers(detect, "lists of detections", len(images), images)
        verdicts = []
        for question, image, answer in zip(asked, images, lists):
            detected = detections(answer, image.shape[:2], called(detect))
            # Counting asks for surer detections: a doubled box would be one object too
            # many.
            least = COUNTING if question.category == "counting" else CONFIDENCE
            by_label = keep(detected, least)
            verdicts.append(judged(image, by_label, question.wanted, colour))
        return verdicts

    return judge


def rows(asked: Sequence[Asked], verdicts: Sequence[Verdict]) -> list[Score]:
    """A score for each category, and their mean, the benchmark's overall score."""
    groups = scorers.by_category(asked, verdicts)
    tags = [tag for tag in NAMES if tag in groups]
    scores = [scorers.share_right(f"GenEval {NAMES[x]}", groups[x]) for x in tags]
    part = "" if len(tags) == len(NAMES) else f", {len(tags)} of 6 categories"
    return [*scores, scorers.overall(f"GenEval overall{part}", scores)]


def detections(answer: Any, shape: tuple[int, int], name: str) -> list[Detection]:
    """Checks the detections that the user's function returned for one picture."""
    wanted = "expected (label, score, (x0, y0, x1, y1)) or these and a mask"
    try:
        parsed = [Detection(*item) for item in answer]
    except TypeError:
        raise UserError(f"{name} returned no list of detections; {wanted}") from None
    return [_checked(item, shape, name, wanted) for item in parsed]


def keep(detected: Sequence[Detection], least: float) -> dict[str, list[Detection]]:
    """By label, the MOST surest detections above `least`."""
    kept = {}
    # Boxes may overlap: the benchmark suppresses no doubles by default.
    for detection in sorted(detected, key=lambda detection: -detection.score):
        if detection.score > least:
            kept.setdefault(detection.label, []).append(detection)
    return {label: surest[:MOST] for label, surest in kept.items()}


def judged(
    image: UInt8[ndarray, "h w 3"],
    by_label: Mapping[str, list[Detection]],
    wanted: Mapping[str, list[dict]],
    colour: Callable | None = None,
) -> Verdict:
    """Whether a picture has all that must be included and nothing that is excluded.

    Colour and place are checked for the `count` surest detections of a label.
    """
    reasons, groups = [], []
    for entry in wanted["include"]:
        label, count = entry["class"], entry["count"]
        # The benchmark looks at the `count` surest objects; further ones neither help
        # nor hurt here, and "counting" prompts exclude them.
        mine = by_label.get(label, [])[:count]
        reason = ""
        if len(mine) < count:
            reason = f"{label}: expected {count}, found {len(mine)}"
        elif "color" in entry:
            reason = _miscoloured(image, mine, entry, colour)
        if "position" in entry and not reason:
            # `target` is the index of an earlier entry, whose objects are in `groups`.
            relation, target = entry["position"]
            reason = _misplaced(mine, groups[target], label, relation)
        # An entry that failed cannot be what another entry lies beside.
        groups.append(None if reason else mine)
        reasons += [reason] * bool(reason)
    for entry in wanted["exclude"]:
        number = len(by_label.get(entry["class"], []))
        if number >= entry["count"]:
            less = f"{entry['class']}: expected fewer than {entry['count']}"
            reasons.append(f"{less}, found {number}")
    return Verdict(float(not reasons), "; ".join(reasons))


def crop(
    image: UInt8[ndarray, "h w 3"], detection: Detection
) -> UInt8[ndarray, "_ _ 3"]:
    """The box, at least one pixel, with grey outside of the mask if there is one."""
    if detection.mask is not None:
        image = np.where(detection.mask[..., None], image, np.uint8(GREY))
    h, w = image.shape[:2]
    x0, y0, x1, y1 = map(round, detection.box)
    x0, y0 = min(max(x0, 0), w - 1), min(max(y0, 0), h - 1)
    return image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


# --- colours and places


def _miscoloured(image, mine, entry, colour) -> str:
    label, wanted, count = entry["class"], entry["color"], entry["count"]
    if colour is None:
        raise UserError(f"{wanted} {label}: expected a function that names colours")
    crops = [crop(image, detection) for detection in mine]
    # One call for all crops of a label, since the namer is a network too.
    names = answers(colour, "colours", len(crops), crops, label, COLOURS)
    for name in names:
        if name not in COLOURS:
            counts = f'{called(colour)} returned "{shown(name)}"'
            raise UserError(f"{counts}; expected one of {', '.join(COLOURS)}")
    if names.count(wanted) >= count:
        return ""
    counts = ", ".join(f"{names.count(x)} {x}" for x in COLOURS if x in names)
    return f"{label}: expected {count} {wanted}, found {counts}"


def _misplaced(mine, targets, label, relation) -> str:
    if targets is None:
        return f"{label}: no object to be {relation}"
    # All pairs must be in the relation, as in the benchmark.
    for subject in mine:
        for other in targets:
            there = relations(subject.box, other.box)
            if relation not in there:
                actual = " and ".join(sorted(there)) or "neither side"
                return f"{label}: expected {relation} {other.label}, found {actual}"
    return ""


def relations(a: Sequence, b: Sequence) -> set[str]:
    """The relations of box a to box b: up to two of RELATIONS.

    Centres count as apart by what exceeds OFFSET times the sum of both sizes.
    """
    a, b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))  # corners, (x, y)
    apart = a.mean(0) - b.mean(0)
    size = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    # Differences of centres within OFFSET of both sizes count as none.
    beyond = np.sign(apart) * np.maximum(np.abs(apart) - OFFSET * size, 0)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    # A component must exceed half of the distance, which is 30 degrees from the other
    # axis; y points down.
    x, y = beyond / np.linalg.norm(apart)
    there = zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5))
    return {name for name, holds in there if holds}


# --- checks of the file and of detections


def _check(entry: Any, keys: Sequence[str], place: int) -> None:
    if not isinstance(entry, dict):
        raise UserError('expected {"class": …, "count": …}')
    for key in entry:
        if key not in keys:
            raise UserError(f'"{shown(key)}"{nearest(key, keys)}')
    label, count, color = (
        entry.get("class"),
        entry.get("count"),
        entry.get("color", "red"),
    )
    if not isinstance(label, str) or not label.strip():
        raise UserError('expected "class": TEXT')
    # type and not isinstance: true is an int in Python, and 1 would be meant.
    if type(count) is not int or count < 1:
        raise UserError(f'"count" of {shown(label)}: expected an integer >= 1')
    if color not in COLOURS:
        raise UserError(f'color "{shown(color)}"{nearest(str(color), COLOURS)}')
    position = entry.get("position")
    if "position" in entry and not (
        isinstance(position, list)
        and len(position) == 2
        and position[0] in RELATIONS
        and type(position[1]) is int
        and 0 <= position[1] < place
    ):
        names = ", ".join(RELATIONS)
        message = f'"position" of {shown(label)}: expected [RELATION, NUMBER]'
        raise UserError(f"{message}, one of {names}, of an object before it")


def _checked(detection: Detection, shape, name: str, wanted: str) -> Detection:
    if not isinstance(detection.label, str):
        raise UserError(
            f"{name} returned a label of {type(detection.label).__name__}; {wanted}"
        )
    try:
        numbers = [float(x) for x in (detection.score, *detection.box)]
    except (TypeError, ValueError):
        raise UserError(
            f"{name} returned a {detection.label} in no box; {wanted}"
        ) from None
    certain, *box = numbers
    if len(box) != 4 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{name} returned a {detection.label} in no box; {wanted}")
    if box[0] > box[2] or box[1] > box[3] or not 0 <= certain <= 1:
        description = f"{certain:g}, ({', '.join(f'{x:g}' for x in box)})"
        complaint = f"{name} returned ({detection.label}, {description})"
        raise UserError(
            f"{complaint}; expected a score in [0, 1] and x0 <= x1, y0 <= y1"
        )
    # Detectors of PyTorch return tensors.
    mask = None if detection.mask is None else np.asarray(detection.mask)
    if mask is not None and (mask.shape != shape or mask.dtype != bool):
        description = f"{mask.dtype} {mask.shape}"
        raise UserError(
            f"{name} returned a mask of {description}; expected bool {shape}"
        )
    return Detection(detection.label, certain, tuple(box), mask)
