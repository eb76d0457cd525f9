"""Typography, T2I-CompBench and what all scorers share."""

import numpy as np
import pytest

from sd3_jax.data import digits
from sd3_jax.errors import UserError
from sd3_jax.evaluation import compbench, digit_scenes, scorers, typography
from sd3_jax.evaluation.scorers import Asked, Verdict

IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says “Open now”, at night", "Open now"),
        ("a dog's bowl with 'Rex' on it", "Rex"),
        ("dogs' bowls, the fox's too", ""),
        ("“It’s late” on a clock", "It’s late"),
        ('"A" over "B"', "A B"),
        ("„Halt“ on a wall, «stop» beside it", "Halt stop"),
        ("no quotes", ""),
    ],
)
def test_what_stands_in_quotes_is_asked_for(prompt, text):
    assert typography.quoted(prompt) == text


def test_lines_name_their_text_or_quote_it():
    asked = typography.parse('{"prompt": "a sign", "text": "OPEN", "category": "sign"}')
    assert asked == ("a sign", "sign", "OPEN")
    assert typography.parse('the word "fox"') == ('the word "fox"', "text", "fox")
    with pytest.raises(
        UserError, match='"a sign" asks for no text; put the text in quot'
    ):
        typography.parse("a sign")


def test_the_match_is_exact_but_for_what_is_ignored():
    value = lambda a, b, *ignore: typography.judged(a, b, ignore).value
    assert value("OPEN", "OPEN") == 1
    assert value("OPEN", "Open") == 0 and value("OPEN", "Open", "case") == 1
    assert value("a b", " a\n b ") == 0 and value("a b", " a\n b ", "space") == 1
    assert value("Stop!", "Stop") == 0 and value("Stop!", "Stop", "punctuation") == 1
    assert value("é", "é") == 1  # one letter, or two that make it
    found = typography.judged("fox", "fix")
    assert found.reason == 'expected "fox", read "fix"'
    assert found.others == {typography.ERRORS: pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    "a, b, count",
    [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("ab", "ba", 2),
        ("é字", "e字😀", 2),
    ],
)
def test_the_error_rate_is_of_levenshteins_distance(a, b, count):
    for wanted, read in ((a, b), (b, a)):
        rate = typography.judged(wanted, read).others[typography.ERRORS]
        assert rate * max(len(wanted), 1) == pytest.approx(count)


def test_typography_counts_categories_and_errors():
    asked = [Asked('"a"', "one", "a"), Asked('"bc"', "two", "bc")]
    verdicts = typography.scorer(lambda images: ["a", "b"])(asked, IMAGES)
    rows = {row.name: row.score for row in typography.rows(asked, verdicts)}
    assert rows == {
        "typography": 0.5,
        "typography, one": 1,
        "typography, two": 0,
        "typography, character error rate": 0.25,
    }
    with pytest.raises(UserError, match="returned 1 texts; expected 2"):
        typography.scorer(lambda images: ["a"])(asked, IMAGES)
    with pytest.raises(UserError, match="returned NoneType; expected a text a picture"):
        typography.scorer(lambda images: ["a", None])(asked, IMAGES)


def test_each_category_is_scored_by_its_own_function():
    seen = {}

    def colour(images, prompts):
        seen["color"] = prompts
        return np.array([0.25] * len(images), np.float32)

    asked = [Asked("x", "color"), Asked("y", "complex"), Asked("z", "color")]
    images = np.zeros((3, 8, 8, 3), np.uint8)
    functions = {"color": colour, "complex": lambda images, prompts: [0.5]}
    verdicts = compbench.scorer(functions)(asked, images)
    assert seen["color"] == ["x", "z"]
    assert [v.value for v in verdicts] == [0.25, 0.5, 0.25]
    rows = compbench.rows(asked, verdicts)
    assert [(row.name, row.score, row.n) for row in rows] == [
        ("T2I-CompBench color", 0.25, 2),
        ("T2I-CompBench complex", 0.5, 1),
    ]
    for value in (1.5, float("nan"), "x", None):
        functions["complex"] = lambda images, prompts: [value]  # noqa: B023
        with pytest.raises(UserError, match=r"expected a number in \[0, 1\] for each"):
            compbench.scorer(functions)(asked, images)


def test_categories_are_named_once():
    assert compbench.names(["color=a.b:c"]) == {"color": "a.b:c"}
    for spec, words in [
        (["colour=a:b"], 'did you mean "color"?'),
        (["color"], "has no function"),
        (["color=a:b", "color=a:c"], "appears twice"),
    ]:
        with pytest.raises(UserError) as error:
            compbench.names(spec)
        assert words in str(error.value)


def test_digits_are_scored_by_the_same_interface():
    captions = ["a red seven", "a blue three"]
    canvas = digits.Digits(8, 8)
    images = np.stack(
        [canvas.draw(digits.parse(captions[0]), np.array([0.1, 0.5]))] * 2
    )
    asked = [Asked(c, "single digits", digits.parse(c)) for c in captions]
    assert [v.value for v in digit_scenes.scorer(asked, images)] == [1, 0]


def test_a_row_a_prompt_has_its_reasons():
    asked = [Asked("a", "one"), Asked("a", "one"), Asked("b", "one")]
    verdicts = [Verdict(1.0), Verdict(0.0, "why"), Verdict(0.0, "so")]
    first, second = scorers.prompts(asked, verdicts, "GenEval")
    assert first == {
        "prompt": "a",
        "split": "GenEval one",
        "score": 0.5,
        "n": 2,
        "reasons": ["why"],
    }
    assert second["n"] == 1
