"""Statistics for a few seeds on a few environments, and numbers as text.

The scores of an algorithm on one environment are an array with one number per seed; on several environments a list of
such arrays (strata). A bootstrap resamples the seeds within each stratum, and every stratum has the same weight
(Agarwal et al. 2021, arXiv:2108.13264). Intervals are 95 % percentile bootstrap intervals, nan for one or two seeds.
Every function starts from the same random seed.
"""

import math
from itertools import chain, combinations

import numpy as np

SEED, RESAMPLES, ALPHA = 20_210_830, 10_000, 0.05
FEWEST = 3  # seeds for an interval


def interval(resampled: np.ndarray, seeds: int) -> np.ndarray:
    """The middle 95 % of (B, ...) -> (2, ...); nan if they are of too few seeds."""
    found = np.quantile(resampled, [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    return found if seeds >= FEWEST else np.full_like(found, np.nan)


def resample(scores: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """(n,) -> (B, n): each row n draws with replacement."""
    return scores[rng.integers(len(scores), size=(resamples, len(scores)))]


def mean_interval(scores: np.ndarray) -> np.ndarray:
    """Interval of the mean over seeds, (n,) -> (2,)."""
    return interval(resample(scores, np.random.default_rng(SEED)).mean(1), len(scores))


def difference_interval(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interval of mean(y) - mean(x), seeds not paired: (n,), (m,) -> (2,)."""
    rng = np.random.default_rng(SEED)
    return interval(resample(y, rng).mean(1) - resample(x, rng).mean(1), min(len(x), len(y)))


def band(curves: np.ndarray, resamples: int = 2000) -> np.ndarray:
    """Interval of the mean curve over seeds, (n, T) -> (2, T); whole curves are drawn. nan where one is nan."""
    rows = np.random.default_rng(SEED).integers(len(curves), size=(resamples, len(curves)))
    return interval(sum(curves[column] for column in rows.T) / len(curves), len(curves))


def iqm(scores: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Interquartile mean, (..., n) -> (...): the mean of the middle half of the weight, scores at its edges in part."""
    order = np.argsort(scores, -1, kind="stable")
    upper = np.cumsum(weight[order], -1)
    middle = np.clip(np.minimum(upper, 0.75) - np.maximum(upper - weight[order], 0.25), 0, None)
    return (middle * np.take_along_axis(scores, order, -1)).sum(-1) / middle.sum(-1)


def iqm_interval(strata: list[np.ndarray], resamples: int = 5000) -> tuple[float, np.ndarray]:
    """Interquartile mean over all environments and seeds, and its stratified interval."""
    rng = np.random.default_rng(SEED)
    weight = np.concatenate([np.full(len(scores), 1 / len(scores) / len(strata)) for scores in strata])
    drawn = np.concatenate([resample(scores, rng, resamples) for scores in strata], 1)
    return float(iqm(np.concatenate(strata), weight)), interval(iqm(drawn, weight), max(map(len, strata)))


def wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 where a score of x is above one of y, 1/2 where they are equal: (n,), (m,) -> (n, m)."""
    return (x[:, None] > y) + 0.5 * (x[:, None] == y)


def improvement(xs: list[np.ndarray], ys: list[np.ndarray], resamples: int = RESAMPLES) -> tuple[float, np.ndarray]:
    """Probability that a run of x scores above a run of y, ties half, averaged over environments; and its interval."""
    rng = np.random.default_rng(SEED)
    value, drawn = 0.0, np.zeros(resamples)
    for x, y in zip(xs, ys, strict=True):
        won = wins(x, y)
        value += won.mean() / len(xs)
        of_x, of_y = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in won.shape)
        drawn += ((of_x @ won) * of_y).sum(1) / won.size / len(xs)
    return float(value), interval(drawn, min(map(len, [*xs, *ys])))


def rank_test(x: np.ndarray, y: np.ndarray, limit: int = 200_000) -> float:
    """Exact two-sided permutation p-value of the Mann-Whitney U statistic; by 20,000 random splits above `limit`."""
    pooled, n = np.concatenate([x, y]), len(x)
    ranks = wins(pooled, pooled).sum(1)  # from 1/2; ties share theirs
    if math.comb(len(pooled), n) <= limit:
        splits = chain.from_iterable(combinations(range(len(pooled)), n))
        sums = ranks[np.fromiter(splits, np.int64).reshape(-1, n)].sum(1)
    else:
        sums = np.random.default_rng(SEED).permuted(np.tile(ranks, (20_000, 1)), axis=1)[:, :n].sum(1)
        sums = np.append(sums, ranks[:n].sum())  # the observed split is one of them
    expected = n * ranks.mean()
    return float((np.abs(sums - expected) >= abs(ranks[:n].sum() - expected) - 1e-9).mean())


def can_differ(n: int, m: int) -> bool:
    """Whether the rank test can ever find a difference between n and m scores."""
    return 2 / math.comb(n + m, n) <= ALPHA


def slm_score(means: np.ndarray) -> float:
    """SLM-Lab's training average: the mean of the last 100 trailing means, one per checkpoint; nan if there is none."""
    means = means[~np.isnan(means)][-100:]
    return float(means.mean()) if len(means) else math.nan


# -------------------------------------------------------------------------------------------------- numbers as text


def form(value: float) -> str:
    """A result: an integer from 1000 on, two decimals below 10, a real minus sign."""
    if math.isnan(value):
        return "–"
    value = float(f"{value:.9g}")  # so that a tie is a tie on every processor
    text = f"{value:.{0 if abs(value) >= 999.5 else 1 if abs(value) >= 9.995 else 2}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def exact(value: float) -> str:
    """A number that somebody has set or published: its decimals, two at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-", "−")


def fraction(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def short(value: float | None) -> str:
    """1234567 -> 1.23M"""
    size, letter = next((x for x in ((1e6, "M"), (1e3, "k")) if value is not None and abs(value) >= x[0]), (1, ""))
    return "" if value is None else f"{value / size:.3g}{letter}"


def whole(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def between(interval: np.ndarray, form=form) -> str:
    return "" if np.isnan(interval).any() else f" [{form(interval[0])}, {form(interval[1])}]"


def with_interval(values: np.ndarray) -> str:
    return form(values.mean()) + between(mean_interval(values)) if len(values) else "–"
