"""Weights in prompts, against what the parsers of AUTOMATIC1111 and compel return."""

import random
import re

import pytest

from sd3_jax.data import prompt_weights
from sd3_jax.data.prompt_weights import parse
from sd3_jax.errors import UserError

# The first seven are the examples in the docstring of AUTOMATIC1111's
# modules/prompt_parser.py (parse_prompt_attention); it was run on the others.
PARENTHESES = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))).": [
        *[("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1)],
        *[("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1)],
    ],
    "a: b": [("a: b", 1)],
    "(a: b:1.2) c": [("a: b", 1.2), (" c", 1)],
    "[x] y": [("x", 1 / 1.1), (" y", 1)],
    "(a:+1.5)(b:-.5)": [("a", 1.5), ("b", -0.5)],
    "(:1.2) a": [(" a", 1)],
    "((a:1.1) b:2.)": [("a", 2.2), (" b", 2)],
    "[[x]] (y)": [("x", 1 / 1.21), (" ", 1), ("y", 1.1)],
    r"a\\b": [("a\\b", 1)],
}
# compel 2.5.1's PromptParser; it puts a space before a comma, which is no token.
COMPEL = {
    "a red++ fox": [("a", 1), ("red", 1.21), ("fox", 1)],
    "a (two words)1.2 here": [("a", 1), ("two words", 1.2), ("here", 1)],
    "fox-- in the t-shirt, rain": [("fox", 0.81), ("in the t-shirt, rain", 1)],
    "(a (big)++ fox)0.5 x": [("a", 0.5), ("big", 0.605), ("fox", 0.5), ("x", 1)],
    "fox++, big": [("fox", 1.21), (", big", 1)],
    "fox+bar a": [("fox+bar a", 1)],
    "it's a fox+! now": [("it's a fox+! now", 1)],
    "(a)++b": [("a", 1.21), ("b", 1)],
    "a - b": [("a - b", 1)],
    "(plain) words": [("plain words", 1)],
    '"quoted text"++ a': [("quoted text", 1.21), ("a", 1)],
    '"a (b)1.3 c"0.5 d': [("a", 0.5), ("b", 0.65), ("c", 0.5), ("d", 1)],
    r"x \(y\) z+": [("x (y)", 1), ("z", 1.1)],
    "a (fox, in rain)1.5. b": [("a", 1), ("fox, in rain", 1.5), (". b", 1)],
    "(a).5 (b)0 c": [("a", 0.5), ("b", 0), ("c", 1)],
    "3.5 mm+ rock-n-roll-": [("3.5", 1), ("mm", 1.1), ("rock-n-roll", 0.9)],
    "a++ b++ a+,b- c": [
        *[("a b", 1.21), ("a", 1.1), (",", 1), ("b", 0.9), ("c", 1)],
    ],
    "((a)+)+ b": [("a", 1.21), ("b", 1)],
    '5" wide, (say "hi"++ now)2': [
        *[('5" wide,', 1), ("say", 2), ("hi", 2.42), ("now", 2)],
    ],
}
CASES = [("parentheses", *case) for case in PARENTHESES.items()]
CASES += [("compel", *case) for case in COMPEL.items()]


@pytest.mark.parametrize("syntax, prompt, pieces", CASES)
def test_pieces_are_those_of_the_tool(syntax, prompt, pieces):
    parsed = parse(prompt, syntax)
    assert [piece.text for piece in parsed.pieces] == [text for text, _ in pieces]
    weights = [piece.weight for piece in parsed.pieces]
    assert weights == pytest.approx([weight for _, weight in pieces], rel=1e-9)
    between = "" if syntax == "parentheses" else " "
    assert parsed.text == between.join(text for text, _ in pieces)
    assert parsed.is_plain == all(weight == 1 for _, weight in pieces)


WRONG = {
    "parentheses": {
        "a (fox": (3, r'"(" is not closed; write \('),
        "a) fox": (2, r'")" without a "("; write \)'),
        "[a": (1, "is not closed"),
        "(a]": (3, 'without a "["'),
        "(a fox:big)": (8, r'a weight "big"; expected a number, or \: for a colon'),
        "(a:)": (4, 'a weight ""'),
        "(a:1.2.3)": (4, 'a weight "1.2.3"'),
        "(a:nan)": (4, 'a weight "nan"'),
        "(a:1e999)": (4, "expected a number"),
        f"(a:{'9' * 400})": (4, "expected a number"),
        "(a:1000)": (2, "a weight of 1000; expected -100 to 100"),
        "[a:b:0.5]": (5, "[a:b:0.5] are not supported"),
        "[a|b]": (3, "[a|b] are not supported"),
    },
    "compel": {
        "(a": (1, "'(' is not closed"),
        "a)": (2, 'without a "("'),
        'b "a': (3, "is not closed"),
        "(a)1.2.3": (4, 'a weight "1.2.3"'),
        "(a)1e5": (4, 'a weight "1e5"'),
        "(a)nan": (4, 'a weight "nan"'),
        "(a)-1.2": (4, "a weight with a sign"),
        "(a)101": (2, "a weight of 101"),
        "a.swap(b)": (2, '".swap(" is not supported'),
        '("a", "b").blend(1, 2)': (11, '".blend(" is not supported'),
        "fox withLora(x)": (5, '"withLora(" is not supported'),
    },
}
FAULTS = [(s, p, *x) for s, cases in WRONG.items() for p, x in cases.items()]


@pytest.mark.parametrize("syntax, prompt, position, words", FAULTS)
def test_what_does_not_parse_is_told_with_its_place(syntax, prompt, position, words):
    with pytest.raises(UserError) as error:
        parse(prompt, syntax)
    message = str(error.value)
    assert f"character {position}: " in message and words in message
    assert "\n" not in message


@pytest.mark.parametrize("syntax", prompt_weights.SYNTAXES)
def test_any_text_parses_or_is_one_line(syntax):
    """It ends, loses no letter, and bounds all weights."""
    generator = random.Random(0)
    for _ in range(3_000):
        prompt = "".join(generator.choices('()[]:+-"\\.,| a1é5', k=12))
        try:
            parsed = parse(prompt, syntax)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert all(abs(piece.weight) <= 100 for piece in parsed.pieces)
        letters = lambda text: re.sub("[^aé]", "", text)
        assert letters(parsed.text) == letters(prompt)
