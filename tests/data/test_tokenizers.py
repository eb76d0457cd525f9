"""CLIP's vocabulary in the package, tokenizers of others, and their damaged files."""

import functools
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
import transformers

from sd3_jax.data import tokenizers
from sd3_jax.errors import MISTAKE, UserError, exit_code
from sd3_jax.sampling.text import bundle_tokenizers
from sd3_jax.tools.parity import tiny_tokenizers
from sd3_jax.weights import sources

ROOT = Path(__file__).parents[2]
FILE = Path(str(tokenizers.VOCABULARY)) / "bpe_simple_vocab_16e6.txt.gz"
# Keras and others check the published file by it.
PUBLISHED = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
START, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = [
    "",
    "a photo of a cat",
    "Hello, WORLD!  It's the dog's; they'll don't\tstay.\n",
    "café naïve Ångström groß ﬁne",
    "a fox 🦊 and a family 👨‍👩‍👧‍👦, half-past 12:30 (№ 5)",
    "日本語のテキスト и русский עברית",
    "!!! ... ??? <html> &amp; \\ / {} [] @#$%^*_+=~`|",
    "supercalifragilisticexpialidocious " * 9,
    "x" * 300,
    f"a {END} b {START}",
]


def test_the_vocabulary_is_the_published_file():
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == PUBLISHED
    assert "Copyright (c) 2021 OpenAI" in (FILE.parent / "LICENSE").read_text()


def test_a_wheel_has_it(tmp_path):
    command = ["setup.py", "-q", "build", "-b", tmp_path / "b", "--build-lib", tmp_path]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    folder = tmp_path / "sd3_jax" / "data" / "vocabulary"
    assert {x.name for x in folder.iterdir()} == {FILE.name, "LICENSE"}


@pytest.mark.parametrize(
    "text, ids",
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("a diagram", [320, 22697]),
        ("a dog", [320, 1929]),
        ("hello world!", [3306, 1002, 256]),
    ],
)
def test_ids_that_openai_published(text, ids):
    found = tokenizers.packaged_clip("clip_l")(text)["input_ids"]
    assert found == [49406, *ids, 49407]


@functools.cache
def openai():
    """(ids by piece, ranks of merges, characters of bytes), by the released rules."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    letters = dict(zip(plain, map(chr, plain)))
    letters |= {b: chr(256 + n) for n, b in enumerate(rest)}
    lines = gzip.decompress(FILE.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    pieces = [*letters.values(), *(c + "</w>" for c in letters.values())]
    pieces += ["".join(pair) for pair in merges] + [START, END]
    assert len(merges) == 48_894 and len(pieces) == len(set(pieces)) == 49_408
    return (
        {x: i for i, x in enumerate(pieces)},
        {x: i for i, x in enumerate(merges)},
        letters,
    )


def openai_ids(text):
    """Byte pair encoding, written down plainly."""
    ids, ranks, letters = openai()
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    found = [ids[START]]
    for word in regex.findall(words, text.lower(), regex.IGNORECASE):
        parts = [letters[b] for b in word.encode()]
        parts[-1] += "</w>"
        while pairs := [p for p in zip(parts, parts[1:]) if p in ranks]:
            best, merged = min(pairs, key=ranks.get), []
            while parts:
                size = 2 if tuple(parts[:2]) == best else 1
                merged.append("".join(parts[:size]))
                parts = parts[size:]
            parts = merged
        found += [ids[part] for part in parts]
    return [*found, ids[END]]


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_ids_by_the_released_rules(text):
    """But for NFC, which transformers adds, and ftfy, which it leaves out."""
    found = tokenizers.packaged_clip("clip_l")(text)["input_ids"]
    assert found == openai_ids(text)


def published_folder(path):
    """The two tokenizers as the published folders have them."""
    ids, ranks, _ = openai()
    token = lambda text, normalized: (
        dict(content=text, lstrip=False, rstrip=False, single_word=False, special=True)
        | {"normalized": normalized}
    )
    for name, pad in ("tokenizer", END), ("tokenizer_2", "!"):
        (path / name).mkdir(parents=True)
        (path / name / "vocab.json").write_text(json.dumps(ids))
        lines = ["#version: 0.2", *map(" ".join, ranks)]
        (path / name / "merges.txt").write_text("\n".join(lines) + "\n")
        added = {"49406": token(START, True), "49407": token(END, pad == END)}
        config = {
            "add_prefix_space": False,
            "added_tokens_decoder": added
            | ({"0": token("!", False)} if pad == "!" else {}),
            "bos_token": START,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "eos_token": END,
            "errors": "replace",
            "model_max_length": 77,
            "pad_token": pad,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": END,
        }
        (path / name / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_ids_of_the_published_folders(tmp_path):
    """Also padding, which is "!" with CLIP-G, and cutting; and after a round trip."""
    theirs = tokenizers.load(published_folder(tmp_path / "theirs"))
    ours = {name: tokenizers.packaged_clip(name) for name in theirs}
    tokenizers.save(ours, tmp_path / "ours")
    again = tokenizers.load(tmp_path / "ours")
    assert set(theirs) == {"clip_l", "clip_g"} == set(again)
    for name, pad in ("clip_l", 49407), ("clip_g", 0):
        wanted = tokenizers.token_ids(theirs[name], TEXTS, 77, encoder="CLIP")
        assert (wanted[0] == [49406, 49407, *[pad] * 75]).all()
        for found in ours, again:
            assert len(found[name]) == 49408
            np.testing.assert_array_equal(
                tokenizers.token_ids(found[name], TEXTS, 77, encoder="CLIP"), wanted
            )


# Which tokenizer

RELEASED = {"clip_l": {"vocab_size": 49408}, "clip_g": {"vocab_size": 49408}}


def test_the_packages_own_is_for_clips_own_vocabulary(tmp_path):
    found = bundle_tokenizers.tokenizers_of(
        [tmp_path / "model.safetensors"], "", RELEASED
    )
    assert found == {x: tokenizers.packaged_clip(x) for x in ("clip_l", "clip_g")}
    tiny = {name: {"vocab_size": tiny_tokenizers.CLIP_VOCAB} for name in RELEASED}
    assert bundle_tokenizers.tokenizers_of([tmp_path], "", tiny) == {}
    words = "no tokenizer for clip_g, whose 521 rows differ from the.*tokenizers_from="
    with pytest.raises(UserError, match=f"a.safetensors: {words}"):
        bundle_tokenizers.fetched_tokenizer("clip_g", tiny["clip_g"], "a.safetensors")


def test_those_that_are_given_come_first(tmp_path):
    tiny_tokenizers.save(tmp_path)
    tiny = {name: {"vocab_size": tiny_tokenizers.CLIP_VOCAB} for name in RELEASED}
    found = bundle_tokenizers.tokenizers_of(
        [tmp_path / "a.safetensors"], str(tmp_path), tiny
    )
    assert set(found) == {"clip_l", "clip_g", "t5"}
    assert len(found["clip_l"]) == tiny_tokenizers.CLIP_VOCAB
    with pytest.raises(UserError, match="tokenizer for clip_l has 521 tokens"):
        bundle_tokenizers.tokenizers_of(
            [tmp_path / "a.safetensors"], str(tmp_path), RELEASED
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match="empty: no tokenizers; expected a diffusers fold"
    ):
        bundle_tokenizers.tokenizers_of([tmp_path], str(tmp_path / "empty"), RELEASED)


def test_each_of_several_sources_may_have_some(tmp_path):
    tiny_tokenizers.save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / T5).rename(tmp_path / "b" / T5)
    paths = [tmp_path / "x.safetensors", tmp_path / "a", tmp_path / "b"]
    assert set(bundle_tokenizers.tokenizers_of(paths, "", {})) == {
        "clip_l",
        "clip_g",
        "t5",
    }


def t5_of(words):
    """A repository of T5 with as many words, as the hub has it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"w{i}", -3.0) for i in range(words - len(pieces))]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


