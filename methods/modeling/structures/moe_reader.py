"""One token through some neurons of many, their weights read where they lie.

Gathering rows before multiplying writes and reads them once more than needed. Torch has two kernels that take an index:
`sampled_addmm` forms those dot products of gate and up with the token that a sparsity pattern asks for, and
`embedding_bag` sums rows of down with weights. Both exist for fp32 and fp64 on a CPU.
"""

# Shape suffixes: D hidden size, U neurons there are, w neurons read.

import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from methods.modeling.structures.moe_neurons import Neurons

BAGS = 8
"""Parts of the output's sum, for threads to share; fixed, so that rounding does not depend on their number."""


def can_read(union: Neurons) -> bool:
    """Whether the kernels exist for these tensors."""
    return union.down_wD.device.type == "cpu" and union.down_wD.dtype in (torch.float32, torch.float64)


class Reader:
    """The neurons at some positions of a union."""

    def __init__(self, union: Neurons, positions_w: Tensor) -> None:
        self.union, self.positions_w = union, positions_w
        self.biases = [None if bias is None else bias[positions_w] for _, bias in union.inputs]
        self.bags = torch.arange(0, len(positions_w), -(-len(positions_w) // BAGS))
        self.pattern_U1 = _column(positions_w, len(union.down_wD), union.down_wD.dtype)

    def __call__(self, x_1D: Tensor) -> Tensor:
        """Their share of the MLP's output, [1, D]. Not differentiable."""
        union = self.union
        hidden_w = union.combine([self._products(i, x_1D) for i in range(len(union.inputs))])
        parts = embedding_bag(self.positions_w, union.down_wD, self.bags, per_sample_weights=hidden_w, mode="sum")
        y_1D = parts.sum(0, keepdim=True)
        return y_1D if union.bias_D is None else y_1D + union.bias_D

    def _products(self, i: int, x_1D: Tensor) -> Tensor:
        weight, bias = self.union.inputs[i][0], self.biases[i]
        products_w = torch.sparse.sampled_addmm(self.pattern_U1, weight, x_1D.T, beta=0.0).values()
        return products_w if bias is None else products_w + bias


def _column(positions_w: Tensor, union: int, dtype: torch.dtype) -> Tensor:
    """A sparse column [U, 1] with an entry at each of the (ascending) positions."""
    before = torch.searchsorted(positions_w, torch.arange(union + 1))
    values = torch.zeros(len(positions_w), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces that its CSR tensors are young
        return torch.sparse_csr_tensor(before, torch.zeros_like(positions_w), values, (union, 1))
