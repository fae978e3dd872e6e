"""Token sequences that begin alike, as trees: what of many prompts has to be evaluated, each shared part once.

The choices of one question share their context, and questions that follow the same solved examples share those. Sorted,
sequences that begin alike are neighbours. A run of neighbours becomes a `Group`: the tokens that all of it begin with,
the prefix, to be evaluated once and kept as a key/value cache; and rows, trees of what follows, in which a token that
several sequences have in the same place is one node:

    Question: ... Answer:  ─┬─ a cat          prefix  Question: ... Answer
                            ├─ a dog     ->   row     :  a  cat  dog  the  sun     every node attends to its
                            └─ the sun                                             ancestors and to the prefix

Tokens are whole numbers; nothing here knows what they stand for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

ROW = 256
"""Nodes of a row, at most, but for a longer sequence: a node's attention passes over all others of its row."""
LONG = 2048
"""Tokens after a prefix, at most: the mask of a longer row would outgrow the rest, so that its prompt is read alone."""
WORTH = 0.25
"""Neighbours that share a smaller part of the longer one are left apart."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A sequence to evaluate."""

    tokens: Tokens
    """What the model reads."""
    scored: int
    """The first position whose prediction is asked for; all later ones are too."""


@dataclass(frozen=True, eq=False)
class Row:
    """Some prompts of a group without its prefix, as a tree."""

    tokens: Tokens
    """The token of each node; a node comes after its parent."""
    parents: Tokens
    """The node before it, -1 where that is the end of the prefix."""
    depths: Tokens
    """Nodes between it and the prefix."""
    paths: dict[int, Tokens]
    """By prompt: the nodes at its scored positions."""

    @property
    def size(self) -> int:
        """Nodes."""
        return len(self.tokens)

    @property
    def branches(self) -> bool:
        """Whether it is more than one sequence."""
        return bool((self.parents != np.arange(-1, self.size - 1)).any())

    def ancestors(self) -> NDArray[np.bool_]:
        """Which nodes (columns) each node (row) follows, itself included."""
        reach = np.eye(self.size, dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                reach[node] |= reach[parent]
        return reach


@dataclass(frozen=True, eq=False)
class Group:
    """Prompts that begin alike."""

    prefix: Tokens
    """What all of them begin with and none is scored on; empty where sharing it would not pay."""
    rows: list[Row]
    """What follows."""


def groups(prompts: Sequence[Prompt]) -> list[Group]:
    """Every prompt in exactly one row of one group.

    Args:
        prompts: of at least one token each, no two alike.
    """
    order = sorted(range(len(prompts)), key=lambda number: prompts[number].tokens.astype(">u4").tobytes())
    shared = [0, *(common(prompts[a].tokens, prompts[b].tokens) for a, b in pairwise(order))]
    forest = _Forest(prompts, order, shared)
    return [group for first, last in forest.runs(0, len(order), 0) for group in forest.groups(first, last)]


def common(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(a), len(b))
    unlike = a[:length] != b[:length]
    return int(unlike.argmax()) if unlike.any() else length


@dataclass(frozen=True)
class _Forest:
    prompts: Sequence[Prompt]
    order: list[int]
    """Prompts such that neighbours begin alike."""
    shared: list[int]
    """How many tokens each shares with the one before it in that order."""

    def runs(self, first: int, last: int, start: int) -> Iterator[tuple[int, int]]:
        """The neighbours `first` to `last` (exclusive), cut where too little is shared beyond `start` tokens."""
        begin = first
        for place in range(first + 1, last + 1):
            if place == last or self.shared[place] - start < WORTH * (self._longest(place - 1, place + 1) - start):
                yield begin, place
                begin = place

    def groups(self, first: int, last: int) -> Iterator[Group]:
        """The neighbours as one group, but for those that go on for long after its prefix.

        A prefix leaves the position that is scored first to the rows.
        """
        if last - first == 1 or self._nodes(first, last, 0) <= ROW:
            yield self._without_prefix(first, last)
            return
        scored = min(self.prompts[number].scored for number in self.order[first:last])
        start = min(scored, *self.shared[first + 1 : last])
        prefix = self.prompts[self.order[first]].tokens[:start]
        rows = []
        for begin, end in self._packed(first, last, start):
            if self._nodes(begin, end, start) > LONG:
                yield self._without_prefix(begin, end)
            else:
                rows.append(self._row(begin, end, start))
        if rows:
            yield Group(prefix, rows)

    def _without_prefix(self, first: int, last: int) -> Group:
        return Group(np.empty(0, np.int64), [self._row(first, last, 0)])

    def _packed(self, first: int, last: int, start: int) -> Iterator[tuple[int, int]]:
        """As many neighbours at a time as a row takes; those that share more than the prefix stay together."""
        begin = end = first
        for after in self._units(first, last, start):
            if end > begin and self._nodes(begin, after, start) > ROW:
                yield begin, end
                begin = end
            end = after
        yield begin, end

    def _units(self, first: int, last: int, start: int) -> Iterator[int]:
        """Where what must not be divided ends: runs that a row has room for, single prompts of the others."""
        for begin, end in self.runs(first, last, start):
            whole = self._nodes(begin, end, start) <= ROW
            yield from [end] if whole else range(begin + 1, end + 1)

    def _nodes(self, first: int, last: int, start: int) -> int:
        """Nodes of the tree that the neighbours make below `start` tokens."""
        lengths = [len(self.prompts[number].tokens) for number in self.order[first:last]]
        return sum(lengths) - sum(self.shared[first + 1 : last]) - start

    def _longest(self, first: int, last: int) -> int:
        return max(len(self.prompts[number].tokens) for number in self.order[first:last])

    def _row(self, first: int, last: int, start: int) -> Row:
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        path: list[int] = []
        paths = {}
        for place in range(first, last):
            prompt = self.prompts[self.order[place]]
            path = path[: max(0, self.shared[place] - start)]
            for token in prompt.tokens[start + len(path) :].tolist():
                parents.append(path[-1] if path else -1)
                depths.append(len(path))
                path.append(len(tokens))
                tokens.append(token)
            paths[self.order[place]] = np.array(path[prompt.scored - start :], np.int64)
        return Row(np.array(tokens, np.int64), np.array(parents, np.int64), np.array(depths, np.int64), paths)
