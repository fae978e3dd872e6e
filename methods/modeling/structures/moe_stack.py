"""Experts side by side in memory, each one contiguous, and their grouped product by transformers' experts interface.

Those that have fewer neurons than the largest are filled up with neurons that write nothing.
"""

# Shape suffixes: T tokens, D hidden size, N experts, w neurons of an expert, k experts of a token.

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from methods.modeling.structures.moe_gates import Choice
from methods.modeling.structures.moe_neurons import Neurons


class Stack:
    """Copies of the weights of N experts, under the names that the interface reads."""

    has_post_expert_norm = is_transposed = _is_expert_parallel = False

    def __init__(self, union: Neurons, index_Nw: Tensor) -> None:
        """Args:
        index_Nw: positions, int64; negative where an expert has no more.
        """
        absent_Nw, index_Nw = index_Nw < 0, index_Nw.clamp_min(0)
        self.union, self.num_experts, self.act_fn = union, len(index_Nw), union.activation
        self.has_gate = len(union.inputs) == 2
        self.has_bias = any(bias is not None for bias in (union.bias_D, *(bias for _, bias in union.inputs)))
        self.down_NwD = embedding(index_Nw, union.down_wD)
        if absent_Nw.any():
            self.down_NwD[absent_Nw] = 0
        self.down_proj = self.down_NwD.transpose(1, 2)
        self.down_proj_bias = _or_zeros(union.bias_D, union.down_wD.T).expand(len(index_Nw), -1)
        self.gate_up_proj = self.up_proj = torch.cat([embedding(index_Nw, weight) for weight, _ in union.inputs], 1)
        biases = [_or_zeros(bias, weight)[index_Nw] for weight, bias in union.inputs]
        self.gate_up_proj_bias = self.up_proj_bias = torch.cat(biases, 1)

    @property
    def can_group(self) -> bool:
        """Whether the grouped kernel, which wants rows of whole 16 bytes, takes these widths."""
        _, w, D = self.down_NwD.shape
        return w > 0 and all(width * self.down_NwD.element_size() % 16 == 0 for width in (w, D))

    def expert(self, i: int) -> Neurons:
        """One of them."""
        count = len(self.union.inputs)
        parts = zip(self.up_proj[i].chunk(count), self.up_proj_bias[i].chunk(count), self.union.inputs, strict=True)
        inputs = tuple((weight, None if absent is None else bias) for weight, bias, (_, absent) in parts)
        return replace(self.union, inputs=inputs, down_wD=self.down_NwD[i])

    def grouped(self, choice: Choice, x_TD: Tensor) -> Tensor:
        """Each token's experts, weighted and added up, [T, D]."""
        experts_Tk, weights_Tk = choice
        weights_Tk = torch.ones_like(experts_Tk, dtype=x_TD.dtype) if weights_Tk is None else weights_Tk
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, x_TD, experts_Tk, weights_Tk)

    def _apply_gate(self, both_Tkw: Tensor) -> Tensor:
        return self.union.combine(both_Tkw.chunk(2, -1))


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias
