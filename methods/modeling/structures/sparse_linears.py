"""Structure: projections that keep some of their weights (magnitude, Wanda, SparseGPT, Pruner-Zero).

y = x (W * M)^T + b with M of zeros and ones. A checkpoint holds the kept weights, row by row, and one bit for every
weight of W; for the pattern 2:4 these are as many bits as two positions of two bits per group of four would take.

A loaded model multiplies with a matrix that it makes of both on first use and keeps, which no checkpoint holds (what a
module's `.data` is replaced with is noticed, what is written into it is not: then call `forget`):

    2:4, fp16 or bf16, on a CUDA device with sparse tensor cores    compressed (torch's `to_sparse_semi_structured`)
    everything else, and whenever a gradient is asked for           dense, with zeros: no faster than the dense model,
                                                                    and with the kept weights beside it larger in memory
"""

# Shape suffixes: I inputs, O outputs, K kept weights, B bytes of a row of the mask; `...` any leading axes.

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as multiply
from torch.nn.functional import pad
from transformers import PreTrainedModel

from methods.errors import UserError
from methods.modeling.decoder import Decoder, DecoderLayer

NAME = "sparse_linears"
SEMI_STRUCTURED = "2:4"
"""The pattern that GPUs have kernels for."""
TILE = (32, 64)
"""Outputs and inputs that these kernels take at a time."""
COMPRESSED = 9 / 16
"""Bytes of the form they read over those of the dense matrix: half of the weights, two bits of place for each."""


