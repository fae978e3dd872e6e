"""Tests and intervals against scipy, the definitions written out, and every resample enumerated."""

import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from reports import statistics
from reports.statistics import Stratum, bootstrap, holm, mcnemar, newcombe, wilson

COUNTS = st.integers(0, 3000)


def stratum(*differences: float, weights: list[float] | None = None) -> Stratum:
    return Stratum(np.array(differences), np.array(weights or [1.0] * len(differences)))


def normal(count: int, mean: float = 0.0, seed: int = 0) -> Stratum:
    return stratum(*np.random.default_rng(seed).normal(mean, 1, count))


@settings(deadline=None)
@given(first=COUNTS, second=COUNTS)
@example(0, 0)
@example(1, 0)
@example(1500, 1500)
@example(0, 3000)
def test_mcnemar_is_the_binomial_test_of_scipy_and_of_whole_numbers(first: int, second: int) -> None:
    total = first + second
    term = terms = 1
    for chosen in range(min(first, second)):
        term = term * (total - chosen) // (chosen + 1)
        terms += term
    found = mcnemar(first, second)
    assert found == pytest.approx(float(min(Fraction(1), Fraction(2 * terms, 2**total))), rel=1e-8, abs=1e-307)
    theirs = stats.binomtest(first, total).pvalue if total else 1
    assert found == pytest.approx(theirs, rel=1e-8) or max(found, theirs) < 1e-280  # where scipy gives up


def test_mcnemar_of_millions() -> None:
    assert mcnemar(10**6, 10**6 + 5000) == pytest.approx(stats.binomtest(10**6, 2 * 10**6 + 5000).pvalue, rel=1e-6)


def enumerated(*strata: Stratum) -> tuple[float, float]:
    """p and the reach of the interval if every resample is drawn once, the definition written out."""

    def mean_and_variance(part: Stratum, drawn: tuple[int, ...]) -> tuple[float, float]:
        d, w = part.differences[list(drawn)], part.weights[list(drawn)]
        mean = float((d * w).sum() / w.sum())
        return mean, float((w**2 * (d - mean) ** 2).sum() / w.sum() ** 2)

    def studentised(draws: tuple[tuple[int, ...], ...], centre: float) -> tuple[float, float]:
        parts = [mean_and_variance(part, drawn) for part, drawn in zip(strata, draws, strict=True)]
        error = math.sqrt(sum(variance for _, variance in parts)) / len(parts)
        deviation = abs(sum(mean for mean, _ in parts) / len(parts) - centre)
        return deviation / error if error > 1e-9 else math.inf, error

    whole = tuple(tuple(range(len(part.differences))) for part in strata)
    centre = sum(float(np.average(part.differences, weights=part.weights)) for part in strata) / len(strata)
    observed, error = studentised(whole, 0.0)
    every = itertools.product(*(itertools.product(own, repeat=len(own)) for own in whole))
    found = np.sort([studentised(draws, centre)[0] for draws in every])
    return float((found >= observed - 1e-9).mean()), float(found[math.ceil(0.95 * len(found)) - 1]) * error


@pytest.mark.parametrize(
    "strata",
    [
        [stratum(0.3, 0.1, 0.5, 0.2, -0.1)],
        [stratum(0, 1, 0, -1, 1)],
        [stratum(0.3, 0.1, 0.5, 0.2, -0.1, weights=[10, 1, 5, 5, 3])],
        [stratum(1, 2, 4), stratum(0.5, 1.0, 1.5)],
        [stratum(1, 1, 1), stratum(0, 1, 3)],
        [stratum(2, 3)],
    ],
)
def test_bootstrap_is_the_enumeration_of_all_resamples(strata: list[Stratum]) -> None:
    p, reach = enumerated(*strata)
    found = bootstrap(strata, resamples=40_000)
    assert found.p == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 40_000) + 1e-4)
    mean = sum(float(np.average(part.differences, weights=part.weights)) for part in strata) / len(strata)
    assert found.value == pytest.approx(mean)
    assert found.high - mean == pytest.approx(reach, rel=0.05) or reach == math.inf == found.high


