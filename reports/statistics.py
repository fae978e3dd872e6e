"""Is a difference between two runs real? Tests and intervals for runs that saw the same documents or windows.

Exact McNemar test: McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
Bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 12 and 16; here of the studentised
difference, symmetric as in Hall, "On symmetric bootstrap confidence intervals", 1988, because plain percentiles are
too sure of themselves on the few windows of a long text; its tail as in Knijnenburg et al., "Fewer permutations, more
accurate p-values", 2009. Holm, "A simple sequentially rejective multiple test
procedure", 1979. Wilson, "Probable inference, the law of succession, and statistical inference", 1927; for differences
Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data", 1998.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

ALPHA = 0.05
"""A difference is called real below it; intervals cover what is left of one."""
RESAMPLES = 2_000
"""p near `ALPHA` is then exact to half a point (one standard error), the reach of an interval to 2 %."""
NORMAL = 1.959963984540054
"""The standard normal distribution's quantile at 1 - ALPHA / 2."""
FEW = 10
"""Resamples as extreme as what was observed that are too few to be counted."""
SMALLEST = 1e-9
"""The tail is not trusted beyond."""
ALONE = 64
"""Up to so many documents are drawn one by one: comparisons can then share their draws, which is what takes time."""
BLOCK = 2**19
"""Most numbers drawn at a time, so that memory does not grow with the number of documents."""


@dataclass(frozen=True)
class Stratum:
    """What one task or text says about the difference between two runs. N documents or windows."""

    differences: Numbers
    """[N], the score of one run minus that of the other."""
    weights: Numbers
    """[N], positive: tokens of a window, 1 for a document."""


@dataclass(frozen=True)
class Estimate:
    """A difference with its uncertainty."""

    value: float
    """In the unit of the scores, as `low` and `high`."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    p: float
    """Two-sided: how often chance alone makes a difference as large."""


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of two runs of which each alone was right on so many documents; 1 where neither was.

    The smaller count is binomial with one half under the hypothesis: its tail is summed from its largest term down.
    """
    total, smaller = only_first + only_second, min(only_first, only_second)
    k = np.arange(smaller, 0, -1)
    log_choose = math.lgamma(total + 1) - math.lgamma(smaller + 1) - math.lgamma(total - smaller + 1)
    log_tail = log_choose - total * math.log(2) + math.log1p(np.cumprod(k / (total - k + 1)).sum())
    return min(1.0, 2 * math.exp(min(0.0, log_tail)))