@pytest.mark.parametrize("words, fits", [(32100, True), (300, False)])
def test_t5s_comes_from_the_hub(words, fits, tmp_path, monkeypatch):
    t5_of(words).save_pretrained(tmp_path)
    asked = []

    def resolve(*args, **options):
        asked.append((args, options))
        return sources.epath.Path(tmp_path)

    monkeypatch.setattr(sources, "resolve", resolve)
    get = lambda: bundle_tokenizers.fetched_tokenizer("t5", {"vocab_size": 32128}, "a")
    if fits:
        assert len(get()) == words and tokenizers.load(tmp_path).keys() == {"t5"}
    else:
        with pytest.raises(
            UserError, match="for t5 has 300 tokens but the encoder has 32128"
        ):
            get()
    (name, wanted), _ = asked[0]
    assert name == "google-t5/t5-small" and not any("safetensors" in x for x in wanted)


def test_without_the_hub_it_is_told_what_to_give(monkeypatch):
    def resolve(*args, **options):
        raise UserError('tokenizers "google-t5/t5-small": cannot be had from the hub')

    monkeypatch.setattr(sources, "resolve", resolve)
    with pytest.raises(UserError) as error:
        bundle_tokenizers.fetched_tokenizer(
            "t5", {"vocab_size": 32128}, "sd3.safetensors"
        )
    message = str(error.value)
    assert message.startswith("sd3.safetensors: no tokenizer for t5 (tokenizers")
    assert "tokenizers_from=FOLDER (config.tokenizers)" in message
    assert "\n" not in message and exit_code(error.value) == MISTAKE


# Damaged files