@pytest.mark.parametrize("mean", [0.0, 0.1, 0.2])
def test_bootstrap_of_many_documents_is_scipys_and_the_t_test(mean: float) -> None:
    part = normal(400, mean, seed=3)
    found, t = bootstrap([part], resamples=10_000), stats.ttest_1samp(part.differences, 0)
    assert found.p == pytest.approx(t.pvalue, abs=0.02)
    theirs = stats.bootstrap([part.differences], np.mean, method="BCa", random_state=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_false_alarms_on_eight_windows_are_as_rare_as_promised() -> None:
    alarms = sum(bootstrap([normal(8, seed=seed)], resamples=999).p < 0.05 for seed in range(400))
    assert alarms / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_average_is_over_tasks_however_many_documents_they_have() -> None:
    assert bootstrap([stratum(*[1.0, 0.0] * 2), stratum(*[0.0, 0.2] * 50)]).value == pytest.approx(0.3)


def test_tasks_are_resampled_independently() -> None:
    one = bootstrap([normal(100, 0.1)], resamples=10_000)
    two = bootstrap([normal(100, 0.1)] * 2, resamples=10_000)
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(math.sqrt(0.5), rel=0.03)


def test_interval_and_p_agree() -> None:
    for seed in range(30):
        found = bootstrap([normal(20, 0.4, seed)], resamples=999)
        assert (found.p <= 0.05) == (found.low > 0 or found.high < 0)


def test_p_is_never_zero_and_the_same_seed_gives_the_same() -> None:
    sure = normal(50, 10)
    assert 1e-9 <= bootstrap([sure]).p < 1e-4
    assert bootstrap([sure], seed=1) == bootstrap([sure], seed=1) != bootstrap([sure], seed=2)


@pytest.mark.parametrize(("count", "p"), [(1, 1.0), (3, 0.25), (100, 1e-9)])
def test_differences_that_are_all_the_same(count: int, p: float) -> None:
    assert bootstrap([stratum(*[0.0] * count)]).p == 1
    found = bootstrap([stratum(*[0.1] * count)])
    assert found.p == p and found.low <= found.value <= found.high


def test_one_document_says_nothing() -> None:
    found = bootstrap([stratum(0.7)])
    assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1.0)


def test_memory_does_not_grow_with_documents_times_resamples() -> None:
    tracemalloc.start()
    bootstrap([normal(4000)], resamples=5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    statistics._draws.cache_clear()
    assert peak < 100e6 < 4000 * 5000 * 8


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=6))
@example([0.0, 1.0])
@example([0.01, 0.01, 0.04])
def test_holm_is_the_closure_of_bonferroni(p_values: list[float]) -> None:
    every = [s for size in range(1, 7) for s in itertools.combinations(range(len(p_values)), size)]
    expected = [
        max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in every if index in s)
        for index in range(len(p_values))
    ]
    assert holm(p_values) == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.1])
def test_holm_refuses_what_is_no_probability(wrong: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, wrong])


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
@example((0, 1))
@example((40, 40))
def test_wilson_is_scipys(right: tuple[int, int]) -> None:
    expected = stats.binomtest(*right).proportion_ci(method="wilson")
    assert wilson(right[0] / right[1], right[1]) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("shares", [(0.4, 0.1, 0.1, 0.4), (0.3, 0.2, 0.05, 0.45), (0.7, 0.1, 0.05, 0.15)])
def test_newcombe_covers_the_true_difference(shares: tuple[float, ...]) -> None:
    """The chance that the interval holds the truth, summed over every outcome of 30 documents."""
    covered, truth = 0.0, shares[1] - shares[2]
    for cells in itertools.product(range(31), repeat=3):
        if sum(cells) <= 30:
            counts = (*cells, 30 - sum(cells))
            low, high = newcombe(*counts)
            covered += (low <= truth <= high) * stats.multinomial.pmf(counts, 30, shares)
    assert 0.93 < covered < 0.99


def test_newcombe_turns_with_the_runs() -> None:
    low, high = newcombe(20, 9, 3, 8)
    assert newcombe(20, 3, 9, 8) == pytest.approx((-high, -low))
    assert low < 6 / 40 < high


def test_newcombe_of_equal_answers_is_around_zero_and_finite() -> None:
    for counts in ((40, 0, 0, 0), (0, 0, 0, 1), (10, 0, 0, 10)):
        low, high = newcombe(*counts)
        assert -1 <= low <= 0 <= high <= 1
