"""The statistics of the benchmark: a few seeds of a few environments, and what they do and do not show.

Scores of one algorithm on one environment are an array with one number per seed. An algorithm on several environments
is a list of such arrays, called strata: a bootstrap resamples the seeds within each, never across environments, and
every environment weighs the same whatever its number of seeds. After Agarwal et al. 2021, "Deep Reinforcement Learning
at the Edge of the Statistical Precipice", arXiv:2108.13264.

Every function that draws random numbers starts from the same seed, so its result depends on its arguments alone.
Intervals are percentile bootstrap intervals; from one seed there is none (nan). From few seeds they are too narrow: a
95 % interval of the mean from five normal scores covers the truth about 84 times in 100, one from ten about 90 times.
"""

import math
from functools import cache
from itertools import chain, combinations

import numpy as np

SEED, RESAMPLES, LEVEL = 20_210_830, 10_000, 0.95


def interval(resampled: np.ndarray) -> np.ndarray:
    """The middle 95 % of (B, ...) -> (2, ...)."""
    return np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def resample(scores: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """(n,) -> (B, n): each row n draws with replacement."""
    return scores[rng.integers(len(scores), size=(resamples, len(scores)))]


def mean_interval(scores: np.ndarray) -> np.ndarray:
    """95 % interval of the mean over seeds, (n,) -> (2,)."""
    if len(scores) < 2:
        return np.full(2, np.nan)
    return interval(resample(scores, np.random.default_rng(SEED)).mean(1))


def difference_interval(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """95 % interval of mean(y) - mean(x), seeds not paired: (n,), (m,) -> (2,)."""
    if min(len(x), len(y)) < 2:
        return np.full(2, np.nan)
    rng = np.random.default_rng(SEED)
    return interval(resample(y, rng).mean(1) - resample(x, rng).mean(1))


def band(curves: np.ndarray, resamples: int = 2000) -> np.ndarray:
    """95 % interval of the mean curve over seeds, (n, T) -> (2, T); whole curves are drawn. nan where one is nan."""
    if len(curves) < 2:
        return np.full((2, curves.shape[1]), np.nan)
    rows = np.random.default_rng(SEED).integers(len(curves), size=(resamples, len(curves)))
    return interval(sum(curves[column] for column in rows.T) / len(curves))


# ------------------------------------------------------------------------------------------- several environments


def weights(strata: list[np.ndarray]) -> np.ndarray:
    """The weight of each score when every environment weighs the same; the sum is 1."""
    return np.concatenate([np.full(len(scores), 1 / len(scores) / len(strata)) for scores in strata])


def iqm(scores: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Interquartile mean, (..., n) -> (...): the mean of the middle half of the weight; a score on the edge counts in
    part. Less noisy than the median, and not moved by one lucky or broken run as the mean is."""
    order = np.argsort(scores, -1, kind="stable")
    upper = np.cumsum(weight[order], -1)
    middle = np.clip(np.minimum(upper, 0.75) - np.maximum(upper - weight[order], 0.25), 0, None)
    return (middle * np.take_along_axis(scores, order, -1)).sum(-1) / middle.sum(-1)


def iqm_interval(strata: list[np.ndarray], resamples: int = 5000) -> tuple[float, np.ndarray]:
    """Interquartile mean over all environments and seeds, and its stratified 95 % interval."""
    rng = np.random.default_rng(SEED)
    weight = weights(strata)
    value = iqm(np.concatenate(strata), weight)
    if max(map(len, strata)) < 2:
        return float(value), np.full(2, np.nan)
    drawn = np.concatenate([resample(scores, rng, resamples) for scores in strata], 1)
    return float(value), interval(iqm(drawn, weight))


def profile(strata: list[np.ndarray], taus: np.ndarray, resamples: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Performance profile: the share of runs that score above each tau, and its stratified band: (T,), (2, T)."""
    rng = np.random.default_rng(SEED)
    above = [(scores[:, None] > taus).astype(float) for scores in strata]
    value = sum(x.mean(0) for x in above) / len(strata)
    if max(map(len, strata)) < 2:
        return value, np.full((2, len(taus)), np.nan)
    drawn = 0
    for x in above:
        counts = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=resamples)
        drawn = drawn + counts @ x / len(x)
    return value, interval(drawn / len(strata))


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
    alone = max(map(len, [*xs, *ys])) < 2
    return float(value), np.full(2, np.nan) if alone else interval(drawn)


# -------------------------------------------------------------------------------------------- is there a difference?


def rank_test(x: np.ndarray, y: np.ndarray, limit: int = 200_000) -> float:
    """Two-sided p of the Mann-Whitney test: how often a split of the pooled scores into groups of these sizes, all
    splits being equally likely when there is no difference, is as uneven as this one. Ties count half, so it holds for
    any scores. All splits are tried where there are at most `limit`, else 20,000 drawn ones."""
    pooled, n = np.concatenate([x, y]), len(x)
    ranks = wins(pooled, pooled).sum(1)  # the rank, from 1/2; ties share theirs
    if math.comb(len(pooled), n) <= limit:
        splits = chain.from_iterable(combinations(range(len(pooled)), n))
        sums = ranks[np.fromiter(splits, np.int64).reshape(-1, n)].sum(1)
    else:
        rng = np.random.default_rng(SEED)
        sums = rng.permuted(np.tile(ranks, (20_000, 1)), axis=1)[:, :n].sum(1)
        sums = np.append(sums, ranks[:n].sum())  # the split that was seen is one of them
    expected = n * ranks.mean()
    return float((np.abs(sums - expected) >= abs(ranks[:n].sum() - expected) - 1e-9).mean())


@cache
def detectable(n: int, m: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The shift between two normal samples of n and m, in standard deviations, that the rank test finds at level alpha
    four times out of five; inf where no split of so few scores can be rare enough."""
    splits = np.zeros(n * m + 1, dtype=object)  # how many splits have this many wins: by adding one score at a time
    splits[0] = 1
    for i in range(1, n + 1):  # Gaussian binomial: multiply by (1 - q^(m+i)), divide by (1 - q^i)
        for u in range(n * m, m + i - 1, -1):
            splits[u] -= splits[u - m - i]
        for u in range(i, n * m + 1):
            splits[u] += splits[u - i]
    tail = 2 * np.cumsum(splits / math.comb(n + m, n)).astype(float)
    if tail[0] > alpha + 1e-12:
        return math.inf
    critical = n * m - int(np.searchsorted(tail, alpha + 1e-12)) + 1  # so many wins or more are significant
    rng = np.random.default_rng(SEED)
    gaps = np.sort((rng.normal(size=(4000, n, 1)) - rng.normal(size=(4000, 1, m))).reshape(4000, -1))
    return float(np.quantile(-gaps[:, n * m - critical], power))  # wins >= critical just when the shift exceeds this


# ------------------------------------------------------------------------------------------------- learning curves


def trailing_means(steps: np.ndarray, returns: np.ndarray, at: np.ndarray, window: int = 100) -> np.ndarray:
    """Mean of the last `window` episodes that had ended by each step of `at`, fewer at the beginning, nan before the
    first: episodes (E,), (E,) and (T,) -> (T,)."""
    sums = np.concatenate([[0.0], np.cumsum(returns)])
    ended = np.searchsorted(steps, at, side="right")
    first = np.maximum(ended - window, 0)
    return (sums[ended] - sums[first]) / np.where(ended == 0, np.nan, ended - first)


def slm_metrics(steps: np.ndarray, means: np.ndarray, random: float | None) -> dict[str, float]:
    """SLM-Lab's measures of one run from its checkpoints: steps and trailing means, (K,), (K,).

    score      = mean of the last 100 means
    strength   = mean_k s_k                          where s_k = mean_k - the random policy's score
    efficiency = sum_k (s_k / step_k) / sum_k s_k    large when the strength is there early
    stability  = 1 - |sum_k min(s_{k+1} - s_k, 0) / sum_{k<K} s_k|
    """
    steps, means = steps[~np.isnan(means)], means[~np.isnan(means)]
    metrics = dict.fromkeys(("slm_score", "strength", "efficiency", "stability"), math.nan)
    if len(means):
        metrics["slm_score"] = means[-100:].mean()
    if len(means) and random is not None:
        s = means - random
        with np.errstate(divide="ignore", invalid="ignore"):
            metrics |= {"strength": s.mean(), "efficiency": (s / steps).sum() / s.sum()}
            metrics["stability"] = 1 - abs(np.minimum(np.diff(s), 0).sum() / s[:-1].sum())
    return metrics


def consistency(curves: np.ndarray, random: float) -> float:
    """SLM-Lab's 1 - 2 sum_t std_j(s_jt) / sum_t mean_j(s_jt) over seeds j, (n, T); nan for one seed."""
    if len(curves) < 2:
        return math.nan
    s = curves[:, ~np.isnan(curves).any(0)] - random
    return float(1 - 2 * s.std(0, ddof=1).sum() / s.mean(0).sum())
