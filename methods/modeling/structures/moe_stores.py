"""How a loaded mixture holds the weights of its experts, and the ways in which each store can compute them.

| store | memory beside the checkpoint's weights | ways |
| --- | --- | --- |
| `shared` | tables | single (reads rows through its tables), sorted (copies an expert's rows when it is due), masked |
| `materialised` | every expert's neurons | single, sorted, grouped, masked |
| `core+rest` | neurons that all experts have once, the others of every expert | single, sorted, grouped, masked |
| `pseudo` | a mask | masked |

    single    one token: its experts alone
    sorted    pairs of token and expert sorted by expert, one product per expert that has any
    grouped   the same as one grouped product (transformers' experts interface), where widths suit its kernel
    masked    every neuron for every token, those outside the token's experts set to zero

All give the same output up to rounding. The checkpoint's weights stay in place whatever the store: they are what is
saved and trained, and what `masked` multiplies with. Experts that are runs of neurons are read in place by `shared`.
What every token gets besides its experts (shared neurons, the output's bias, constants) is added once.
"""

# Shape suffixes: T tokens, P pairs of token and expert, D hidden size, N experts, k experts of a token, w neurons of an
# expert, U neurons there are, C neurons that all experts have, r = w - C others.

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from methods.modeling.structures.moe_gates import Choice
from methods.modeling.structures.moe_neurons import Neurons, run_of, times
from methods.modeling.structures.moe_reader import Reader
from methods.modeling.structures.moe_stack import Stack
from methods.modeling.structures.row_products import can_read

Way = Callable[[Choice, Tensor], Tensor]
"""From the chosen experts and the input [T, D] to the output [T, D]."""
Expert = Callable[[Tensor], Tensor]
"""From some tokens [T, D] to an expert's share of their output, [T, D]."""


@dataclass(frozen=True)
class Parts:
    """What a mixture is made of."""

    union: Neurons
    """All neurons there are, and the output's bias."""
    index_Nw: Tensor
    """Each expert's neurons as positions in the union, int64, ascending; then negative where it has fewer than w."""
    active: int = 1
    """k."""
    shared: Tensor | None = None
    """Positions of the neurons that every token gets, int64, ascending."""
    constants_ND: Tensor | None = None
    """What stands in for an expert that a token does not get."""
    sole: bool = True
    """Whether one expert, with weight 1, is all that a token gets: it adds the output's bias itself."""

    @property
    def always(self) -> int:
        """S: neurons that every token gets."""
        return 0 if self.shared is None else len(self.shared)

    @cached_property
    def sets(self) -> list[Tensor]:
        """Each expert's positions."""
        return [row[row >= 0] for row in self.index_Nw]

    @cached_property
    def routed(self) -> Neurons:
        """The union as experts have it."""
        return self.union if self.sole else replace(self.union, bias_D=None)

    @cached_property
    def total_D(self) -> Tensor | None:
        """The sum of the constants."""
        return None if self.constants_ND is None else self.constants_ND.sum(0)

    def mask_NU(self) -> Tensor:
        """0.0 and 1.0: multiplying by booleans takes seven times as long on a CPU."""
        mask_NU = self.union.down_wD.new_zeros(len(self.index_Nw), len(self.union.down_wD) + 1)
        return mask_NU.scatter_(1, self.index_Nw % mask_NU.shape[1], 1)[:, :-1].contiguous()

    def factors(self, choice: Choice, mask_NU: Tensor) -> Tensor:
        """What each neuron is multiplied with for each token, [T, U]."""
        experts_Tk, weights_Tk = choice
        if self.sole:
            return embedding(experts_Tk[:, 0], mask_NU)
        weights_Tk = torch.ones_like(experts_Tk, dtype=mask_NU.dtype) if weights_Tk is None else weights_Tk
        factors_TU = mask_NU.new_zeros(len(experts_Tk), len(mask_NU)).scatter(1, experts_Tk, weights_Tk) @ mask_NU
        return factors_TU if self.shared is None else factors_TU.index_fill_(1, self.shared, 1)

    def finish(self, choice: Choice, y_TD: Tensor) -> Tensor:
        """Add the constants of the experts that were not chosen."""
        if self.constants_ND is None or self.total_D is None:
            return y_TD
        return y_TD + (self.total_D - embedding(choice.experts_Tk, self.constants_ND).sum(1))


