"""One token through some neurons of many, their weights read where they lie (`row_products`)."""

# Shape suffixes: D hidden size, U neurons there are, w neurons read.

from torch import Tensor

from methods.modeling.structures.moe_neurons import Neurons, times
from methods.modeling.structures.row_products import row_dots, row_pattern, row_sum


class Reader:
    """The neurons at some positions of a union."""

    def __init__(self, union: Neurons, positions_w: Tensor) -> None:
        self.union, self.positions_w = union, positions_w
        self.biases = [None if bias is None else bias[positions_w] for _, bias in union.inputs]
        self.pattern_U1 = row_pattern(positions_w, union.down_wD)

    def __call__(self, x_1D: Tensor, factors_w: Tensor | None = None) -> Tensor:
        """Their share of the MLP's output, [1, D]; of each one times a factor where factors are given.

        Not differentiable.
        """
        union = self.union
        hidden_w = union.combine([self._products(i, x_1D) for i in range(len(union.inputs))])
        hidden_w = hidden_w if factors_w is None else times(hidden_w, factors_w)
        y_1D = row_sum(self.positions_w, union.down_wD, hidden_w)
        return y_1D if union.bias_D is None else y_1D + union.bias_D

    def _products(self, i: int, x_1D: Tensor) -> Tensor:
        weight, bias = self.union.inputs[i][0], self.biases[i]
        products_w = row_dots(self.pattern_U1, weight, x_1D)
        return products_w if bias is None else products_w + bias
