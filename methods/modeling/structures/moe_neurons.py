"""Some neurons of an MLP: their weights, and their share of its output."""

# Shape suffixes: T tokens, D hidden size, w neurons.

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear


def times(new: Tensor, factor: Tensor) -> Tensor:
    """Product with a tensor just made, which is overwritten unless autograd may want it.

    A tensor as large as a batch's activations comes from the system page by page, which can take as long as using it.
    """
    return new * factor if new.requires_grad else new.mul_(factor)


def project(x_TD: Tensor, weight_wD: Tensor, bias_w: Tensor | None) -> Tensor:
    """x W^T + b, [T, w], rows starting at multiples of 64 bytes.

    Experts and unions have any width, and a product that writes rows of odd length takes up to 1.3 times as long.
    """
    width, step = len(weight_wD), 64 // x_TD.element_size()
    if width % step == 0 or len(x_TD) == 1 or torch.is_grad_enabled():
        return linear(x_TD, weight_wD, bias_w)
    y_Tw = x_TD.new_empty(len(x_TD), -(-width // step) * step)[:, :width]
    if bias_w is None:
        return torch.mm(x_TD, weight_wD.T, out=y_Tw)
    return torch.addmm(bias_w, x_TD, weight_wD.T, out=y_Tw)


@dataclass(frozen=True)
class Neurons:
    """w neurons of a gated or plain MLP: `y = down(act(gate(x)) * up(x))` or `y = down(act(up(x)))`."""

    inputs: tuple[tuple[Tensor, Tensor | None], ...]
    """Gate (if there is one) and up: weight [w, D] and bias [w]."""
    down_wD: Tensor
    """Down's weight, one row per neuron."""
    bias_D: Tensor | None
    """Down's bias, where these neurons are the ones to add it."""
    activation: Callable[[Tensor], Tensor]

    def combine(self, products: Sequence[Tensor]) -> Tensor:
        """What goes into down, from what gate and up give."""
        return reduce(times, products[1:], self.activation(products[0]))

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What goes into down, [T, w]."""
        return self.combine([project(x_TD, weight, bias) for weight, bias in self.inputs])

    def output(self, hidden_Tw: Tensor, down_wD: Tensor | None = None) -> Tensor:
        """What down makes of it, [T, D]."""
        down_wD = self.down_wD if down_wD is None else down_wD
        return hidden_Tw @ down_wD if self.bias_D is None else torch.addmm(self.bias_D, hidden_Tw, down_wD)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Their share of the MLP's output, [T, D]."""
        return self.output(self.hidden(x_TD))

    def share(self, positions_w: Tensor, room_wD: Tensor, x_TD: Tensor) -> Tensor:
        """The share of some of them, whose weights take turns in `room_wD`. Not differentiable."""

        def rows(weight: Tensor) -> Tensor:
            return torch.index_select(weight, 0, positions_w, out=room_wD)

        biases = [None if bias is None else bias[positions_w] for _, bias in self.inputs]
        products = [project(x_TD, rows(weight), bias) for (weight, _), bias in zip(self.inputs, biases, strict=True)]
        return self.output(self.combine(products), rows(self.down_wD))

    def take(self, positions: Tensor) -> "Neurons":
        """Copies of some of them; [w] becomes the shape of `positions`."""
        inputs = tuple(
            (embedding(positions, weight), None if bias is None else bias[positions]) for weight, bias in self.inputs
        )
        return replace(self, inputs=inputs, down_wD=embedding(positions, self.down_wD))

    def part(self, start: int, stop: int) -> "Neurons":
        """Those at consecutive positions, in place."""
        rows = slice(start, stop)
        inputs = tuple((weight[rows], None if bias is None else bias[rows]) for weight, bias in self.inputs)
        return replace(self, inputs=inputs, down_wD=self.down_wD[rows])

    def some(self, positions: Tensor) -> "Neurons":
        """Those at some ascending positions: in place where these are consecutive, else copies."""
        run = run_of(positions)
        return self.take(positions) if run is None else self.part(*run)


def run_of(positions: Tensor) -> tuple[int, int] | None:
    """Start and stop of ascending positions that are consecutive (at least one); None of others."""
    if not len(positions) or int(positions[-1] - positions[0]) != len(positions) - 1:
        return None
    return int(positions[0]), int(positions[-1]) + 1
