"""Products of one token with the rows of a projection that it chose, where that pays (`row_products`).

Half of the rows against the whole product, fp32, weights from memory, one thread, medians:

    d = 4096, 32 heads of 128     values 0.75, outputs 0.94
    d = 2048, 32 heads of 64      values 0.76, outputs 0.81
    d = 1024, 16 heads of 64      values 0.81, outputs 0.82
    d = 576, 9 heads of 64        values 0.85, outputs 0.76, and working out which rows takes as long as that saves

hence `SMALLEST`. Two tokens read a half each; in bf16 the one kernel is missing, and weights laid out for the other are
slow to multiply whole. There the products stay whole.
"""

# Shape suffixes: D hidden size, R rows read.

from torch import Tensor, nn

from methods.modeling.structures.row_products import can_read, row_dots, row_pattern, row_sum

SMALLEST = 1 << 20
"""Weights with fewer elements are multiplied whole."""


def reads_rows(linear: nn.Linear) -> bool:
    """Whether one token is to be multiplied with some rows of a weight rather than all, from its kind and size.

    An adapter around a projection is no `nn.Linear`: it has to be called.
    """
    return isinstance(linear, nn.Linear) and can_read(linear.weight) and linear.weight.numel() >= SMALLEST


def some_outputs(linear: nn.Linear, x_1D: Tensor, rows_R: Tensor) -> Tensor:
    """Outputs at some (ascending) rows of the weight, [R]; not differentiable."""
    products_R = row_dots(row_pattern(rows_R, linear.weight), linear.weight, x_1D)
    return products_R if linear.bias is None else products_R + linear.bias[rows_R]


def some_inputs(linear: nn.Linear, x_R: Tensor, columns_R: Tensor) -> Tensor:
    """The output for an input that is zero but at some columns, [1, D]; the weight must be laid out (`lay_out`)."""
    y_1D = row_sum(columns_R, linear.weight.T, x_R)
    return y_1D if linear.bias is None else y_1D + linear.bias
