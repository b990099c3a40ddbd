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


# -------------------------------------------------------------------------------------------------- intervals


def test_interval_is_the_middle_95_percent():
    low, high = stats.interval(np.arange(1001.0))
    assert (low, high) == pytest.approx((25, 975))


def test_mean_interval_agrees_with_all_resamples():
    scores = floats(3, 1, 4, 1, 5)
    every = np.array([draw.mean() for draw in draws(scores)])
    assert stats.mean_interval(scores) == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.1)
    assert list(stats.mean_interval(floats(7, 7, 7))) == [7, 7]
    assert np.isnan(stats.mean_interval(floats(7))).all()


def test_difference_interval_agrees_with_all_resamples():
    x, y = floats(0, 1, 5), floats(10, 30, 12, 11)
    means = [np.array([draw.mean() for draw in draws(scores)]) for scores in (x, y)]
    every = means[1] - means[0][:, None]
    found = stats.difference_interval(x, y)
    assert found == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.4) and found[0] > 0
    assert np.isnan(stats.difference_interval(x, floats(1))).all()


def test_results_depend_on_the_arguments_alone():
    x, y = floats(1, 2, 3, 4), floats(2, 3, 4, 9)
    for call in (
        lambda: stats.mean_interval(x),
        lambda: stats.difference_interval(x, y),
        lambda: stats.band(np.random.default_rng(3).normal(size=(9, 4))),
        lambda: stats.iqm_interval([x, y])[1],
        lambda: stats.improvement([x], [y])[1],
        lambda: stats.profile([x, y], floats(1, 3))[1],
        lambda: stats.rank_test(x, y, limit=1),
    ):
        first = call()
        np.random.default_rng(0).random(100)
        np.random.seed(5)
        assert np.array_equal(first, call())


def test_band_resamples_whole_curves():
    """Two curves that cross: where one draws both from the same curve, its mean is that curve."""
    curves = np.array([[0.0, 10.0, NAN], [10.0, 0.0, 1.0]])
    band = stats.band(curves)
    assert band[:, :2] == pytest.approx(np.array([[0, 0], [10, 10]])) and np.isnan(band[:, 2]).all()
    assert np.isnan(stats.band(curves[:1])).all()


# ------------------------------------------------------------------------------------------ several environments


def test_iqm_of_eight_is_the_mean_of_the_middle_four():
    scores = floats(8, 1, 7, 100, 3, -50, 5, 4)  # sorted: -50 1 | 3 4 5 7 | 8 100
    assert stats.iqm(scores, stats.weights([scores])) == pytest.approx(19 / 4)


def test_iqm_cuts_scores_in_part():
    scores = floats(0, 1, 2)  # thirds: a quarter cuts 0 down to 1/12, and 2 likewise
    assert stats.iqm(scores, stats.weights([scores])) == pytest.approx((1 / 12 * 0 + 1 / 3 * 1 + 1 / 12 * 2) / 0.5)
    scores = floats(0, 1, 5, 7, 9)  # fifths: 0 falls away, 1 counts 3/20, 5 counts 4/20, 7 counts 3/20
    assert stats.iqm(scores, stats.weights([scores])) == pytest.approx((3 * 1 + 4 * 5 + 3 * 7) / 10)


def test_iqm_weighs_environments_the_same_whatever_their_seeds():
    a, b = floats(0, 0), floats(1, 1, 1, 1, 1, 1, 1, 1)
    assert stats.iqm(np.concatenate([a, b]), stats.weights([a, b])) == pytest.approx(0.5)
    many = [floats(1, 2, 3, 4), np.repeat(floats(5, 6, 7, 8), 3)]
    few = [floats(1, 2, 3, 4), floats(5, 6, 7, 8)]
    values = [stats.iqm(np.concatenate(strata), stats.weights(strata)) for strata in (many, few)]
    assert values[0] == pytest.approx(values[1])


def test_iqm_with_unequal_weights_is_that_of_copies():
    """Two seeds here and five there: the same as ten of each, five copies and two, whose middle ten count."""
    strata = [floats(7, 6), floats(5, 30, 1, 8, 2)]
    copies = np.sort(np.concatenate([np.repeat(strata[0], 5), np.repeat(strata[1], 2)]))
    assert stats.iqm(np.concatenate(strata), stats.weights(strata)) == pytest.approx(copies[5:15].mean())


