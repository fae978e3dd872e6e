"""Products of one token with some rows of a weight, read where they lie.

Gathering rows before multiplying would write and read them once more than needed. Torch has two kernels that take an
index: `sampled_addmm` forms those dot products that a sparsity pattern asks for, and `embedding_bag` sums rows with
weights. Half of the rows against the whole product, fp32, weights from memory, one thread, medians:

    d = 4096, 32 heads of 128     values 0.75, outputs 0.94
    d = 2048, 32 heads of 64      values 0.76, outputs 0.81
    d = 1024, 16 heads of 64      values 0.81, outputs 0.82
    d = 576, 9 heads of 64        values 0.85, outputs 0.76, and working out which rows takes as long as that saves

hence `SMALLEST`. Two tokens read a half each; in bf16 the one kernel is missing, and weights laid out for the other are
slow to multiply whole. There the products stay whole.
"""

# Shape suffixes: D hidden size, R rows read.

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

SMALLEST = 1 << 20
"""Weights with fewer elements are multiplied whole."""
BAGS = 8
"""Parts of a sum of rows, for threads to share; fixed, so that rounding does not depend on their number."""


def reads_rows(linear: nn.Linear) -> bool:
    """Whether one token is to be multiplied with some rows of a weight rather than all, from its kind and size."""
    weight = linear.weight
    exists = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    return exists and weight.numel() >= SMALLEST


def some_outputs(linear: nn.Linear, x_1D: Tensor, rows_R: Tensor) -> Tensor:
    """Outputs at some (ascending) rows of the weight, [R]; not differentiable."""
    before = torch.searchsorted(rows_R, torch.arange(linear.out_features + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces that its CSR tensors are young
        values_R = linear.weight.new_zeros(len(rows_R))
        column = torch.sparse_csr_tensor(before, torch.zeros_like(rows_R), values_R, (linear.out_features, 1))
        products_R = torch.sparse.sampled_addmm(column, linear.weight, x_1D.T, beta=0.0).values()
    return products_R if linear.bias is None else products_R + linear.bias[rows_R]


def some_inputs(linear: nn.Linear, x_R: Tensor, columns_R: Tensor) -> Tensor:
    """The output for an input that is zero but at some columns, [1, D]; the weight must be laid out."""
    bags = torch.arange(0, len(columns_R), -(-len(columns_R) // BAGS))
    parts = embedding_bag(columns_R, linear.weight.T, bags, per_sample_weights=x_R, mode="sum")
    y_1D = parts.sum(0, keepdim=True)
    return y_1D if linear.bias is None else y_1D + linear.bias


def lay_out(linear: nn.Linear) -> None:
    """Keep the columns of a weight contiguous in memory: the same tensor with other strides. No effect when it is."""
    if not linear.weight.T.is_contiguous():
        linear.weight.data = linear.weight.T.contiguous().T
