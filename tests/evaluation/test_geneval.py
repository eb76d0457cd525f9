"""Each of GenEval's rules, on detections made by hand."""

import json

import numpy as np
import pytest

from sd3_jax.errors import UserError
from sd3_jax.evaluation import geneval, scorers
from sd3_jax.evaluation.geneval import COLOURS, Detection

IMAGE = np.zeros((100, 100, 3), np.uint8)
BENCH = ("bench", 0.9, (10, 10, 30, 30))
CAT = ("cat", 0.95, (60, 60, 90, 90))


def asked(tag, *include, exclude=(), prompt="a photo of it"):
    line = {"tag": tag, "include": list(include), "prompt": prompt}
    return geneval.parse(json.dumps(line | {"exclude": list(exclude)}))


def thing(label, count=1, **more):
    return {"class": label, "count": count} | more


def verdict(each, *found, colour=None):
    detect = lambda images: [list(found)]
    return geneval.scorer(detect, colour)([each], IMAGE[None])[0]


def right(*args, **kwargs):
    return verdict(*args, **kwargs).value == 1


def test_single_and_two_objects():
    assert right(asked("single_object", thing("bench")), BENCH, CAT)
    two = asked("two_object", thing("bench"), thing("cat"))
    assert right(two, CAT, BENCH)
    alone = verdict(two, BENCH)
    assert alone == (0.0, "cat: expected 1, found 0", {})
    assert not right(two)


def test_confidence_must_exceed_its_threshold():
    one = asked("single_object", thing("bench"))
    assert not right(one, ("bench", 0.3, BENCH[2]))
    assert right(one, ("bench", 0.31, BENCH[2]))
    counted = asked("counting", thing("bench"))
    assert not right(counted, ("bench", 0.9, BENCH[2]))
    assert right(counted, ("bench", 0.91, BENCH[2]))


def test_counting_is_exact_by_what_is_excluded():
    benches = [("bench", 0.99, (10 * i, 0, 10 * i + 8, 8)) for i in range(4)]
    each = asked("counting", thing("bench", 3), exclude=[thing("bench", 4)])
    assert [right(each, *benches[:n]) for n in range(5)] == [False] * 3 + [True, False]
    assert "expected fewer than 4, found 4" in verdict(each, *benches).reason
    unsure = [*benches[:3], ("bench", 0.8, (50, 50, 60, 60))]
    assert right(each, *unsure)


def test_at_most_sixteen_of_a_label_count():
    many = [("cat", 0.95, (i, 0, i + 1, 1)) for i in range(30)]
    each = asked("counting", thing("cat", 16), exclude=[thing("cat", 17)])
    assert right(each, *many)


def test_doubled_boxes_count_twice():
    doubled = [("cat", 0.95, (0, 0, 20, 20)), ("cat", 0.93, (0, 0, 20, 21))]
    each = asked("counting", thing("cat", 2))
    assert right(each, *doubled)


def test_only_the_most_certain_are_looked_at_for_colour():
    def colour(crops, label, candidates):
        assert label == "cat" and candidates == COLOURS
        return ["red" if crop.max() > 200 else "black" for crop in crops]

    image = IMAGE.copy()
    image[:50, :50] = 255
    light, dark = ("cat", 0.5, (0, 0, 40, 40)), ("cat", 0.6, (60, 60, 90, 90))
    each = asked("colors", thing("cat", color="red"))
    judge = lambda *found: geneval.scorer(lambda images: [found], colour)(
        [each], image[None]
    )[0]
    assert judge(light).value == 1
    assert judge(light, dark).reason == "cat: expected 1 red, found 1 black"
    two = asked("colors", thing("cat", 2, color="red"))
    made = geneval.scorer(lambda images: [[light, dark]], colour)([two], image[None])
    assert made[0].reason == "cat: expected 2 red, found 1 red, 1 black"


def test_crops_are_of_the_box_and_grey_beside_the_mask():
    image = np.full((10, 10, 3), 7, np.uint8)
    mask = np.zeros((10, 10), bool)
    mask[2:4, 3] = True
    seen = geneval.crop(image, Detection("cat", 1.0, (2.4, 1.6, 6.0, 4.0), mask))
    assert seen.shape == (2, 4, 3)  # rows 2-3, columns 2-5
    np.testing.assert_array_equal(seen[0, :, 0], [153, 7, 153, 153])
    edge = geneval.crop(image, Detection("cat", 1.0, (20.0, -3.0, 30.0, 0.2)))
    assert edge.shape == (1, 1, 3)


def test_colour_attribution_asks_for_each():
    names = {"bench": ["red"], "cat": ["blue"]}
    colour = lambda crops, label, candidates: names[label]
    each = asked("color_attr", thing("bench", color="red"), thing("cat", color="blue"))
    assert right(each, BENCH, CAT, colour=colour)
    each = asked("color_attr", thing("bench", color="blue"), thing("cat", color="red"))
    assert verdict(each, BENCH, CAT, colour=colour).reason.count("expected 1") == 2


