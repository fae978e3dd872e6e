"""Products of one token with some rows of a weight, read where they lie.

Gathering rows before multiplying writes and reads them once more than needed. Torch has two kernels that take an index:
`sampled_addmm` forms those dot products that a sparsity pattern asks for, and `embedding_bag` sums rows with weights.
Both exist for fp32 and fp64 on a CPU.
"""

# Shape suffixes: D hidden size, U rows of a weight, R rows read.

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

BAGS = 8
"""Parts of a sum of rows, for threads to share; fixed, so that rounding does not depend on their number."""


def can_read(weight: Tensor) -> bool:
    """Whether the kernels exist for this weight."""
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


def row_pattern(rows_R: Tensor, weight_UD: Tensor) -> Tensor:
    """Some (ascending) rows of a weight as a sparse column [U, 1], which `row_dots` asks for."""
    before = torch.searchsorted(rows_R, torch.arange(len(weight_UD) + 1))
    values = torch.zeros(len(rows_R), dtype=weight_UD.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces that its CSR tensors are young
        return torch.sparse_csr_tensor(before, torch.zeros_like(rows_R), values, (len(weight_UD), 1))


def row_dots(pattern_U1: Tensor, weight_UD: Tensor, x_1D: Tensor) -> Tensor:
    """The token's products with the rows of a pattern, [R]. Not differentiable."""
    return torch.sparse.sampled_addmm(pattern_U1, weight_UD, x_1D.T, beta=0.0).values()


def row_sum(rows_R: Tensor, weight_UD: Tensor, factors_R: Tensor) -> Tensor:
    """Sum of some rows times factors, [1, D]; the weight must be contiguous."""
    bags = torch.arange(0, len(rows_R), -(-len(rows_R) // BAGS))
    return embedding_bag(rows_R, weight_UD, bags, per_sample_weights=factors_R, mode="sum").sum(0, keepdim=True)


def lay_out(linear: nn.Linear) -> None:
    """Keep the columns of a weight contiguous in memory: the same tensor with other strides. No effect when it is.

    Also under `torch.inference_mode`, whose tensors could not be trained afterwards.
    """
    if not linear.weight.T.is_contiguous():
        with torch.inference_mode(False), torch.no_grad():
            linear.weight.data = linear.weight.data.T.contiguous().T
