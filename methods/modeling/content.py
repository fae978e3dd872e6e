"""Finding tensors by content: which tensor of a dense model, or which rows and columns of one, another tensor is.

A row (or column) is looked up by a random projection of its first entries' bits to 64 bits,

    key(r) = sum_c f_c bits(r_c) mod 2^64

and what is found this way is compared bit for bit: a coincidence of keys costs a missed find, never a wrong one.

Where both rows and columns are missing, no row is a row of the dense matrix. A few of them are found as the only dense
rows that hold all their values; across these the columns are looked up, and then all rows.
"""

import re
from collections.abc import Iterator
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as an element of so many bytes."""
ENTRIES = 256
"""How much of a row its key looks at: more takes longer, and rows that begin alike are rare."""
PROBES = 16
"""Rows that are looked for by their values."""


class Part(NamedTuple):
    """Some rows and columns of a dense matrix; their numbers in order, int16 where these are small enough, else int32,
    or None: all of them. Not both are None."""

    name: str
    rows: Tensor | None
    columns: Tensor | None


class Dense:
    """The tensors of a dense model."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self._digests = {name: digest(tensor) for name, tensor in tensors.items()}
        self._names = {key: name for name, key in self._digests.items()}
        self._keys: dict[tuple[str, int], Tensor] = {}

    @property
    def identity(self) -> str:
        """A hash over names, dtypes, shapes and content."""
        return sha256("\n".join(f"{name} {key}" for name, key in sorted(self._digests.items())).encode()).hexdigest()

    def whole(self, name: str, key: str) -> str | None:
        """The name of a tensor with some digest: `name` if possible, else any."""
        return name if self._digests.get(name) == key else self._names.get(key)

    def part(self, name: str, tensor: Tensor) -> Part | None:
        """A matrix of the same role of which this one is some rows and columns; those of the same block first.

        Only matrices are looked for: the numbers of a bias's entries take as much room as the bias.
        """
        alike = [other for other in self.tensors if _same_role(other, name)] if tensor.ndim == 2 else []
        for other in sorted(alike, key=lambda other: _block(other) != _block(name)):
            if (found := self._within(other, tensor)) is not None:
                return Part(other, *found)
        return None

    def _within(self, name: str, tensor: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
        """The rows and columns of a dense tensor that make another one; None when they do not."""
        whole = self.tensors[name]
        if whole.dtype != tensor.dtype or whole.ndim != 2:
            return None
        for rows, columns in self._guesses(name, tensor):
            some = rows is not None or columns is not None
            if some and _bits(_taken(whole, rows, columns)).equal(_bits(tensor)):
                return _short(rows, whole.shape[0]), _short(columns, whole.shape[1])
        return None

    def _guesses(self, name: str, tensor: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Rows and columns that may make a tensor; both None where none can."""
        whole = self.tensors[name]
        if whole.shape[1] == tensor.shape[1]:
            yield _places(_keys(tensor, 0), self._whole_keys(name, 0)), None
        if whole.shape[0] == tensor.shape[0]:
            yield None, _places(_keys(tensor, 1), self._whole_keys(name, 1))
        if whole.shape[0] > tensor.shape[0] and whole.shape[1] > tensor.shape[1]:
            yield _inner(tensor, whole)

    def _whole_keys(self, name: str, axis: int) -> Tensor:
        if (name, axis) not in self._keys:
            self._keys[name, axis] = _keys(self.tensors[name], axis)
        return self._keys[name, axis]


def _taken(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    matrix = matrix.cpu()
    matrix = matrix if rows is None else matrix.index_select(0, rows)
    return matrix if columns is None else matrix.index_select(1, columns)


def _short(numbers: Tensor | None, of: int) -> Tensor | None:
    return None if numbers is None else numbers.to(torch.int16 if of <= 1 << 15 else torch.int32)


def _inner(tensor: Tensor, whole: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Rows and columns of a matrix that seem to make a smaller one; None, None where there are none."""
    pairs = [(probe, _holding(tensor[probe], whole)) for probe in range(0, len(tensor), -(-len(tensor) // PROBES))]
    probes, places = [p for p, rows in pairs if len(rows) == 1], [int(rows) for _, rows in pairs if len(rows) == 1]
    if not probes:
        return None, None
    columns = _places(_keys(tensor[probes], 1), _keys(whole[places], 1))
    if columns is None:
        return None, None
    return _places(_keys(tensor, 0), _keys(whole.cpu().index_select(1, columns), 0)), columns


def _holding(values: Tensor, whole: Tensor) -> Tensor:
    """The rows of a matrix that hold the first of some values, all of them."""
    bits, rows = _bits(whole), torch.arange(len(whole))
    for value in _bits(values)[:ENTRIES]:
        rows = rows[(bits[rows] == value).any(1)]
    return rows


def digest(tensor: Tensor) -> str:
    """A hash of dtype, shape and content."""
    content = sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    content.update(_bits(tensor).flatten().numpy().data)
    return content.hexdigest()


def _same_role(dense: str, name: str) -> bool:
    """Whether a tensor's name ends as a dense one does (`gate_proj.weight`), whatever the block; a structure may have
    put the last module into one of its own (`gate_proj.linear.weight`)."""
    *_, module, leaf = ["", *dense.split(".")]
    *parts, last = name.split(".")
    return last == leaf and module in parts


def _block(name: str) -> list[str]:
    """The numbers in a tensor's name."""
    return re.findall(r"\.(\d+)\.", name)


def _bits(tensor: Tensor) -> Tensor:
    """The elements as integers, so that zeros of either sign differ and not-a-numbers do not."""
    return tensor.cpu().contiguous().view(BITS[tensor.element_size()])


def _keys(matrix: Tensor, axis: int) -> Tensor:
    """A key per row (axis 0) or column (axis 1), int64."""
    lines = _bits(matrix[:, :ENTRIES] if axis == 0 else matrix[:ENTRIES].T).long()
    factors = torch.randint(-(2**63), 2**63 - 1, (lines.shape[1],), generator=torch.Generator().manual_seed(0))
    return lines @ factors


def _places(wanted: Tensor, present: Tensor) -> Tensor | None:
    """Where each of some keys is among others; None when one is absent."""
    ascending, order = present.sort(stable=True)
    places = torch.searchsorted(ascending, wanted).clamp_max(len(present) - 1)
    return order[places] if ascending[places].equal(wanted) else None