@pytest.mark.parametrize(
    "box, there",
    [
        ((0, 40, 20, 60), {"left of"}),
        ((80, 40, 100, 60), {"right of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),
        ((43, 40, 63, 60), set()),  # 3 apart, of 0.1 * (20 + 20) allowed
        ((50, 40, 70, 60), {"right of"}),  # 10 apart: (10 - 4) / 10 > 0.5
        ((47, 40, 67, 60), set()),  # 7 apart: (7 - 4) / 7 < 0.5
        ((20, 70, 40, 90), {"below"}),  # 20 left and 30 below: 16 / 36 < 0.5 < 26 / 36
    ],
)
def test_relations_are_of_centres_beyond_a_tenth_of_both_sizes(box, there):
    assert geneval.relations(box, (40, 40, 60, 60)) == there


def test_position_is_of_the_target_named_by_number():
    left = thing("cat", position=["left of", 0])
    each = asked("position", thing("bench"), left)
    away = ("cat", 0.9, (60, 10, 80, 30))
    assert not right(each, BENCH, away)
    assert verdict(each, BENCH, away).reason == (
        "cat: expected left of bench, found right of"
    )
    assert right(each, ("bench", 0.9, (60, 10, 80, 30)), ("cat", 0.9, (10, 9, 30, 30)))
    none = verdict(each, away).reason
    assert none == "bench: expected 1, found 0; cat: no object to be left of"


def test_the_overall_is_the_mean_of_the_categories():
    pairs = [("single_object", 1.0)] * 8 + [("counting", 0.0)] * 2
    some = [asked(tag, thing("cat")) for tag, _ in pairs]
    rows = geneval.rows(some, [scorers.Verdict(value) for _, value in pairs])
    assert [row.name for row in rows] == [
        "GenEval single object",
        "GenEval counting",
        "GenEval overall, 2 of 6 categories",
    ]
    assert rows[-1].score == 0.5 and rows[-1].n == 10
    one, two = rows[:2]
    off = np.hypot(one.score - one.low, two.score - two.low) / 2
    assert rows[-1].low == pytest.approx(0.5 - off)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not JSON"),
        ('{"tag": "counting"}', 'expected {"tag"'),
        ('{"tag": "count", "prompt": "x"}', 'did you mean "counting"?'),
        ('{"tag": "counting", "prompt": "x"}', 'expected "include"'),
        (thing("cat", 0), "expected an integer >= 1"),
        (thing("cat", colour="red"), 'did you mean "color"?'),
        (thing("cat", color="rad"), 'did you mean "red"?'),
        (thing("cat", position=["left of", 0]), "of an object before it"),
        (thing("cat", position=["beside", 0]), "one of left of, right of"),
    ],
)
def test_lines_that_make_no_sense_say_why(line, words):
    if isinstance(line, dict):
        line = {"tag": "colors", "include": [line], "prompt": "x"}
        line = json.dumps(line)
    with pytest.raises(UserError) as error:
        geneval.parse(line)
    assert words in str(error.value)


def wrong(value):
    def detect(images):
        return value

    return detect


@pytest.mark.parametrize(
    "value, words",
    [
        (3, "detect returned int; expected 1 lists of detections"),
        ([[], []], "detect returned 2 lists of detections; expected 1"),
        (
            [[("cat", 0.5)]],
            "detect returned no list of detections; expected (label, score",
        ),
        ([[("cat", 0.5, (0, 1))]], "detect returned a cat in no box"),
        ([[(3, 0.5, (0, 0, 1, 1))]], "detect returned a label of int"),
        ([[("cat", 50, (0, 0, 1, 1))]], "expected a score in [0, 1]"),
        ([[("cat", 0.5, (9, 0, 1, 1))]], "expected a score in [0, 1] and x0 <= x1"),
        (
            [[("cat", 0.5, (0, 0, 1, 1), IMAGE)]],
            "returned a mask of uint8 (100, 100, 3)",
        ),
    ],
)
def test_what_detectors_give_wrongly_is_told_with_their_name(value, words):
    with pytest.raises(UserError) as error:
        geneval.scorer(wrong(value))([asked("counting", thing("cat"))], IMAGE[None])
    assert words in str(error.value)


def test_colours_are_named_by_a_function_of_the_listed_ones():
    each = asked("colors", thing("cat", color="red"))
    with pytest.raises(UserError, match="red cat: expected a function that names"):
        verdict(each, CAT)
    with pytest.raises(
        UserError, match='returned "crimson"; expected one of red, orange'
    ):
        verdict(each, CAT, colour=lambda *_: ["crimson"])
    with pytest.raises(UserError, match="returned 2 colours; expected 1"):
        verdict(each, CAT, colour=lambda *_: ["red", "red"])
