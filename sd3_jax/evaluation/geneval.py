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
OVERLAP = 1.0  # of two of a label, at most, as intersection over union; 1: any
OFFSET = 0.1  # of both sizes, within which centres are not apart
GREY = 153


class Detection(NamedTuple):
    label: str
    score: float
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
    mask: ndarray | None = None  # (h, w) of bool


def parse(line: str) -> Asked:
    """A line of evaluation_metadata.jsonl; a UserError says what is wrong with it."""
    try:
        given = parse_json(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise UserError('wanted {"tag": …, "include": […], "prompt": TEXT}')
    tag = given.get("tag")
    if tag not in NAMES:
        raise UserError(f'tag "{shown(tag)}"{nearest(str(tag), NAMES)}')
    include, exclude = given.get("include"), given.get("exclude", [])
    if not (isinstance(include, list) and include and isinstance(exclude, list)):
        raise UserError('wanted "include": [{"class": …, "count": …}, …]')
    for place, each in enumerate(include):
        _check(each, ("class", "count", "color", "position"), place)
    for each in exclude:
        _check(each, ("class", "count"), 0)
    wanted = {"include": include, "exclude": exclude}
    return Asked(prompt_text.checked(given["prompt"]), tag, wanted)


def scorer(
    detect: Callable,
    colour: Callable | None = None,
    *,
    confidence: float = CONFIDENCE,
    counting: float = COUNTING,
    most: int = MOST,
    overlap: float = OVERLAP,
    offset: float = OFFSET,
) -> scorers.Scorer:
    """A scorer by the user's functions; `colour` is for what asks for colours."""

    def judge(asked: Sequence[Asked], images: UInt8[ndarray, "n h w 3"]):
        lists = answers(detect, "lists of detections", len(images), images)
        verdicts = []
        for each, image, given in zip(asked, images, lists):
            found = detections(given, image.shape[:2], called(detect))
            least = counting if each.category == "counting" else confidence
            kept = keep(found, least, most, overlap)
            verdicts.append(judged(image, kept, each.wanted, colour, offset))
        return verdicts

    return judge


def rows(asked: Sequence[Asked], verdicts: Sequence[Verdict]) -> list[Score]:
    """A score for each category, and their mean: so the benchmark's overall."""
    found = scorers.by_category(asked, verdicts)
    tags = [tag for tag in NAMES if tag in found]
    right = {tag: [v.value == 1 for v in found[tag]] for tag in tags}
    made = [scorers.score(f"GenEval {NAMES[tag]}", right[tag]) for tag in tags]
    part = "" if len(tags) == len(NAMES) else f", {len(tags)} of 6 categories"
    return [*made, scorers.overall(f"GenEval overall{part}", made)]


def detections(
    given: Any, shape: tuple[int, int], name: str = "detect"
) -> list[Detection]:
    """One picture's, as a function of the user's gave them; or a UserError."""
    wanted = "wanted (label, score, (x0, y0, x1, y1)) or these and a mask"
    try:
        made = [Detection(*each) for each in given]
    except TypeError:
        raise UserError(f"{name} gave no list of detections; {wanted}") from None
    return [_checked(each, shape, name, wanted) for each in made]


def keep(
    found: Sequence[Detection], least: float, most: int = MOST, overlap: float = OVERLAP
) -> dict[str, list[Detection]]:
    """By label, the most certain first: above `least`, at most `most`, not doubled."""
    kept = {}
    for label in dict.fromkeys(each.label for each in found):
        sure = [each for each in found if each.label == label and each.score > least]
        sure = sorted(sure, key=lambda each: -each.score)[:most]
        chosen = []
        for each in sure:
            if overlap == 1 or all(iou(x.box, each.box) < overlap for x in chosen):
                chosen.append(each)
        if chosen:
            kept[label] = chosen
    return kept


def judged(
    image: UInt8[ndarray, "h w 3"],
    found: Mapping[str, list[Detection]],
    wanted: Mapping[str, list[dict]],
    colour: Callable | None = None,
    offset: float = OFFSET,
) -> Verdict:
    """Whether all that is to be included is there, and nothing that is excluded.

    Of a label only the `count` most certain are looked at for colour and place.
    """
    reasons, groups = [], []
    for each in wanted["include"]:
        label, count = each["class"], each["count"]
        mine = found.get(label, [])[:count]
        reason = ""
        if len(mine) < count:
            reason = f"{label}: wanted {count}, found {len(mine)}"
        elif "color" in each:
            reason = _miscoloured(image, mine, each, colour)
        if "position" in each and not reason:
            relation, target = each["position"]
            reason = _misplaced(mine, groups[target], label, relation, offset)
        groups.append(None if reason else mine)
        reasons += [reason] * bool(reason)
    for each in wanted["exclude"]:
        number = len(found.get(each["class"], []))
        if number >= each["count"]:
            less = f"{each['class']}: wanted fewer than {each['count']}"
            reasons.append(f"{less}, found {number}")
    return Verdict(float(not reasons), "; ".join(reasons))


def relations(a: Sequence, b: Sequence, offset: float = OFFSET) -> set[str]:
    """Where box a is of box b: any of RELATIONS, up to two of them.

    Centres count as apart by what exceeds `offset` times the sum of both sizes.
    """
    a, b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))  # corners, (x, y)
    apart = a.mean(0) - b.mean(0)
    size = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.sign(apart) * np.maximum(np.abs(apart) - offset * size, 0)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(apart)
    there = zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5))
    return {name for name, holds in there if holds}