class Pseudo:
    """The union and a mask."""

    paths: ClassVar[tuple[str, ...]] = ("masked",)
    """The ways for any number of tokens."""
    total_D: Tensor | None
    """The constants' sum, which is made with the store: a pass reads no constants but those of its experts."""
    fetches: int = 1
    """How often `sorted` moves an expert's weights."""
    ways: dict[str, Way]
    """All ways, by name."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.union = parts, parts.union
        self.mask_NU, self.total_D = parts.mask_NU(), parts.total_D
        self.ways = {"masked": self.masked}

    def masked(self, choice: Choice, x_TD: Tensor) -> Tensor:
        """Every neuron for every token; the way that gives all weights their gradient."""
        factors_TU = self.parts.factors(choice, self.mask_NU)
        return self.parts.finish(choice, self.union.output(times(self.union.hidden(x_TD), factors_TU)))


class Apart(Pseudo):
    """Experts one by one."""

    experts: Sequence[Expert]

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.shared = None if parts.shared is None else self.union.some(parts.shared)
        self.ways["sorted"] = self._sorted

    def _sorted(self, choice: Choice, x_TD: Tensor) -> Tensor:
        return self._whole(choice, x_TD, by_expert(self._experts(), choice, x_TD))

    def _experts(self) -> Sequence[Expert]:
        """For one pass."""
        return self.experts

    def _whole(self, choice: Choice, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """Experts' shares, and what every token gets besides."""
        if self.parts.sole:
            return y_TD
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        elif self.union.bias_D is not None:
            y_TD = y_TD + self.union.bias_D
        return self.parts.finish(choice, y_TD)


class Shared(Apart):
    """The union and a table."""

    paths = ("masked", "sorted")

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        runs = [run_of(positions) for positions in parts.sets]
        self.experts = [parts.routed.part(*run) for run in runs if run is not None]
        if len(self.experts) == len(runs):
            self.ways["single"] = self._sorted
        else:
            self.experts, self.fetches = (), 2
        if can_read(self.union.down_wD):
            self.readers = [Reader(self.union, positions) for positions in parts.sets] if parts.sole else []
            self.ways["single"] = self._single

    def _experts(self) -> Sequence[Expert]:
        """Where they are no runs, their rows take turns in one place."""
        if self.experts:
            return self.experts
        share, sets = self.parts.routed.share, self.parts.sets
        room_wD = torch.empty_like(self.union.down_wD[: self.parts.index_Nw.shape[1]])
        return [partial(share, positions, room_wD[: len(positions)]) for positions in sets]

    def _single(self, choice: Choice, x_TD: Tensor) -> Tensor:
        if self.parts.sole:
            return self.readers[int(choice.experts_Tk)](x_TD)
        factors_U = self.parts.factors(choice, self.mask_NU)[0]
        rows = factors_U.nonzero()[:, 0]
        return self.parts.finish(choice, Reader(self.union, rows)(x_TD, factors_U[rows]))


class Materialised(Apart):
    """Every expert by itself."""

    paths = ("masked", "sorted", "grouped")

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        core_C = self._core()
        self.core = replace(self.union.take(core_C), bias_D=None) if len(core_C) else None
        rest_Nr = parts.index_Nw[~torch.isin(parts.index_Nw, core_C)].view(len(parts.index_Nw), -1)
        self.stack = Stack(parts.routed, rest_Nr)
        self.experts = [self.stack.expert(i) for i in range(len(rest_Nr))]
        grouped = self._grouped if self.stack.can_group else self._sorted
        self.ways |= {"single": self._single, "sorted": self._sorted, "grouped": grouped}

    def _core(self) -> Tensor:
        """Positions [C] that are held once."""
        return self.parts.index_Nw.new_empty(0)

    def _single(self, choice: Choice, x_TD: Tensor) -> Tensor:
        if not self.parts.sole:
            return self._sorted(choice, x_TD)
        return self._whole(choice, x_TD, self.experts[int(choice.experts_Tk)](x_TD))

    def _grouped(self, choice: Choice, x_TD: Tensor) -> Tensor:
        return self._whole(choice, x_TD, self.stack.grouped(choice, x_TD))

    def _whole(self, choice: Choice, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        if self.core is not None:
            core_TD = self.core(x_TD)  # once per expert that the token gets
            if not self.parts.sole:
                weights_Tk = choice.weights_Tk
                core_TD *= self.parts.active if weights_Tk is None else weights_Tk.sum(1, keepdim=True)
            y_TD = y_TD + core_TD
        return super()._whole(choice, x_TD, y_TD)


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


def by_expert(experts: Sequence[Expert], choice: Choice, x_TD: Tensor) -> Tensor:
    """Pairs of token and expert sorted by expert, one product per expert that has any, and back."""
    (T, k), weights_Tk = choice.experts_Tk.shape, choice.weights_Tk
    experts_P = choice.experts_Tk.flatten()
    order_P = experts_P.argsort(stable=True)
    loads = experts_P.bincount(minlength=len(experts)).tolist()
    parts = x_TD.index_select(0, order_P // k).split(loads)
    sorted_PD = torch.cat([experts[i](part) for i, part in enumerate(parts) if len(part)])
    if weights_Tk is not None:
        sorted_PD *= weights_Tk.flatten()[order_P, None]
    y_PD = torch.empty_like(sorted_PD).index_copy_(0, order_P, sorted_PD)
    return y_PD if k == 1 else y_PD.view(T, k, -1).sum(1)
