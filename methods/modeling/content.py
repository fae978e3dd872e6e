"""Finding tensors by content: which tensor of a dense model, or which rows or columns of one, another tensor is.

A row (or column) is looked up by a random projection of its first entries' bits to 64 bits,

    key(r) = sum_c f_c bits(r_c) mod 2^64

and what is found this way is compared bit for bit: a coincidence of keys costs a missed find, never a wrong one.
"""

import re
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as an element of so many bytes."""
ENTRIES = 256
"""How much of a row its key looks at: more takes longer, and rows that begin alike are rare."""


class Part(NamedTuple):
    """Some rows or columns of a dense matrix."""

    name: str
    axis: int
    """0: rows, 1: columns."""
    kept: Tensor
    """Their numbers in order, int16 where these are small enough, else int32."""


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
        """A matrix of the same role of which this one is some rows or columns; those of the same block first.

        Only matrices are looked for: the numbers of a bias's entries take as much room as the bias.
        """
        alike = [other for other in self.tensors if _role(other) == _role(name)] if tensor.ndim == 2 else []
        for other in sorted(alike, key=lambda other: _block(other) != _block(name)):
            for axis in (0, 1):
                if (kept := self._kept(other, axis, tensor)) is not None:
                    return Part(other, axis, kept)
        return None

    def _kept(self, name: str, axis: int, tensor: Tensor) -> Tensor | None:
        whole = self.tensors[name]
        if whole.dtype != tensor.dtype or whole.ndim != 2 or whole.shape[1 - axis] != tensor.shape[1 - axis]:
            return None
        if (name, axis) not in self._keys:
            self._keys[name, axis] = _keys(whole, axis)
        kept = _places(_keys(tensor, axis), self._keys[name, axis])
        if kept is None or not _bits(whole.cpu().index_select(axis, kept)).equal(_bits(tensor)):
            return None
        return kept.to(torch.int16 if whole.shape[axis] <= 1 << 15 else torch.int32)


def digest(tensor: Tensor) -> str:
    """A hash of dtype, shape and content."""
    content = sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    content.update(_bits(tensor).flatten().numpy().data)
    return content.hexdigest()


def _role(name: str) -> str:
    """The last module of a tensor's name and its own: `gate_proj.weight`, whatever the block."""
    return ".".join(name.split(".")[-2:])


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
