"""n-gram language models of a token stream: what the embedded models have to beat, on the same tokens.

Interpolated Witten-Bell (Witten and Bell, 1991) and interpolated modified Kneser-Ney (Chen and Goodman, 1998,
https://dash.harvard.edu/handle/1/25104739). Both have the form

    p_n(w | h) = mass(h w) + backoff(h) p_{n-1}(w | h without its first token),    p_0 = 1 / vocabulary

with mass 0 for an unseen n-gram and backoff 1 for an unseen history.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """One order of a model. An n-gram is one integer: its tokens, `bits` each, the last one lowest."""

    grams: Ints
    """Seen n-grams, sorted."""
    mass: Floats
    histories: Ints
    """Seen histories, sorted."""
    backoff: Floats

    def probability(self, grams: Ints, bits: int, lower: Floats) -> Floats:
        """p_n of each n-gram, given p_{n-1} of the same last tokens."""
        backoff = _look_up(self.histories, self.backoff, grams >> bits, 1.0)
        return _look_up(self.grams, self.mass, grams, 0.0) + backoff * lower


@dataclass(frozen=True)
class NGram:
    """An n-gram model."""

    tables: list[Table]
    """Of order 1, 2, ..."""
    vocabulary: int

    def probabilities(self, stream: Ints) -> Floats:
        """p of each token of a stream [T], given as many of its predecessors as the order allows and there are."""
        bits = _bits(self.vocabulary)
        result = np.full(len(stream), 1 / self.vocabulary)
        for order, table in enumerate(self.tables[: len(stream)], 1):
            tail = slice(order - 1, None)
            result[tail] = table.probability(_grams(stream, order, bits), bits, result[tail])
        return result


def witten_bell(stream: Ints, order: int, vocabulary: int) -> NGram:
    """A history keeps back as many counts as it has different successors."""

    def table(grams: Ints, counts: Ints, bits: int) -> Table:
        histories, where, total = _histories(grams, counts, bits)
        types = np.bincount(where)
        return Table(grams, counts / (total + types)[where], histories, types / (total + types))

    bits = _bits(vocabulary)
    counts = [np.unique(_grams(stream, n, bits), return_counts=True) for n in range(1, order + 1)]
    return NGram([table(*pair, bits) for pair in counts], vocabulary)


def kneser_ney(stream: Ints, order: int, vocabulary: int) -> NGram:
    """Lower orders count in how many contexts a gram continues; three discounts per order, for counts 1, 2 and more."""
    bits = _bits(vocabulary)
    grams, counts = np.unique(_grams(stream, order, bits), return_counts=True)
    tables = [_discounted(grams, counts, bits)]
    for n in range(order - 1, 0, -1):
        grams, counts = np.unique(grams & ((1 << n * bits) - 1), return_counts=True)
        tables.insert(0, _discounted(grams, counts, bits))
    return NGram(tables, vocabulary)


def _discounted(grams: Ints, counts: Ints, bits: int) -> Table:
    histories, where, total = _histories(grams, counts, bits)
    discount = discounts(counts)[np.minimum(counts, 3)]
    return Table(grams, (counts - discount) / total[where], histories, np.bincount(where, discount) / total)


def discounts(counts: Ints) -> Floats:
    """Chen and Goodman's D for counts 0, 1, 2, 3 and more, from how many grams occur one to four times."""
    n1, n2, n3, n4 = (np.count_nonzero(counts == times) for times in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array([0, 0.5, 0.5, 0.5])  # too little data for the estimate: plain absolute discounting
    y = n1 / (n1 + 2 * n2)
    estimates = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(estimates, 0, [0, 1, 2, 3])


def _bits(vocabulary: int) -> int:
    return max(1, (vocabulary - 1).bit_length())


def _grams(stream: Ints, order: int, bits: int) -> Ints:
    """Every window of `order` tokens as one integer, shape [T - order + 1]."""
    if order * bits > 63:
        raise ValueError(f"{order} tokens of {bits} bits do not fit into 63 bits")
    length = len(stream) - order + 1
    parts = (stream[n : n + length].astype(np.int64) << (order - 1 - n) * bits for n in range(order))
    return sum(parts, np.zeros(length, np.int64))


def _histories(grams: Ints, counts: Ints, bits: int) -> tuple[Ints, Ints, Ints]:
    """The different histories of sorted grams, which of them each gram has, and the total count of each."""
    histories, where = np.unique(grams >> bits, return_inverse=True)
    return histories, where, np.bincount(where, counts).astype(np.int64)


def _look_up(keys: Ints, values: Floats, wanted: Ints, otherwise: float) -> Floats:
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], otherwise)