def test_iqm_of_many_rows_is_that_of_each():
    rng = np.random.default_rng(1)
    rows, strata = rng.normal(size=(20, 7)), [np.zeros(3), np.zeros(4)]
    found = stats.iqm(rows, stats.weights(strata))
    assert found == pytest.approx([stats.iqm(row, stats.weights(strata)) for row in rows])


def test_iqm_interval_resamples_within_environments():
    """All seeds of an environment alike: nothing to resample, however far apart the environments are."""
    strata = [floats(0, 0, 0), floats(5, 5, 5), floats(100, 100, 100)]
    value, interval = stats.iqm_interval(strata)
    assert interval == pytest.approx([value, value])
    strata = [floats(0, 1, 5), floats(4, 8, 6)]
    every = [np.concatenate(pair) for pair in itertools.product(*map(draws, strata))]
    expected = np.quantile([stats.iqm(draw, stats.weights(strata)) for draw in every], [0.025, 0.975])
    assert stats.iqm_interval(strata)[1] == pytest.approx(expected, abs=0.15)
    assert np.isnan(stats.iqm_interval([floats(1), floats(2)])[1]).all()


def test_profile_by_hand():
    strata = [floats(0, 1), floats(1, 1, 1, 2)]
    value, band = stats.profile(strata, floats(-1, 0, 1, 2))
    assert value == pytest.approx([1, (1 / 2 + 1) / 2, (0 + 1 / 4) / 2, 0])  # above, not at
    assert band[:, 0] == pytest.approx([1, 1]) and band[:, 3] == pytest.approx([0, 0])
    assert band[:, 1] == pytest.approx([0.5, 1])  # a quarter of the draws from (0, 1) is (0, 0), a quarter (1, 1)
    assert band[:, 2] == pytest.approx([0, 0.375])  # of four draws, P(none is 2) = 0.32 and P(three or more) = 0.05


def test_improvement_by_hand():
    value, _ = stats.improvement([floats(1, 2, 3)], [floats(2, 0)])  # 1: loses, wins; 2: draws, wins; 3: wins, wins
    assert value == pytest.approx((0 + 1 + 0.5 + 1 + 1 + 1) / 6)
    two = stats.improvement([floats(1, 2, 3), floats(0)], [floats(2, 0), floats(5)])[0]
    assert two == pytest.approx((4.5 / 6 + 0) / 2)  # environments weigh the same


def test_improvement_interval_agrees_with_all_resamples():
    x, y = floats(1, 2, 7), floats(2, 0, 4)
    every = [stats.wins(a, b).mean() for a in draws(x) for b in draws(y)]
    assert stats.improvement([x], [y])[1] == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.06)
    assert np.isnan(stats.improvement([floats(1)], [floats(2)])[1]).all()


# --------------------------------------------------------------------------------------- is there a difference?


def brute_p(x, y) -> float:
    """Mann and Whitney's U of every split, straight from its definition."""
    pooled = [*x, *y]

    def unevenness(group) -> float:
        rest = [i for i in range(len(pooled)) if i not in group]
        u = sum((pooled[i] > pooled[j]) + 0.5 * (pooled[i] == pooled[j]) for i in group for j in rest)
        return abs(u - len(group) * len(rest) / 2)

    seen = unevenness(range(len(x)))
    return np.mean([unevenness(g) >= seen - 1e-9 for g in itertools.combinations(range(len(pooled)), len(x))])


def test_rank_test_by_hand():
    assert stats.rank_test(floats(1, 2, 3, 4), floats(5, 6, 7, 8)) == pytest.approx(2 / math.comb(8, 4))
    assert stats.rank_test(floats(5, 6, 7), floats(1, 2, 3)) == pytest.approx(2 / math.comb(6, 3))
    assert stats.rank_test(floats(500, 500, 500), floats(500, 500, 500)) == 1


@pytest.mark.parametrize("n, m", [(3, 3), (2, 4), (4, 3)])
def test_rank_test_is_that_of_brute_force(n, m):
    rng = np.random.default_rng(n * 10 + m)
    for scores in (rng.normal(size=(20, n + m)), rng.integers(4, size=(20, n + m)).astype(float)):  # without, with ties
        for row in scores:
            x, y = row[:n], row[n:]
            assert stats.rank_test(x, y) == pytest.approx(brute_p(x, y))