def bootstrap(strata: Sequence[Stratum], resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean over strata of the weighted mean differences, each stratum's documents resampled within it.

    Both runs get the same resample because their differences are what is drawn. p counts the resamples whose
    deviation, in units of their own standard error, is at least the observed difference in units of its own; where
    those are few, see `_tail`. It is never 0. The interval holds the differences that this test does not reject: one
    document rejects none.
    """
    means = [float(np.average(stratum.differences, weights=stratum.weights)) for stratum in strata]
    value = sum(means) / len(means)
    if all(np.ptp(stratum.differences) == 0 for stratum in strata):
        return _without_spread(value, sum(len(stratum.differences) for stratum in strata))
    groups = [_Groups.of(stratum, mean) for stratum, mean in zip(strata, means, strict=True)]
    error = math.sqrt(sum(float(_moments(group.terms @ group.counts)[1]) for group in groups)) / len(groups)
    deviations = np.sort(_deviations(groups, resamples, seed))
    observed = abs(value) / error * (1 - 1e-9)
    extreme = resamples - int(np.searchsorted(deviations, observed))
    p = (1 + extreme) / (1 + resamples)
    if extreme < FEW:
        p = min(p, max(_tail(deviations, observed), math.prod(group.without_spread for group in groups)))
    reach = error * float(deviations[min(resamples, math.ceil((1 - ALPHA) * (resamples + 1))) - 1])
    return Estimate(value, value - reach, value + reach, p)


def _tail(deviations: Numbers, observed: float) -> float:
    """p from an exponential tail through the largest hundredth of the sorted deviations.

    Counting cannot tell one in a million from one in ten thousand, and a table of many comparisons has to. The tail
    of means is thinner than that, which makes p too large rather than too small.
    """
    start = len(deviations) * 99 // 100
    excess = float(deviations[start:].mean()) - deviations[start]
    beyond = max(0.0, observed - deviations[start])
    return max(SMALLEST, 0.01 * math.exp(-beyond / excess)) if 0 < excess < math.inf else 1.0


def _without_spread(value: float, count: int) -> Estimate:
    """Every document differs by the same: there is nothing to resample, and the sign test remains."""
    reach = 0.0 if count > 1 else math.inf
    p = 1.0 if value == 0 else max(2.0 ** (1 - count), SMALLEST)
    return Estimate(value, value - reach, value + reach, p)


@dataclass(frozen=True)
class _Groups:
    """Documents of a stratum that are alike, K kinds: few where many are right or wrong, else as many as documents."""

    counts: Numbers
    """[K], documents of a kind."""
    terms: Numbers
    """[5, K], what `_moments` sums for each: w, w d, w^2, w^2 d and w^2 d^2 of the deviation d from the mean."""
    without_spread: float
    """The chance that all documents of a resample are alike."""

    @classmethod
    def of(cls, stratum: Stratum, mean: float) -> "_Groups":
        # As complex numbers because NumPy finds equal numbers ten times faster than equal rows.
        every = stratum.differences - mean + 1j * stratum.weights
        kinds, counts = np.unique(every, return_counts=True)
        alike = float(((counts / len(every)) ** len(every)).sum())
        if len(every) <= ALONE:
            kinds, counts = every, np.ones(len(every))
        d, w = kinds.real, kinds.imag
        return cls(counts.astype(float), np.stack([w, w * d, w**2, w**2 * d, w**2 * d**2]), alike)


def _moments(sums: NDArray[np.floating]) -> tuple[Numbers, Numbers]:
    """Weighted mean and its squared standard error (of a ratio, linearised), from sums [5, ...]."""
    w, wd, ww, wwd, wwdd = sums
    mean = wd / w
    return mean, np.maximum(0, wwdd - 2 * mean * wwd + mean**2 * ww) / w**2


def _deviations(groups: Sequence[_Groups], resamples: int, seed: int) -> Numbers:
    """[resamples] sizes of the deviation in standard errors; infinite where a resample has no spread."""
    mean, variance = np.zeros(resamples), np.zeros(resamples)
    for index, group in enumerate(groups):
        step, terms = max(1, BLOCK // len(group.counts)), group.terms.astype(np.float32)
        counts = tuple(group.counts.astype(int).tolist())
        for start in range(0, resamples, step):
            drawn = _draws(counts, min(step, resamples - start), (seed, index, start))
            part = _moments(terms @ drawn)
            mean[start : start + step] += part[0]
            variance[start : start + step] += part[1]
    spread = variance > 1e-6 * variance.max()  # below is what rounding leaves of none
    return np.divide(np.abs(mean), np.sqrt(variance), out=np.full(resamples, np.inf), where=spread)


@lru_cache(maxsize=32)  # the pairs of a table mostly share their number of windows or documents
def _draws(counts: tuple[int, ...], resamples: int, seed: tuple[int, ...]) -> NDArray[np.float32]:
    """[K, resamples] how often each kind of document is drawn when all are drawn with replacement."""
    total = sum(counts)
    drawn = np.random.default_rng(seed).multinomial(total, np.array(counts) / total, resamples)
    return drawn.T.astype(np.float32, order="C")  # few rows multiply faster than few columns


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for being several, by Holm's step-down.

    Raises:
        ValueError: one is not between 0 and 1.
    """
    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p-values are between 0 and 1, and {wrong[0]} is not")
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values, dtype=float)[order]))
    return adjusted.tolist()


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of right answers among `count` documents; never below 0 or above 1."""
    z2 = NORMAL**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    reach = NORMAL / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def newcombe(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """The 95 % interval of the first run's share of right answers minus the second's, from counts of documents.

    Newcombe's method 10: the two Wilson intervals, combined with the correlation of the answers.
    """
    count = both + only_first + only_second + neither
    first, second = (both + only_first) / count, (both + only_second) / count
    (low_1, high_1), (low_2, high_2) = wilson(first, count), wilson(second, count)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    excess = both * neither - only_first * only_second
    correlation = (max(excess - count / 2, 0) if excess > 0 else excess) / math.sqrt(margins) if margins else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))

    low, high = reach(first - low_1, high_2 - second), reach(high_1 - first, second - low_2)
    return first - second - low, first - second + high
