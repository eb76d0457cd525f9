"""Bounds on columns and on what functions say; why an item is not kept."""

import math
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd3_jax.data.ingest import filters
from sd3_jax.data.ingest.filters import Refusal
from sd3_jax.data.ingest.items import BadItem
from sd3_jax.errors import UserError

PICTURE = np.full((16, 24, 3), 51, np.uint8)
QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=200)


def refused(spec, picture=None, **columns):
    return filters.refuse(filters.parse([spec]), columns, picture)


@pytest.fixture
def function(monkeypatch):
    def function(f):
        made = types.ModuleType("mine")
        made.f = f
        monkeypatch.setitem(sys.modules, "mine", made)

    return function


@QUICK
@given(
    st.sampled_from([">=", "<=", ">", "<"]),
    st.floats(-5, 5) | st.integers(-5, 5),
    st.floats(-5, 5) | st.integers(-5, 5),
)
def test_a_filter_does_what_it_says(op, value, bound):
    kept = refused(f"x{op}{bound}", x=value) is None
    assert kept == eval(f"value {op} bound")


def test_reasons():
    found = refused("aesthetic >= 4.5", aesthetic=3.1)
    assert found == Refusal("aesthetic>=4.5", "aesthetic 3.1, expected >= 4.5")
    assert refused("nsfw<=0.3", nsfw=np.float32(0.7).item()).reason == (
        "nsfw 0.7, expected <= 0.3"
    )
    assert refused("x>=4.5", x=4.49999999).reason == "x 4.49999999, expected >= 4.5"
    assert refused("height>=512", height=512) is None


def test_what_is_no_finite_number_is_absent():
    nothing = [None, "4.6", math.nan, math.inf, -math.inf, [5], {}, 10**400]
    for value in nothing:
        assert refused("x>=-1", x=value) == Refusal("x>=-1", "no x")
    assert refused("x>=4").reason == "no x"
    assert refused("nsfw<=0.5", nsfw=False) is None


def test_the_first_that_it_does_not_pass():
    found = filters.parse(["a>1", "b>1", "c>1"])
    assert filters.refuse(found, {"a": 2, "c": 0, "b": 0}).spec == "b>1"
    assert filters.refuse(found, {"a": 2, "b": 2, "c": 2}) is None
    assert filters.refuse((), {}) is None


def test_columns_come_before_functions(function):
    asked = []
    function(lambda picture, columns: asked.append(1) or picture.mean() / columns["x"])
    found = filters.parse(["mine:f>=60", "x>1", "y<1"])
    on_columns, on_pictures = filters.split(found)
    assert [f.name for f in on_columns] == ["x", "y"]
    assert filters.refuse(on_columns, {"x": 0.5}).spec == "x>1" and not asked
    assert filters.refuse(on_pictures, {"x": 0.5}, PICTURE) is None
    assert filters.refuse(on_pictures, {"x": 2}, PICTURE) == Refusal(
        "mine:f>=60", "mine:f 25.5, expected >= 60"
    )


def test_functions_that_fail_or_say_nothing(function):
    function(lambda picture, columns: columns["none"])
    with pytest.raises(BadItem, match="mine:f failed: KeyError: 'none'"):
        refused("mine:f>0", PICTURE)
    for value in (None, "high", np.zeros(3), [1]):
        function(lambda picture, columns, value=value: value)
        with pytest.raises(BadItem, match="mine:f returned no number: "):
            refused("mine:f>0", PICTURE)
    for value in (math.nan, np.float32(np.inf)):
        function(lambda picture, columns, value=value: value)
        assert refused("mine:f>0", PICTURE).reason == "no mine:f"
    function(lambda picture, columns: np.ones((1,))[0])
    assert refused("mine:f>0", PICTURE) is None
    function(lambda picture, columns: picture.fill(0))
    with pytest.raises(BadItem, match="read-only"):
        refused("mine:f>0", PICTURE)


WRONG = ["", "x", "x=1", "x==1", ">=1", "x>=", "x>=y", "x>=nan", "x>=inf", "x>1>2"]


@pytest.mark.parametrize("spec", [*WRONG, "x=>1", "x!=1"])
def test_a_spec_that_is_none(spec):
    with pytest.raises(UserError, match="not a filter; expected") as caught:
        filters.parse([spec])
    assert str(caught.value).isprintable()


def test_a_function_that_is_not_there():
    with pytest.raises(UserError, match='math has no "sqr"; did you mean "sqrt"'):
        filters.parse(["math:sqr>=1"])
