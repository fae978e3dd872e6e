"""Cutting linear layers, in place: what every structure that makes projections smaller is made of."""

import torch
from torch import Tensor, nn

from methods.errors import UserError


@torch.no_grad()
def keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    """Keep some outputs: rows of the weight [out, in] and entries of the bias, in the order given, copied."""
    _require_plain(linear)
    linear.weight = nn.Parameter(linear.weight[rows], requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows], requires_grad=linear.bias.requires_grad)
    linear.out_features = len(rows)


@torch.no_grad()
def keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    """Keep some inputs: columns of the weight [out, in], in the order given, copied; the bias stays."""
    _require_plain(linear)
    kept = linear.weight[:, columns].contiguous()
    linear.weight = nn.Parameter(kept, requires_grad=linear.weight.requires_grad)
    linear.in_features = len(columns)


def _require_plain(linear: nn.Module) -> None:
    if not isinstance(linear, nn.Linear):
        raise UserError(
            f"a projection that has become a {type(linear).__name__} cannot be made narrower. Narrow it first, and "
            "gather or prune it afterwards."
        )
