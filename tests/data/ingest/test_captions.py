"""Captions drawn by weight and source, from columns and the user's functions."""

import sys
import types
from collections import Counter

import numpy as np
import pytest

from sd3_jax import hooks
from sd3_jax.data.ingest import captions
from sd3_jax.data.ingest.captions import Drawn
from sd3_jax.data.ingest.items import BadItem
from sd3_jax.errors import UserError

BOTH = captions.parse(["caption=0.5", "synthetic=0.5"])
PICTURE = np.zeros((16, 24, 3), np.uint8)


@pytest.fixture
def module(monkeypatch):
    """A module of the user's, under the name `mine`."""

    def module(**functions):
        made = types.ModuleType("mine")
        vars(made).update(functions)
        monkeypatch.setitem(sys.modules, "mine", made)

    return module


def shares(columns, specs, count=10_000, **options):
    specs = captions.parse(specs) if isinstance(specs[0], str) else specs
    drawn = Counter(
        captions.draw(columns, specs, seed=1, source=f"cats/{i}.jpg", **options)
        for i in range(count)
    )
    return {each: times / count for each, times in drawn.items()}


def test_shares_are_the_weights():
    columns = {"text": "of a person", "synthetic": "of a model"}
    found = shares(columns, BOTH)
    assert found.keys() == {
        Drawn("of a person", "caption"),
        Drawn("of a model", "synthetic"),
    }
    assert all(abs(share - 0.5) < 0.02 for share in found.values())
    found = shares(columns, ["caption=1", "synthetic=3"])
    assert abs(found[Drawn("of a model", "synthetic")] - 0.75) < 0.02


def test_weights_go_to_those_that_are_there():
    three = ["caption=0.5", "synthetic=0.25", "short=0.25"]
    found = shares({"synthetic": "a", "short": "b", "caption": " "}, three)
    assert abs(found[Drawn("a", "synthetic")] - 0.5) < 0.02
    assert shares({"short": "b"}, three, 100) == {Drawn("b", "short"): 1}
    for nothing in ({}, {"caption": None, "synthetic": 3, "short": "\ud800"}):
        assert shares(nothing, three, 100) == {Drawn("", ""): 1}
    assert captions.draw({"caption": "a"}, (), seed=0, source="x") == Drawn("", "")


def test_a_list_is_several_captions_each_as_likely():
    found = shares({"caption": ["a", None, "b", "", 3, "c"], "synthetic": "d"}, BOTH)
    assert [sorted(x.text for x in found)] == [["a", "b", "c", "d"]]
    assert all(
        abs(found[Drawn(x, "caption (one of several)")] - 1 / 6) < 0.02 for x in "abc"
    )


def test_a_draw_depends_on_seed_and_source_alone():
    columns = {"caption": list("abcdefgh"), "synthetic": "x", "score": 1}
    backwards = dict(reversed(columns.items())) | {"more": "text"}
    sources = [f"{i}" for i in range(200)]
    draw = lambda columns, seed: [
        captions.draw(columns, BOTH, seed=seed, source=source) for source in sources
    ]
    assert draw(columns, 1) == draw(backwards, 1) != draw(columns, 2)
    # What every record of a corpus in the making hangs on:
    assert "".join(each.text for each in draw(columns, 1)[:16]) == GOLDEN


GOLDEN = "dbhxxbecfgexhxgx"


def test_the_first_of_the_usual_columns_that_holds_text():
    draw = lambda **columns: captions.draw(
        columns, captions.parse(["caption"]), seed=0, source="x"
    )
    assert draw(prompt="e", TEXT="d", txt="c", text="b", caption="a").text == "a"
    assert draw(prompt="e", TEXT="d", text=" ", caption=7) == Drawn("d", "caption")
    assert draw(caption="a\x00b").text == "a b"  # as records have it


def test_functions_are_asked_only_if_drawn(module):
    asked = []

    def describe(picture, columns):
        asked.append(columns["n"])
        columns.clear()
        return f"{picture.shape} {picture.dtype}"

    module(describe=describe)
    columns, specs = {"caption": "a", "n": 1}, ["caption=0.9", "mine:describe=0.1"]
    found = shares(columns, specs, 1000, picture=PICTURE)
    made = Drawn("(16, 24, 3) uint8", "mine:describe")
    assert len(asked) == 1000 * found[made] and 50 < len(asked) < 150
    assert columns == {"caption": "a", "n": 1}
    assert shares({"n": 1}, specs, 10, picture=PICTURE) == {made: 1}


def test_what_a_function_does_wrong_is_the_items_fault(module):
    def write(picture, columns):
        picture[:] = 1

    wrong = {
        "raises": (lambda p, c: c["none"], "mine:f failed: KeyError: 'none'"),
        "a number": (lambda p, c: 3, "mine:f returned no text: int"),
        "nothing": (lambda p, c: None, "mine:f returned no text: NoneType"),
        "half a pair": (lambda p, c: "\ud800", "mine:f returned no text"),
        "writes": (write, "mine:f failed: ValueError: assignment destination is read"),
    }
    for function, words in wrong.values():
        module(f=function)
        specs = captions.parse(["mine:f"])
        with pytest.raises(BadItem, match=words):
            captions.draw({}, specs, seed=0, source="x", picture=PICTURE)
    assert not PICTURE.any()
    module(f=lambda p, c: " ")
    specs = captions.parse(["mine:f"])
    assert captions.draw({}, specs, seed=0, source="x") == Drawn("", "")


WRONG = ["", "=1", "caption=", "caption=x", "caption=0", "caption=-1", "caption=nan"]


@pytest.mark.parametrize("spec", [*WRONG, "caption=inf"])
def test_a_spec_that_is_none(spec):
    with pytest.raises(UserError, match='not a caption; expected "caption=0.5"'):
        captions.parse([spec])


def test_specs():
    found = captions.parse(["caption", "a b = 0.25"])
    assert [(c.name, c.weight) for c in found] == [("caption", 1), ("a b", 0.25)]
    with pytest.raises(UserError, match="caption is listed twice"):
        captions.parse(["caption=1", "caption"])


HOOKS = {
    "math": 'expected "package.module:function"',
    ":sqrt": 'expected "package.module:function"',
    "a b:sqrt": 'expected "package.module:function"',
    "math:sqr": 'math:sqr: math has no "sqr"; did you mean "sqrt"',
    "math:pi": "math:pi is of type float, expected a function",
    "math:": 'math has no ""',
    "sd3_jax.data.image:read": 'no module "sd3_jax.data.image"; did you mean "images"',
    "no_such_thing_here:read": 'no module "no_such_thing_here"; is its folder in',
    "math.sqrt:read": 'no module "math.sqrt"',
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_function_that_is_not_there(name):
    with pytest.raises(UserError) as caught:
        hooks.load(name)
    assert HOOKS[name] in str(caught.value) and str(caught.value).isprintable()


def test_a_module_that_fails(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_so.py").write_text("1 / 0")
    (tmp_path / "lacks_so.py").write_text("import nothing_of_that_name")
    with pytest.raises(UserError, match="fails_so: cannot be imported: ZeroDivision"):
        hooks.load("fails_so:f")
    with pytest.raises(UserError, match="imported: No module named 'nothing_of_that_"):
        hooks.load("lacks_so:f")
    assert hooks.load("os.path:join")("a", "b") == "a/b"
