"""How a loaded mixture holds the weights of its experts, and the ways in which each store can compute them.

| store | memory beside the checkpoint's weights | ways |
| --- | --- | --- |
| `shared` | tables | single (reads rows through its table), sorted (copies an expert's rows when it is due), masked |
| `materialised` | every expert's neurons | single, sorted, grouped, masked |
| `core+rest` | neurons that all experts have once, the others of every expert | single, sorted, grouped, masked |
| `pseudo` | a mask | masked |

    single    one token: its expert alone
    sorted    tokens sorted by expert, one product per expert that has any
    grouped   the same as one grouped product (transformers' experts interface), where widths suit its kernel
    masked    every neuron for every token, those outside the token's expert set to zero

All give the same output up to rounding. The checkpoint's weights stay in place whatever the store: they are what is
saved and trained, and what `masked` multiplies with.
"""

# Shape suffixes: T tokens, D hidden size, N experts, w neurons of an expert, U neurons of all experts, C neurons that
# all experts have, r = w - C others.

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from methods.modeling.structures.moe_neurons import Neurons, times
from methods.modeling.structures.moe_reader import Reader
from methods.modeling.structures.moe_stack import Stack
from methods.modeling.structures.row_products import can_read

Way = Callable[[Tensor, Tensor], Tensor]
"""From the chosen experts [T] and the input [T, D] to the output [T, D]."""


class Pseudo:
    """The union and a mask."""

    paths: ClassVar[tuple[str, ...]] = ("masked",)
    """The ways for any number of tokens."""
    fetches: ClassVar[int] = 1
    """How often `sorted` moves an expert's weights."""
    ways: dict[str, Way]
    """All ways, by name."""

    def __init__(self, union: Neurons, index_Nw: Tensor) -> None:
        self.union, self.index_Nw = union, index_Nw.long()
        # 0.0 and 1.0: multiplying by booleans takes seven times as long on a CPU.
        self.mask_NU = union.down_wD.new_zeros(len(index_Nw), len(union.down_wD)).scatter_(1, self.index_Nw, 1)
        self.ways = {"masked": self.masked}

    def masked(self, experts_T: Tensor, x_TD: Tensor) -> Tensor:
        """Every neuron for every token; the way that gives all weights their gradient."""
        return self.union.output(times(self.union.hidden(x_TD), embedding(experts_T, self.mask_NU)))


class Shared(Pseudo):
    """The union and a table."""

    paths = ("masked", "sorted")
    fetches = 2

    def __init__(self, union: Neurons, index_Nw: Tensor) -> None:
        super().__init__(union, index_Nw)
        self.ways["sorted"] = self._sorted
        if can_read(union.down_wD):
            self.readers = [Reader(union, positions_w) for positions_w in self.index_Nw]
            self.ways["single"] = self._single

    def _single(self, experts_T: Tensor, x_TD: Tensor) -> Tensor:
        return self.readers[int(experts_T)](x_TD)

    def _sorted(self, experts_T: Tensor, x_TD: Tensor) -> Tensor:
        room_wD = torch.empty_like(self.union.down_wD[: self.index_Nw.shape[1]])
        return by_expert(
            lambda i, x: self.union.share(self.index_Nw[i], room_wD, x), len(self.index_Nw), experts_T, x_TD
        )


class Materialised(Pseudo):
    """Every expert by itself."""

    paths = ("masked", "sorted", "grouped")

    def __init__(self, union: Neurons, index_Nw: Tensor) -> None:
        super().__init__(union, index_Nw)
        core_C = self._core()
        self.core = replace(union.take(core_C), bias_D=None) if len(core_C) else None
        rest_Nr = self.index_Nw[~torch.isin(self.index_Nw, core_C)].view(len(index_Nw), -1)
        self.stack = Stack(union, rest_Nr)
        self.experts = [self.stack.expert(i) for i in range(len(index_Nw))]
        grouped = self._grouped if self.stack.can_group else self._sorted
        self.ways |= {"single": self._single, "sorted": self._sorted, "grouped": grouped}

    def _core(self) -> Tensor:
        """Positions [C] that are held once."""
        return self.index_Nw.new_empty(0)

    def _single(self, experts_T: Tensor, x_TD: Tensor) -> Tensor:
        return self._with_core(self.experts[int(experts_T)](x_TD), x_TD)

    def _sorted(self, experts_T: Tensor, x_TD: Tensor) -> Tensor:
        return self._with_core(by_expert(lambda i, x: self.experts[i](x), len(self.experts), experts_T, x_TD), x_TD)

    def _grouped(self, experts_T: Tensor, x_TD: Tensor) -> Tensor:
        return self._with_core(self.stack.grouped(experts_T, x_TD), x_TD)

    def _with_core(self, y_TD: Tensor, x_TD: Tensor) -> Tensor:
        return y_TD if self.core is None else y_TD + self.core(x_TD)


class CoreAndRest(Materialised):
    """The neurons that all experts have, and every expert's others."""

    def _core(self) -> Tensor:
        return self.mask_NU.all(0).nonzero()[:, 0]


STORES: dict[str, type[Pseudo]] = {
    "shared": Shared,
    "materialised": Materialised,
    "core+rest": CoreAndRest,
    "pseudo": Pseudo,
}


def by_expert(run: Callable[[int, Tensor], Tensor], count: int, experts_T: Tensor, x_TD: Tensor) -> Tensor:
    """Tokens sorted by expert, one product per expert that has any, and back."""
    order_T = experts_T.argsort(stable=True)
    parts = x_TD.index_select(0, order_T).split(experts_T.bincount(minlength=count).tolist())
    sorted_TD = torch.cat([run(i, part) for i, part in enumerate(parts) if len(part)])
    return torch.empty_like(sorted_TD).index_copy_(0, order_T, sorted_TD)
