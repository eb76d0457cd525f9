import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd3_jax.tools.study.ranking import fronts, mean_ranks
from sd3_jax.tools.study.scaling_laws import correlation, frontier, power_law

POINTS = st.lists(st.tuples(*[st.integers(0, 6)] * 2), min_size=1, max_size=12)


def test_fronts_of_a_picture_drawn_by_hand():
    points = [(1, 5), (2, 2), (5, 1), (2, 5), (6, 2), (6, 6), (2, 2)]
    assert fronts(np.array(points, float)).tolist() == [1, 1, 1, 2, 2, 3, 1]


@given(POINTS)
def test_a_front_dominates_the_next_and_not_itself(points):
    ranks = fronts(np.array(points, float))
    above = lambda a, b: a != b and all(x <= y for x, y in zip(a, b))
    for i, point in enumerate(points):
        better = [ranks[j] for j, other in enumerate(points) if above(other, point)]
        assert ranks[i] == 1 + max(better, default=0)


def test_mean_ranks_are_over_the_settings_that_a_variant_has():
    settings = [
        {"a": (0.0, 0.0), "b": (1.0, 1.0)},
        {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (2.0, 2.0)},
        {"a": (2.0, 2.0), "c": (1.0, 1.0)},
    ]
    assert mean_ranks(settings) == {"a": 4 / 3, "b": 1.5, "c": 1.5}


def test_power_law_finds_the_one_that_made_the_points():
    x = np.geomspace(1e18, 1e22, 9)
    law = power_law(x, 0.5 + 3 * (x / 1e18) ** -0.3)
    np.testing.assert_allclose(law(x), 0.5 + 3 * (x / 1e18) ** -0.3, rtol=2e-3)
    assert law.exponent == pytest.approx(0.3, abs=0.01)
    assert law.floor == pytest.approx(0.5, abs=0.01) and law.error < 2e-3
    plain = power_law(x[:3], 3 * x[:3] ** -0.2)  # too few points for a floor
    assert plain.floor == 0 and plain.exponent == pytest.approx(0.2)
    with pytest.raises(ValueError, match="power_law: got 1 points, expected two"):
        power_law(x[:1], x[:1])


def test_frontier_falls():
    x = np.array([3.0, 1.0, 2.0, 1.0, 4.0])
    loss = np.array([5.0, 7.0, 4.0, 6.0, 3.0])
    assert frontier(x, loss).tolist() == [3, 2, 4]


def test_correlation_is_of_ranks():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a = rng.normal(size=30).round(1)
    b = np.exp(a) + rng.normal(size=30)
    assert correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert correlation(a, -np.exp(a)) == pytest.approx(-1)
    assert np.isnan(correlation(a, np.ones(30)))
    diverged = np.array([1, 2, 3, np.nan])
    assert correlation(diverged, np.arange(4)) == pytest.approx(1)


def test_a_row_with_nan_is_in_the_last_front():
    points = [(np.nan, 0.0), (3, 3), (1, 1), (0.0, np.nan)]
    assert fronts(np.array(points)).tolist() == [3, 2, 1, 3]
    assert fronts(np.full((2, 2), np.nan)).tolist() == [1, 1]