def iou(a: Sequence, b: Sequence) -> float:
    """Intersection over union of boxes whose last pixels are inside them."""
    area = lambda x0, y0, x1, y1: max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)
    inner = (*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:]))
    both = area(*inner)
    union = area(*a) + area(*b) - both
    return both / union if union else 0.0


def crop(image: UInt8[ndarray, "h w 3"], found: Detection) -> UInt8[ndarray, "_ _ 3"]:
    """The box, at least a pixel of it, and grey around the mask if there is one."""
    if found.mask is not None:
        image = np.where(found.mask[..., None], image, np.uint8(GREY))
    h, w = image.shape[:2]
    x0, y0, x1, y1 = map(round, found.box)
    x0, y0 = min(max(x0, 0), w - 1), min(max(y0, 0), h - 1)
    return image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


def _miscoloured(image, mine, each, colour) -> str:
    label, wanted, count = each["class"], each["color"], each["count"]
    if colour is None:
        raise UserError(f"{wanted} {label}: wanted a function that names colours")
    crops = [crop(image, found) for found in mine]
    names = answers(colour, "colours", len(crops), crops, label, COLOURS)
    for name in names:
        if name not in COLOURS:
            told = f'{called(colour)} gave "{shown(name)}"'
            raise UserError(f"{told}; wanted one of {', '.join(COLOURS)}")
    if names.count(wanted) >= count:
        return ""
    told = ", ".join(f"{names.count(x)} {x}" for x in COLOURS if x in names)
    return f"{label}: wanted {count} {wanted}, found {told}"


def _misplaced(mine, targets, label, relation, offset) -> str:
    if targets is None:
        return f"{label}: nothing to be {relation}"
    for one in mine:
        for other in targets:
            there = relations(one.box, other.box, offset)
            if relation not in there:
                told = " and ".join(sorted(there)) or "neither side"
                return f"{label}: wanted {relation} {other.label}, found {told}"
    return ""


def _check(each: Any, keys: Sequence[str], place: int) -> None:
    if not isinstance(each, dict):
        raise UserError('wanted {"class": …, "count": …}')
    for key in each:
        if key not in keys:
            raise UserError(f'"{shown(key)}"{nearest(key, keys)}')
    label, count, color = each.get("class"), each.get("count"), each.get("color", "red")
    if not isinstance(label, str) or not label.strip():
        raise UserError('wanted "class": TEXT')
    if type(count) is not int or count < 1:
        raise UserError(f'"count" of {shown(label)}: wanted an integer >= 1')
    if color not in COLOURS:
        raise UserError(f'color "{shown(color)}"{nearest(str(color), COLOURS)}')
    position = each.get("position")
    if "position" in each and not (
        isinstance(position, list)
        and len(position) == 2
        and position[0] in RELATIONS
        and type(position[1]) is int
        and 0 <= position[1] < place
    ):
        names = ", ".join(RELATIONS)
        told = f'"position" of {shown(label)}: wanted [RELATION, NUMBER]'
        raise UserError(f"{told}, one of {names}, of an object before it")


def _checked(each: Detection, shape, name: str, wanted: str) -> Detection:
    if not isinstance(each.label, str):
        raise UserError(f"{name} gave a label of {type(each.label).__name__}; {wanted}")
    try:
        numbers = [float(x) for x in (each.score, *each.box)]
    except (TypeError, ValueError):
        raise UserError(f"{name} gave a {each.label} in no box; {wanted}") from None
    certain, *box = numbers
    if len(box) != 4 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{name} gave a {each.label} in no box; {wanted}")
    if box[0] > box[2] or box[1] > box[3] or not 0 <= certain <= 1:
        given = f"{certain:g}, ({', '.join(f'{x:g}' for x in box)})"
        told = f"{name} gave ({each.label}, {given})"
        raise UserError(f"{told}; wanted a score in [0, 1] and x0 <= x1, y0 <= y1")
    mask = None if each.mask is None else np.asarray(each.mask)
    if mask is not None and (mask.shape != shape or mask.dtype != bool):
        given = f"{mask.dtype} {mask.shape}"
        raise UserError(f"{name} gave a mask of {given}; wanted bool {shape}")
    return Detection(each.label, certain, tuple(box), mask)
