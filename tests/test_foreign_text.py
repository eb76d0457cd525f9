"""JSON without its loopholes, and text that keeps to its line."""

import pytest

from sd3_jax.foreign_text import parse_json, shown


def test_json_that_is_json():
    assert parse_json('{"a": [1, 2.5, null, "\\u00fc"]}') == {"a": [1, 2.5, None, "ü"]}
    assert parse_json(b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": 1, "a": 2}', '"a" appears twice'),
        ('[{"b": {"\\u001b": 1, "\\u001b": 2}}]', r'"\\x1b" appears twice'),
        ("[NaN]", "NaN is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        ("[-1e999]", "-1e999 is too large"),
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**6, "nested too deeply"),
        ("9" * 5000, "4300 digits"),
        (b"\xff", "invalid start byte"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_none(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_what_is_shown_keeps_to_its_line_and_length():
    assert shown("ein Füchs 🦊") == "ein Füchs 🦊"
    assert shown("a\nb\x1b[2J\u202e\ud800\0") == "a\\nb\\x1b[2J\\u202e\\ud800\\x00"
    assert shown(100 * "a", 10) == 10 * "a" + "…"
    assert shown([1, "\n"]) == "[1, '\\n']"