CLIP, T5 = "tokenizer", "tokenizer_3"
DEEP = b"[" * 100_000
WRONG = [
    *(
        (CLIP, name, data)
        for name in ("vocab.json", "tokenizer_config.json", "special_tokens_map.json")
        for data in (b"[]", b"", b"{", b"null", b"\xff\xfe\x00", DEEP, b'{"a": 1e999}')
    ),
    (CLIP, "vocab.json", b"{}"),
    (CLIP, "vocab.json", b'{"a": "b"}'),
    (CLIP, "vocab.json", b'{"a": -1}'),
    (CLIP, "vocab.json", b'{"a": true}'),
    (CLIP, "vocab.json", b'{"a": [0]}'),
    (CLIP, "vocab.json", b'{"a": 0, "a": 1}'),
    (CLIP, "merges.txt", b"\x00\xff\xfe"),
    (CLIP, "merges.txt", b"#version\nno such pieces\n"),
    (CLIP, "merges.txt", b"#version\nzz\n"),
    (CLIP, "merges.txt", b"#version: 0.2\nr e\nre d</w>\nf o\nfo x</w>\ni n</w>\n"),
    (CLIP, "tokenizer.json", b'{"model": {"vocab": {"a": 0, "ab": 1}, "merges": []}}'),
    (CLIP, "tokenizer.json", b'{"model": {"vocab": {"ab": 1}, "merges": [[1], null]}}'),
    *(
        (CLIP, "tokenizer_config.json", json.dumps({name: value}).encode())
        for name in ("pad_token", "eos_token")
        for value in (None, 3, [], {"content": None}, {})
    ),
    (CLIP, "tokenizer_config.json", b'{"model_max_length": "abc"}'),
    (CLIP, "tokenizer_config.json", b'{"added_tokens_decoder": [1]}'),
    (CLIP, "tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}'),
    (CLIP, "tokenizer_config.json", b'{"padding_side": "up"}'),
    (CLIP, "special_tokens_map.json", b'{"pad_token": null}'),
    *((T5, "tokenizer.json", data) for data in (b"[]", b"{}", b"{", DEEP, b"\xff")),
    *(
        (T5, "tokenizer.json", json.dumps({"model": model}).encode())
        for model in (None, [], {}, {"vocab": []}, {"vocab": 3}, {"vocab": [1, 2]})
    ),
    (T5, "tokenizer.json", b'{"model": {"type": "Unigram", "vocab": [["a", "b"]]}}'),
    (T5, "tokenizer_config.json", b'{"pad_token": null}'),
    (T5, "tokenizer_config.json", b'{"extra_ids": "many"}'),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_tokenizers.save(folder)
    return folder


@pytest.mark.parametrize("place, name, data", WRONG, ids=lambda x: repr(x)[:30])
def test_damaged_files_are_named_in_one_line(place, name, data, whole, tmp_path):
    (tmp_path / place).mkdir()
    for file in (whole / place).iterdir():
        (tmp_path / place / file.name).write_bytes(file.read_bytes())
    (tmp_path / place / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        tokenizers.load(tmp_path)
    message = str(error.value)
    assert str(tmp_path / place) in message and message.isprintable(), message
    assert len(message) < 500 and exit_code(error.value) == MISTAKE


def test_a_bad_regular_expression_is_named(whole, tmp_path):
    (tmp_path / T5).mkdir()
    for file in (whole / T5).iterdir():
        (tmp_path / T5 / file.name).write_bytes(file.read_bytes())
    path = tmp_path / T5 / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(((["}, "behavior": "Removed"}
    told = json.loads(path.read_text()) | {"pre_tokenizer": split | {"invert": False}}
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"{path}: not a T5Tok"):
        tokenizers.load(tmp_path)


def test_a_folder_without_its_main_file(whole, tmp_path):
    (tmp_path / T5).mkdir()
    settings = tmp_path / T5 / "tokenizer_config.json"
    settings.write_bytes((whole / T5 / settings.name).read_bytes())
    with pytest.raises(
        UserError, match=f"{tmp_path / T5}: no tokenizer: expected tokeni"
    ):
        tokenizers.load(tmp_path)
    (tmp_path / CLIP).mkdir()
    for name in "vocab.json", "tokenizer_config.json":
        (tmp_path / CLIP / name).write_bytes((whole / CLIP / name).read_bytes())
    with pytest.raises(UserError, match="merges.txt: cannot be read: No such file"):
        tokenizers.read("clip_l", tmp_path / CLIP)
    (tmp_path / T5 / "spiece.model").write_bytes(b"\0binary")
    with pytest.raises(UserError, match="spiece.model: "):  # also with sentencepiece
        tokenizers.read("t5", tmp_path / T5)


def test_panics_are_told_and_interrupts_pass(whole, monkeypatch):
    class Panic(BaseException):
        """As pyo3 raises it."""

    def fail(error):
        def from_pretrained(*args, **options):
            raise error

        monkeypatch.setattr(
            transformers.CLIPTokenizer, "from_pretrained", from_pretrained
        )

    fail(Panic("called `Option::unwrap()` on a `None` value\nnote: run with"))
    with pytest.raises(UserError, match="vocab.json: not a CLIPTok.*a `None` value$"):
        tokenizers.load(whole)
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tokenizers.load(whole)


def test_a_file_far_too_large_is_not_read(whole, tmp_path):
    (tmp_path / T5).mkdir()
    with (tmp_path / T5 / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)  # no byte of it is on the disk
    with pytest.raises(
        UserError, match="tokenizer.json: 1099511627776 bytes, too large"
    ):
        tokenizers.load(tmp_path)
