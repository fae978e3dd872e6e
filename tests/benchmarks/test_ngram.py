"""The n-gram baselines against a brute-force reading of their formulas, on small random streams."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.embedded.ngram import discounts, kneser_ney, witten_bell

V = 5
streams = st.lists(st.integers(0, V - 1), min_size=4, max_size=60).map(np.array)
SMOOTHINGS = {"witten_bell": witten_bell, "kneser_ney": kneser_ney}


def grams(stream, n):
    return [tuple(stream[i : i + n]) for i in range(len(stream) - n + 1)]


def naive_witten_bell(stream, history, word):
    if history is None:
        return 1 / V
    counts = Counter(grams(stream, len(history) + 1))
    after = {w: counts[(*history, w)] for w in range(V) if counts[(*history, w)]}
    lower = naive_witten_bell(stream, history[1:] if history else None, word)
    total, types = sum(after.values()), len(after)
    return (after.get(word, 0) + types * lower) / (total + types) if total else lower


def naive_kneser_ney(stream, history, word, order):
    if history is None:
        return 1 / V
    n = len(history) + 1
    # Below the top order a gram counts once per token that was seen before it, in a gram that counts itself.
    longer = set(grams(stream, order)) if n < order else None
    counts = Counter(grams(stream, n)) if longer is None else Counter(gram[-n:] for gram in shortened(longer, n + 1))
    d = discounts(np.array(list(counts.values())))
    after = {w: counts[(*history, w)] for w in range(V) if counts[(*history, w)]}
    lower = naive_kneser_ney(stream, history[1:] if history else None, word, order)
    if not after:
        return lower
    held_back = sum(d[min(count, 3)] for count in after.values())
    own = after.get(word, 0)
    return (own - d[min(own, 3)] + held_back * lower) / sum(after.values())


def shortened(longer, n):
    return {gram[-n:] for gram in longer}


@settings(max_examples=30, deadline=None)
@given(streams, st.integers(1, 4))
def test_witten_bell_is_its_formula(stream, order):
    order = min(order, len(stream))
    found = witten_bell(stream, order, V).probabilities(stream)
    for i, word in enumerate(stream):
        history = tuple(stream[max(0, i - order + 1) : i])
        assert found[i] == pytest.approx(naive_witten_bell(stream, history, word))


@settings(max_examples=30, deadline=None)
@given(streams, st.integers(1, 4))
def test_kneser_ney_is_its_formula(stream, order):
    order = min(order, len(stream))
    found = kneser_ney(stream, order, V).probabilities(stream)
    for i, word in enumerate(stream):
        history = tuple(stream[max(0, i - order + 1) : i])
        assert found[i] == pytest.approx(naive_kneser_ney(stream, history, word, order))


@settings(max_examples=30, deadline=None)
@given(streams, streams, st.integers(1, 4), st.sampled_from(sorted(SMOOTHINGS)))
def test_probabilities_sum_to_one_after_any_history(stream, history, order, smoothing):
    model = SMOOTHINGS[smoothing](stream, min(order, len(stream)), V)
    last = [model.probabilities(np.append(history, word))[-1] for word in range(V)]
    assert min(last) > 0
    assert sum(last) == pytest.approx(1)


def test_more_context_predicts_a_periodic_stream_better():
    stream = np.array([0, 1, 0, 2] * 50)
    means = [np.log(kneser_ney(stream, order, V).probabilities(stream)).mean() for order in (1, 2, 3)]
    assert means == sorted(means)


def test_an_order_that_does_not_fit_an_integer_is_refused():
    with pytest.raises(ValueError, match="63 bits"):
        witten_bell(np.arange(10), 6, 2048)