def test_rank_test_by_drawn_splits_is_near_the_exact_one():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=6), rng.normal(size=7) + 0.8
    assert stats.rank_test(x, y, limit=1) == pytest.approx(stats.rank_test(x, y), abs=0.02)


def test_detectable_is_found_four_times_out_of_five():
    n, m = 5, 6
    shift, rng = stats.detectable(n, m), np.random.default_rng(9)
    trials = [stats.rank_test(rng.normal(size=n), rng.normal(size=m) + shift) <= 0.05 for _ in range(600)]
    assert np.mean(trials) == pytest.approx(0.8, abs=0.06)


def test_detectable_needs_seeds_enough():
    assert stats.detectable(3, 3) == stats.detectable(3, 4) == stats.detectable(1, 30) == math.inf
    assert all(math.isfinite(stats.detectable(*sizes)) for sizes in ((4, 4), (3, 5), (1, 40)))
    assert stats.detectable(5, 5) > stats.detectable(5, 10) > stats.detectable(10, 10) > stats.detectable(20, 20)
    assert stats.detectable(4, 9) == pytest.approx(stats.detectable(9, 4), rel=0.1)


def test_detectable_just_where_a_verdict_is_possible():
    for n, m in itertools.product(range(1, 7), repeat=2):
        smallest = stats.rank_test(np.arange(n, dtype=float), 100 + np.arange(m, dtype=float))
        assert math.isfinite(stats.detectable(n, m)) == (smallest <= 0.05)


# --------------------------------------------------------------------------------------------- learning curves


def test_trailing_means_by_hand():
    steps, returns = floats(10, 20, 20, 30), floats(1, 2, 6, 8)
    at = floats(5, 10, 19, 20, 30, 99)
    assert stats.trailing_means(steps, returns, at, window=2) == pytest.approx([NAN, 1, 1, 4, 7, 7], nan_ok=True)
    assert stats.trailing_means(steps, returns, at, window=100)[-1] == pytest.approx(17 / 4)
    assert np.isnan(stats.trailing_means(floats(), floats(), at)).all()


def test_trailing_means_are_those_of_a_hundred_episodes():
    rng = np.random.default_rng(4)
    steps, returns = np.cumsum(rng.integers(1, 9, size=300)).astype(float), rng.normal(size=300)
    at = np.arange(0.0, 1500, 37)
    expected = []
    for step in at:
        ended = returns[steps <= step][-100:]
        expected.append(ended.mean() if len(ended) else NAN)
    assert stats.trailing_means(steps, returns, at) == pytest.approx(np.array(expected), nan_ok=True)


def test_slm_metrics_by_hand():
    found = stats.slm_metrics(floats(10, 20, 30, 40), floats(NAN, 3, 7, 5), random=1.0)  # strengths 2, 6, 4
    assert found["slm_score"] == pytest.approx(5) and found["strength"] == pytest.approx(4)
    assert found["efficiency"] == pytest.approx((2 / 20 + 6 / 30 + 4 / 40) / 12)
    assert found["stability"] == pytest.approx(1 - 2 / 8)
    without = stats.slm_metrics(floats(10, 20), floats(3, 7), random=None)
    assert without["slm_score"] == 5 and math.isnan(without["strength"])
    assert all(math.isnan(x) for x in stats.slm_metrics(floats(10), floats(NAN), 0.0).values())


def test_slm_score_is_of_the_last_hundred_checkpoints():
    means = np.concatenate([np.full(50, -1000.0), np.arange(100.0)])
    assert stats.slm_metrics(np.arange(1.0, 151), means, 0.0)["slm_score"] == pytest.approx(49.5)


def test_consistency_by_hand():
    curves = np.array([[NAN, 3.0, 5.0], [1.0, 5.0, 9.0]])  # strengths 2, 4 and 4, 8: deviations sqrt 2 and 2 sqrt 2
    assert stats.consistency(curves, 1.0) == pytest.approx(1 - 2 * 3 * math.sqrt(2) / 9)
    assert math.isnan(stats.consistency(curves[:1], 1.0))