class SparseLinear(nn.Module):
    """What is left of a projection, from [..., I] to [..., O] as before."""

    values: nn.Parameter
    """The kept weights, row by row, [K]."""
    mask: Tensor
    """Which ones they are, a bit per weight as `pack` writes them, uint8 [O, B]."""
    bias: nn.Parameter | None
    _made: tuple[Tensor, Tensor, Any, Tensor] | None = None
    """The values and the mask that the matrix was made of, in what state they were, and the matrix."""

    def __init__(self, linear: nn.Linear, kept: int, pattern: str) -> None:
        """In place of a projection of which a number of weights is kept; which ones, and their values, undefined."""
        super().__init__()
        self.in_features, self.out_features, self.pattern = linear.in_features, linear.out_features, pattern
        weight = linear.weight
        self.values = nn.Parameter(weight.new_empty(kept), requires_grad=weight.requires_grad)
        width = -(-self.in_features // 8)
        self.register_buffer("mask", torch.zeros(self.out_features, width, dtype=torch.uint8, device=weight.device))
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        if torch.is_grad_enabled() or not self.has_kernel(self.values.device):
            return multiply(x, self.weight, self.bias)
        return multiply(x.contiguous(), self._matrix(sparse=True), self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense matrix, [O, I], zero where nothing is kept; gradients arrive at the kept weights."""
        if torch.is_grad_enabled() and self.values.requires_grad:
            return self._dense()
        return self._matrix(sparse=False)

    @property
    def density(self) -> float:
        """The share of the weights that is kept."""
        return len(self.values) / (self.in_features * self.out_features)

    def has_kernel(self, device: torch.device) -> bool:
        """Whether a device multiplies with this projection faster than with the dense one."""
        whole_tiles = self.out_features % TILE[0] == 0 and self.in_features % TILE[1] == 0
        return self.pattern == SEMI_STRUCTURED and whole_tiles and has_sparse_cores(device, self.values.dtype)

    def made_bytes(self, device: torch.device) -> int:
        """Memory of the matrix that is multiplied with on a device without gradients, beside values and mask."""
        dense = self.in_features * self.out_features * self.values.element_size()
        return int(COMPRESSED * dense) if self.has_kernel(device) else dense

    def forget(self) -> None:
        """Drop that matrix; it is made anew when it is needed."""
        self._made = None

    def _dense(self) -> Tensor:
        kept_OI = unpack(self.mask, self.in_features)
        return self.values.new_zeros(kept_OI.shape).masked_scatter(kept_OI, self.values)

    def _matrix(self, sparse: bool) -> Tensor:
        """The dense matrix or its compressed form, made anew where what is behind it was replaced, moved or changed."""
        values, mask = self.values, self.mask
        state = (sparse, *_state(values), *_state(mask))
        made = self._made
        if made is None or made[0] is not values or made[1] is not mask or made[2] != state:
            with torch.inference_mode(False), torch.no_grad():
                matrix = compressed(self._dense()) if sparse else self._dense()
            made = self._made = values, mask, state, matrix
        return made[3]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        self.forget()  # moved or cast: parameters stay the same objects then
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, pattern={self.pattern}, density={self.density:.3f}"


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """What differs after a tensor was written to, or its `.data` replaced."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device


def pack(mask_OI: Tensor) -> Tensor:
    """Truth values as bits, the first of eight as the lowest: bool [O, I] to uint8 [O, B]."""
    bits_OB8 = pad(mask_OI, (0, -mask_OI.shape[1] % 8)).unflatten(1, (-1, 8)).byte()
    return (bits_OB8 << torch.arange(8, dtype=torch.uint8, device=mask_OI.device)).sum(2, dtype=torch.uint8)


def unpack(bits_OB: Tensor, width: int) -> Tensor:
    """The first `width` truth values of every row: uint8 [O, B] to bool [O, I]."""
    shifted_OB8 = bits_OB[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits_OB.device)
    return (shifted_OB8 & 1).bool().flatten(1)[:, :width]


@cache
def has_sparse_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can multiply with 2:4 matrices on a device. It is tried, as that depends on chip and build."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        _multiply_some(device, dtype)
    except torch.OutOfMemoryError:
        raise  # says nothing of the device, and what is raised is not remembered
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def _multiply_some(device: torch.device, dtype: torch.dtype) -> None:
    half_zero = torch.tensor([1, 0], dtype=dtype, device=device).repeat(TILE[1], TILE[1] // 2)
    for bias in (None, half_zero[0]):
        multiply(half_zero, compressed(half_zero), bias)


def compressed(weight_OI: Tensor) -> Tensor:
    """The form of a 2:4 matrix that the kernels multiply with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces that these tensors are a prototype
        return torch.sparse.to_sparse_semi_structured(weight_OI.contiguous())


@torch.no_grad()
def sparsify(layer: DecoderLayer, name: str, mask: Tensor, pattern: str) -> SparseLinear:
    """Keep some weights of one projection of a block, in place.

    Args:
        name: of the projection relative to the block, for example `layer.family.query`.
        mask: true where a weight stays, bool [O, I], at least one.
        pattern: what the mask keeps to; `2:4` may be multiplied by kernels that read no more than two of four weights.

    Raises:
        UserError: nothing would be left, the mask does not keep to 2:4, or the projection is not a dense one.
    """
    linear = layer.module.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise UserError(f"{name} is sparse or replaced already, so it cannot be pruned. Give the dense model.")
    if not mask.any():
        raise UserError(f"no weight of {name} would be left. Keep at least one.")
    if pattern == SEMI_STRUCTURED and (mask.shape[1] % 4 or mask.unflatten(1, (-1, 4)).sum(2).max() > 2):
        raise UserError(f"the mask of {name} keeps more than two of four aligned weights, and is said to be 2:4.")
    sparse = SparseLinear(linear, int(mask.sum()), pattern)
    sparse.values.copy_(linear.weight[mask])
    sparse.mask.copy_(pack(mask))
    layer.module.set_submodule(name, sparse)
    return sparse


def sparse_record(model: PreTrainedModel) -> dict[str, Any]:
    """The record of a model whose projections `sparsify` has changed, all to one pattern."""
    layers = [sparse_parts(layer) for layer in Decoder(model).layers]
    (pattern,) = {part.pattern for parts in layers for part in parts.values()}
    counts = [{name: len(part.values) for name, part in parts.items()} for parts in layers]
    return {"layers": counts, "pattern": pattern}


def sparse_parts(layer: DecoderLayer) -> dict[str, SparseLinear]:
    """The sparse projections of a block by their names relative to it."""
    return {name: part for name, part in layer.module.named_modules() if isinstance(part, SparseLinear)}


def forget(layer: DecoderLayer) -> None:
    """Drop what the sparse projections of a block have made to multiply with."""
    for part in sparse_parts(layer).values():
        part.forget()


def runs_sparse(model: PreTrainedModel) -> tuple[int, int]:
    """How many sparse projections are multiplied by kernels that make use of the zeros on a model's device, of all."""
    kernels = [
        part.has_kernel(model.device) for layer in Decoder(model).layers for part in sparse_parts(layer).values()
    ]
    return sum(kernels), len(kernels)


def made_bytes(model: PreTrainedModel, device: torch.device) -> int:
    """Memory that sparse projections take when the model runs on a device, beside what is loaded."""
    return sum(part.made_bytes(device) for part in model.modules() if isinstance(part, SparseLinear))


def apply(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a model this structure's modules and shapes, in place; the values are to be loaded afterwards.

    Args:
        record: `{"layers": [{name: kept weights, ...}, ...], "pattern": "2:4", "4:8", ... or "unstructured"}`.
    """
    for layer, projections in zip(Decoder(model).layers, record["layers"], strict=True):
        for name, kept in projections.items():
            linear = layer.module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layer.module.set_submodule(name, SparseLinear(linear, kept, record["pattern"]))
