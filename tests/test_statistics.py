"""benchmark/stats.py against numbers worked out by hand, against brute force, and against what is known of it."""

import itertools
import math

import numpy as np
import pytest

from benchmark import stats

NAN = float("nan")


def floats(*values) -> np.ndarray:
    return np.array(values, dtype=float)


def draws(scores: np.ndarray) -> list[np.ndarray]:
    """Every sample with replacement, all equally likely."""
    return [scores[list(index)] for index in itertools.product(range(len(scores)), repeat=len(scores))]


def middle(values) -> np.ndarray:
    return np.quantile(values, [0.025, 0.975])


def test_mean_interval_agrees_with_all_resamples():
    scores = floats(3, 1, 4, 1, 5)
    assert stats.mean_interval(scores) == pytest.approx(middle([draw.mean() for draw in draws(scores)]), abs=0.1)
    assert list(stats.mean_interval(floats(7, 7, 7))) == [7, 7]
    assert np.isnan(stats.mean_interval(floats(7))).all()


def test_difference_interval_agrees_with_all_resamples():
    x, y = floats(0, 1, 5), floats(10, 30, 12, 11)
    every = [b.mean() - a.mean() for a in draws(x) for b in draws(y)]
    found = stats.difference_interval(x, y)
    assert found == pytest.approx(middle(every), abs=0.4) and found[0] > 0
    assert np.isnan(stats.difference_interval(x, floats(1))).all()


def test_band_resamples_whole_curves():
    """Curves that cross: where all draws are of the same curve, the mean is that curve."""
    curves = np.array([[0.0, 10.0, NAN], [10.0, 0.0, 1.0], [5.0, 5.0, 1.0]])
    band = stats.band(curves)
    assert band[:, :2] == pytest.approx(np.array([[0, 0], [10, 10]])) and np.isnan(band[:, 2]).all()
    assert np.isnan(stats.band(curves[:2])).all()


def iqm(*strata) -> float:
    return stats.iqm_interval([floats(*scores) for scores in strata])[0]


def test_iqm_by_hand():
    assert iqm([8, 1, 7, 100, 3, -50, 5, 4]) == pytest.approx(19 / 4)  # -50 1 | 3 4 5 7 | 8 100
    assert iqm([0, 1, 5, 7, 9]) == pytest.approx((3 * 1 + 4 * 5 + 3 * 7) / 10)  # fifths: 1 and 7 count 3/20
    assert iqm([0, 0], [1] * 8) == pytest.approx(0.5)  # environments weigh the same
    copies = sorted([7, 6] * 5 + [5, 30, 1, 8, 2] * 2)  # ten of each
    assert iqm([7, 6], [5, 30, 1, 8, 2]) == pytest.approx(np.mean(copies[5:15]))


def test_iqm_interval_resamples_within_environments():
    value, interval = stats.iqm_interval([floats(0, 0, 0), floats(5, 5, 5), floats(100, 100, 100)])
    assert interval == pytest.approx([value, value])  # nothing to resample, however far apart the environments are
    strata = [floats(0, 1, 5), floats(4, 8, 6)]
    every = [iqm(*pair) for pair in itertools.product(*map(draws, strata))]
    assert stats.iqm_interval(strata)[1] == pytest.approx(middle(every), abs=0.15)
    assert np.isnan(stats.iqm_interval([floats(1), floats(2)])[1]).all()


def test_improvement_by_hand():
    value, _ = stats.improvement([floats(1, 2, 3)], [floats(2, 0)])  # 1: loses, wins; 2: draws, wins; 3: wins, wins
    assert value == pytest.approx((0 + 1 + 0.5 + 1 + 1 + 1) / 6)
    two = stats.improvement([floats(1, 2, 3), floats(0)], [floats(2, 0), floats(5)])[0]
    assert two == pytest.approx((4.5 / 6 + 0) / 2)  # environments weigh the same
    every = [stats.wins(a, b).mean() for a in draws(floats(1, 2, 7)) for b in draws(floats(2, 0, 4))]
    assert stats.improvement([floats(1, 2, 7)], [floats(2, 0, 4)])[1] == pytest.approx(middle(every), abs=0.06)


def brute_p(x, y) -> float:
    """Mann and Whitney's U of every split, straight from its definition."""
    pooled = [*x, *y]

    def unevenness(group) -> float:
        rest = [i for i in range(len(pooled)) if i not in group]
        u = sum((pooled[i] > pooled[j]) + 0.5 * (pooled[i] == pooled[j]) for i in group for j in rest)
        return abs(u - len(group) * len(rest) / 2)

    seen = unevenness(range(len(x)))
    return np.mean([unevenness(g) >= seen - 1e-9 for g in itertools.combinations(range(len(pooled)), len(x))])


@pytest.mark.parametrize("n, m", [(3, 3), (2, 4), (4, 3)])
def test_rank_test_is_that_of_brute_force(n, m):
    rng = np.random.default_rng(n * 10 + m)
    for scores in (rng.normal(size=(20, n + m)), rng.integers(4, size=(20, n + m)).astype(float)):  # without, with ties
        for row in scores:
            assert stats.rank_test(row[:n], row[n:]) == pytest.approx(brute_p(row[:n], row[n:]))
    assert stats.rank_test(floats(5, 5, 5), floats(5, 5, 5)) == 1


def test_rank_test_by_random_splits_is_near_the_exact_one():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=6), rng.normal(size=7) + 0.8
    assert stats.rank_test(x, y, limit=1) == pytest.approx(stats.rank_test(x, y), abs=0.02)


def test_a_difference_can_be_found_where_the_most_extreme_scores_are_significant():
    for n, m in itertools.product(range(1, 7), repeat=2):
        smallest = stats.rank_test(np.arange(n, dtype=float), 100 + np.arange(m, dtype=float))
        assert stats.can_differ(n, m) == (smallest <= 0.05)


def test_slm_score_is_of_the_last_hundred_checkpoints():
    assert stats.slm_score(np.concatenate([np.full(50, -1000.0), np.arange(100.0)])) == pytest.approx(49.5)
    assert stats.slm_score(floats(NAN, 3, 7, 5)) == pytest.approx(5)
    assert math.isnan(stats.slm_score(floats(NAN)))
