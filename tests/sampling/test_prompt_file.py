"""Files of prompts: what is painted, what is told of, and that nothing else happens."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import released
from sd3_jax.data import prompt_text, tokenizers
from sd3_jax.errors import UserError
from sd3_jax.sampling import cache_calibration, guidance_arguments
from sd3_jax.sampling.cache_calibration import Calibration
from sd3_jax.sampling.job import painters, picture_lines, prompt_file, prompt_lines

CONFIG = released.get_config("tiny")
CONFIG.weights = "not/loaded"
CONFIG.lock()
QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=400)


def tasks(path, data, **keys):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with CONFIG.copy_and_resolve_references().unlocked() as config:
        config.sample.update(prompts_file=str(path), **keys)
    return prompt_file.tasks(config)


def prompts(*args):
    return [task.prompt for task in tasks(*args)]


def config(**keys):
    made = CONFIG.copy_and_resolve_references()
    made.sample.update(keys)
    return made


def test_a_calibration_is_an_input_of_its_line(tmp_path, caplog):
    """Beside the file of prompts; a resumed job tells another curve by it."""
    line = {"prompt": "a", "cache": "magcache", "cache_calibration": "curve.json"}
    data = json.dumps(line) + "\n" + json.dumps({"prompt": "b"})
    prints = []
    for ratio in (1.0, 0.9):
        curve = Calibration("0123", np.array([1, ratio], np.float32))
        cache_calibration.write(tmp_path / "curve.json", curve)
        first, second = tasks(tmp_path / "x.jsonl", data)
        (path,) = first.inputs
        assert path == str(tmp_path / "curve.json") and second.inputs == {}
        prints.append(first.inputs[path])
    assert prints[0] != prints[1]
    # A damaged one ends its own line.
    (tmp_path / "curve.json").write_text("{}")
    (task,) = tasks(tmp_path / "x.jsonl", data)
    assert task.prompt == "b" and "x.jsonl:1: skipped: cache_calibration" in caplog.text


def test_a_line_is_a_prompt(tmp_path):
    data = "\ufeffa red fox\r\n\n  two\tfoxes \nfüchse 🦊\u2028here\n"
    found = ["a red fox", "two foxes", "füchse 🦊 here"]
    assert prompts(tmp_path / "x.txt", data) == found


def test_json_may_hold_any_end_of_a_line_but_newline(tmp_path):
    line = json.dumps({"prompt": "a\u2028b\u0085c\nd"}, ensure_ascii=False)
    assert prompts(tmp_path / "x.jsonl", line) == ["a b c d"]


LINES = {
    "a NUL": ("a\0b", "prompt: \\x00 at character 2; expected text without control"),
    "an escape": ("a \x1b[2J fox", "prompt: \\x1b at character 3"),
    "a C1 control": ("\x9b2J fox", "prompt: \\x9b at character 1"),
    "too long": (8193 * "a", "prompt: 8193 characters; the limit is 8192"),
}
OBJECTS = {
    "a surrogate": ('{"prompt": "\\ud800"}', "prompt: \\ud800 at character 1"),
    "one of three": ('{"prompt": ["a", "b\\u0000", "c"]}', "\\x00 at character 2"),
    "negative": ('{"prompt": "a", "negative": "\\u0007"}', "negative: \\x07 at"),
    "long negative": (
        json.dumps({"prompt": "a", "negative": 8193 * "b"}),
        "negative: 8193 characters",
    ),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', '"prompt" appears twice'),
    "nan": ('{"prompt": "a", "cfg": NaN}', "NaN is not JSON"),
    "infinity": ('{"prompt": "a", "cfg": -Infinity}', "-Infinity is not JSON"),
    "beyond a float": ('{"prompt": "a", "cfg": 1e999}', "1e999 is too large"),
    "beyond any float": ('{"prompt": "a", "cfg": 1%s}' % (400 * "0"), "expected float"),
    "beyond an int": ('{"prompt": "a", "seed": 1%s}' % (5000 * "0"), "not JSON"),
    "a great seed": ('{"prompt": "a", "seed": 4294967296}', "in [0, 4294967295]"),
    "seeds beyond the last": (
        '{"prompt": "a", "seed": 4294967295, "per_prompt": 2}',
        "seed 4294967296, of the last picture",
    ),
    "nested": ("[" * 100_000, "nested too deeply"),
    "a nested value": (
        '{"prompt": "a", "seed": ' + 500 * "[" + 500 * "]" + "}",
        "seed",
    ),
    "a dict": ('{"prompt": "a", "seed": {"b": 1}}', 'seed {"b": 1}: expected int'),
    "null": ('{"prompt": "a", "steps": null}', "steps null: expected int"),
    "true": ('{"prompt": "a", "steps": true}', "steps true: expected int"),
    "layers": ('{"prompt": "a", "skip_layers": [[1]]}', "skip_layers [[1]]: expected"),
    "options of a text": (
        '{"prompt": "a", "guidance_options": {"eta": "1"}}',
        'guidance_options {"eta": "1"}: expected a number, or a list of layers',
    ),
    "a text": ('"a fox"', 'expected {"prompt": TEXT, …}'),
    "nothing": ("{}", 'expected {"prompt": TEXT, …}'),
    "an empty prompt": ('{"prompt": " "}', "expected one text, or three"),
    "two prompts": ('{"prompt": ["a", "b"]}', "expected one text, or three"),
    "no text": ('{"prompt": 3}', "expected a text, or one for each"),
    "a key that is a page": ('{"prompt": "a", "%s": 1}' % (9999 * "k"), "kkk…"),
    "a key with an escape": ('{"prompt": "a", "\\u001bc": 1}', 'unknown "\\x1bc"'),
    "a choice with an escape": ('{"prompt": "a", "grid": "\\u001b"}', "\\x1b"),
    "a billion pictures": (
        '{"prompt": "a", "per_prompt": 1000000000}',
        "in [1, 100000]",
    ),
    "a billion steps": ('{"prompt": "a", "steps": 1000000000}', "in [1, 10000]"),
}


def test_options_of_guidance_are_an_object_or_a_text(tmp_path):
    options = [{"layers": [7, 8], "scale": 2.5}, "layers=7 8, scale=2.5"]
    lines = [json.dumps({"prompt": "a", "guidance_options": x}) for x in options]
    first, second = tasks(tmp_path / "x.jsonl", "\n".join(lines))
    assert first.settings == second.settings
    text = first.settings["guidance_options"]
    expected = {"layers": (7, 8), "scale": 2.5}
    assert guidance_arguments.options_of(text) == expected


@pytest.mark.parametrize("case", [*LINES, *OBJECTS])
def test_a_bad_line_is_told_of_by_its_number(case, tmp_path, caplog):
    line, words = (LINES | OBJECTS)[case]
    name = "x.txt" if case in LINES else "x.jsonl"
    good = "a fox" if case in LINES else '{"prompt": "a fox"}'
    assert prompts(tmp_path / name, f"{good}\n{line}\n{good}\n") == ["a fox", "a fox"]
    told = caplog.messages[0]
    assert told.startswith(f"{tmp_path / name}:2: ") and "skipped" in told
    assert words in told and told.isprintable() and len(told) < 600
    assert caplog.messages[1].endswith("skipped 1 of 3 lines: 2")


def test_thousands_of_bad_lines_are_not_thousands_of_messages(tmp_path, caplog):
    assert prompts(tmp_path / "x.txt", "\0\n" * 5000 + "a fox") == ["a fox"]
    assert len(caplog.messages) == 21
    assert "skipped 5000 of 5001 lines: 1, 2, 3" in caplog.messages[-1]


FILES = {
    "no utf-8": (b"a fox\n\xff\xfe", "not UTF-8 at byte 6"),
    "empty": (b"", "holds no prompt"),
    "only bad ones": (b"\0", "holds no prompt that can be read"),
    "large": (b"a" * (2**24 + 1), "expected at most 16777216 bytes"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_line(case, tmp_path):
    data, words = FILES[case]
    with pytest.raises(UserError, match=words) as caught:
        tasks(tmp_path / "x.txt", data)
    assert str(caught.value).startswith("config.sample.prompts_file = ")


def test_the_configs_own_prompts_have_the_same_rule():
    found = prompt_file.tasks(config(prompt="a\nfox", negative="no\tblur"))
    assert [task.prompt for task in found] == ["a fox"]
    assert found[0].settings["negative"] == "no blur"
    for key, value in ("prompt", "a\0"), ("prompt", 8193 * "a"), ("prompt", "\ud800"):
        with pytest.raises(UserError, match="config.sample.prompt: "):
            prompt_file.tasks(config(**{key: value}))
    with pytest.raises(UserError, match="negative: "):
        prompt_file.tasks(config(prompt="a", negative="\x1b"))
    recipe = CONFIG.copy_and_resolve_references()
    recipe.train.prompts = ("", "\x1b")
    with pytest.raises(UserError, match="config.train.prompts: "):
        prompt_file.tasks(recipe)
    recipe.train.prompts = ("",)
    assert [task.prompt for task in prompt_file.tasks(recipe)] == [""]


def test_pictures_have_a_bound():
    with pytest.raises(
        UserError, match="1000000000 pictures: expected at most 1000000"
    ):
        prompt_file.tasks(config(prompt="a", per_prompt=10**9))


@pytest.mark.parametrize(
    "caption", ["../../etc/passwd", "a\\..\\b", "CON", "", "日本", "/"]
)
def test_a_prompt_never_makes_a_path(caption):
    name = picture_lines.slug(caption)
    assert name and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(name) <= 48


def test_what_a_model_of_bytes_does_not_read_is_told(tmp_path, caplog):
    found = tasks(tmp_path / "x.txt", "a fox\n" + 20 * "ü" + "\n" + 31 * "a")
    painters.warn_of_cut_prompts(found, 32)
    assert caplog.messages == [
        "prompts are cut to 31 bytes: 1 of 3, of which the longest has 40"
    ]


def test_what_a_tokenizer_cuts_is_one_warning_with_counts(caplog):
    class Words:
        """A token a character, and one for the end."""

        def __call__(self, texts, max_length=99, padding=None, **options):
            rows = [[*map(ord, t), 1] for t in texts]
            if padding:
                rows = [(r[: max_length - 1] + [1] * 99)[:max_length] for r in rows]
            return {"input_ids": rows}

        def decode(self, row):
            return "".join(map(chr, row))

    texts = ["a fox", "a fox in the\x1brain", "a fox in the\x1brain", "twelve words"]
    assert tokenizers.token_ids(Words(), texts, 10, encoder="CLIP").shape == (4, 10)
    assert caplog.messages == [
        "CLIP reads 10 tokens: cuts 2 of 3 prompts, of 18 at most; not read:"
        " the\\x1brain"
    ]


def anything(read):
    """Tasks whose texts every later step can bear, or one line."""
    try:
        found = read()
    except UserError as error:
        assert "\n" not in str(error)
        return
    for task in found:
        for text in [*([task.prompt] * isinstance(task.prompt, str)), task.caption]:
            assert text.isprintable() or not prompt_text.REFUSED.search(text)
            assert text.encode() and len(text) <= prompt_text.LENGTH
        assert picture_lines.slug(task.caption)
        json.dumps(task.settings, allow_nan=False).encode()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    logging.getLogger(prompt_file.__name__).setLevel(logging.ERROR)
    yield tmp_path_factory.mktemp("fuzz")
    logging.getLogger(prompt_file.__name__).setLevel(logging.NOTSET)


TEXT = st.text(st.characters(codec=None, categories=None), max_size=40)


@QUICK
@given(st.binary(max_size=80) | TEXT.map(lambda x: x.encode(errors="surrogatepass")))
def test_any_text_file(scratch, data):
    anything(lambda: tasks(scratch / "x.txt", data))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "euler", 10**400, 2**32, "1e999"]),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXT, each, max_size=2),
    max_leaves=5,
)
ROWS = st.dictionaries(
    st.sampled_from([*prompt_lines.LINE_SETTINGS, "prompt"]) | TEXT, VALUES, max_size=4
)


@QUICK
@given(ROWS, st.just("a fox") | VALUES, st.booleans())
def test_any_object(scratch, row, prompt, ascii):
    line = json.dumps({"prompt": prompt} | row, ensure_ascii=ascii)
    data = line.encode(errors="surrogatepass")
    anything(lambda: tasks(scratch / "x.jsonl", data))


@QUICK
@given(st.binary(max_size=60))
def test_any_bytes_for_json(scratch, data):
    anything(lambda: tasks(scratch / "x.jsonl", b'{"prompt": ' + data))
