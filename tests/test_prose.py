"""The prose check itself: what counts as a sentence, and what it refuses."""

import prose
import pytest

PAGE = """# A title

Two sentences here. The second names `a.b(c. D)` and [a link](https://x.y/z.html).

| a table | is. Not counted |
|---|---|

- An item, e.g. this one,
  over two lines
- Another

```python
print("No. Code. Here")
```

    Code. By its indent

1. An item

    whose second paragraph is indented.
"""


def test_sentences_of_a_page():
    found = [(sentence.line, sentence.words()) for sentence in prose.sentences(PAGE)]
    assert found == [(1, 2), (3, 3), (3, 7), (8, 8), (10, 1), (18, 2), (20, 5)]


def test_a_long_sentence_is_found_by_its_first_words():
    text = "Short one.\n\n" + "Word " * 41 + "ends. After it."
    (finding,) = prose.long_sentences("a.md", list(prose.sentences(text)))
    assert str(finding).startswith("a.md:3: Word Word Word")
    assert "42 words, at most 40" in str(finding)


@pytest.mark.parametrize(
    "text",
    [
        "3 records, wanted at least 16",
        "the user is told of the error",
        "What cannot be taken is counted and listed",
        "a process that is gone",
        "that is sooner done than read",
        "of whose keys and values every device has all",
        "the file is no regular file",
    ],
)
def test_a_banned_phrase_is_found(text):
    assert [*prose.banned("a.py", 1, text, prose.PHRASES)]


@pytest.mark.parametrize(
    "text",
    [
        "expected 16 or more records",
        "there is no longer a file",
        "`wanted` are patterns",
    ],
)
def test_plain_english_passes(text):
    assert not [*prose.banned("a.py", 1, text, prose.PHRASES)]


def test_strings_of_a_module():
    source = '"""Doc."""\n\n\ndef f(x):\n    """Of f."""\n    return f"{x} is" " b"\n'
    assert [*prose.strings(source)] == [
        (1, "Doc.", True),
        (5, "Of f.", True),
        (6, "{} is b", False),
    ]
