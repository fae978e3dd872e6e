"""Some neurons of an MLP: their weights, and their share of its output."""

# Shape suffixes: T tokens, D hidden size, w neurons.

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import linear


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
        return reduce(torch.mul, products[1:], self.activation(products[0]))

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What goes into down, [T, w]."""
        return self.combine([linear(x_TD, weight, bias) for weight, bias in self.inputs])

    def output(self, hidden_Tw: Tensor) -> Tensor:
        """What down makes of it, [T, D]."""
        return hidden_Tw @ self.down_wD if self.bias_D is None else torch.addmm(self.bias_D, hidden_Tw, self.down_wD)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Their share of the MLP's output, [T, D]."""
        return self.output(self.hidden(x_TD))

    def take(self, positions: Tensor) -> "Neurons":
        """Copies of some of them; [w] becomes the shape of `positions`."""
        inputs = tuple((weight[positions], None if bias is None else bias[positions]) for weight, bias in self.inputs)
        return replace(self, inputs=inputs, down_wD=self.down_wD[positions])
