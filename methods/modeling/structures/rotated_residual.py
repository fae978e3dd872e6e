"""Structure: a rotated and sliced residual stream (SliceGPT, https://arxiv.org/abs/2401.15024).

The stream is `width` wide instead of `hidden`. Every norm is a bare root-mean-square over the *original* width, its
gain and shift folded into the projections that read it, and where two neighbouring sub-blocks use different bases the
skip connection multiplies with a shortcut matrix:

    sequential block   h = attention(norm(x)) + x S_attention        y = mlp(norm(h)) + h S_mlp
    parallel block     n = norm(x)                                   y = attention(n) + mlp(n) + x S_mlp

The last block writes the full width again and the head reads it. Dropout of the dense block is not part of the
structure.
"""

# Shape suffixes: B batch, T tokens, D original hidden size, d kept width.

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.families import Family

NAME = "rotated_residual"


class RootMeanSquareNorm(nn.Module):
    """`x / sqrt(sum(x^2) / D + eps)`, D being the original width however narrow x is. No parameters."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.hidden = hidden
        self.eps = eps

    def forward(self, x_BTd: Tensor) -> Tensor:
        """Shape [B, T, d] to [B, T, d]; at least fp32 inside, as in the stock norms."""
        x = x_BTd.to(torch.promote_types(x_BTd.dtype, torch.float32))
        return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.hidden + self.eps)).to(x_BTd.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"hidden={self.hidden}, eps={self.eps}"


class RotatedBlock(nn.Module):
    """Mixin over a stock decoder layer; see `convert_layer`."""

    family: Family
    shortcut_mlp: nn.Parameter

    @property
    def layer(self) -> DecoderLayer:
        """This block by roles."""
        return DecoderLayer(self, self.family)

    def attend(self, normed: Tensor, **kwargs: Any) -> Tensor:
        """The attention's output for normed input, shape [B, T, d] to [B, T, its output width]."""
        return self.layer.attention(hidden_states=normed, **kwargs)[0]


class SequentialRotatedBlock(RotatedBlock):
    """A block whose attention and MLP each have their own basis."""

    shortcut_attention: nn.Parameter

    def attention_half(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """x to h."""
        normed = self.layer.attention_norm(hidden_states)
        return self.attend(normed, **kwargs) + hidden_states @ self.shortcut_attention

    def mlp_half(self, hidden_states: Tensor) -> Tensor:
        """h to y."""
        normed = self.layer.mlp_norm(hidden_states)
        return self.layer.run_mlp(normed) + hidden_states @ self.shortcut_mlp

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Residual stream in, residual stream out."""
        return self.mlp_half(self.attention_half(hidden_states, **kwargs))


class ParallelRotatedBlock(RotatedBlock):
    """A block whose attention and MLP share their input and output bases."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Residual stream in, residual stream out."""
        normed = self.layer.attention_norm(hidden_states)
        return self.attend(normed, **kwargs) + self.layer.run_mlp(normed) + hidden_states @ self.shortcut_mlp


@cache
def _rotated_class(stock: type[nn.Module], rotated: type[RotatedBlock]) -> type[nn.Module]:
    """The stock layer class with the rotated forward. It is a subclass and bears the same name, so that transformers'
    recording of hidden states, checkpointing and device placement (which goes by name) treat it as the stock layer."""
    return type(stock.__name__, (rotated, stock), {})


def replace_norm(module: nn.Module, name: str, hidden: int) -> None:
    """Put a bare root-mean-square norm where `name` is, keeping its epsilon."""
    norm = module.get_submodule(name)
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    module.set_submodule(name, RootMeanSquareNorm(hidden, eps))  # type: ignore[arg-type]


def convert_layer(layer: DecoderLayer, hidden: int) -> RotatedBlock:
    """Turn a stock layer (norms already folded) into a rotated block at full width, in place: the same function."""
    family, module = layer.family, layer.module
    weight = layer.mlp_output.weight
    for name in {family.attention_norm, family.mlp_norm or family.attention_norm}:
        replace_norm(module, name, hidden)
    rotated = ParallelRotatedBlock if layer.parallel else SequentialRotatedBlock
    module.__class__ = _rotated_class(type(module), rotated)
    assert isinstance(module, RotatedBlock)
    module.family = family
    identity = torch.eye(hidden, dtype=weight.dtype, device=weight.device)
    module.shortcut_mlp = nn.Parameter(identity)
    if isinstance(module, SequentialRotatedBlock):
        module.shortcut_attention = nn.Parameter(identity.clone())
    return module


def apply(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a dense model this structure's modules and shapes, in place; the values are to be loaded afterwards.

    Args:
        record: `{"width": d}`.
    """
    decoder, width, hidden = Decoder(model), record["width"], model.config.hidden_size
    reads_shift = decoder.family.shape(model.config.to_dict()).layer_norm
    for table in decoder.embeddings:
        _resize(table, table.num_embeddings, width)
    last = len(decoder.layers) - 1
    for index, layer in enumerate(decoder.layers):
        block = convert_layer(layer, hidden)
        out = hidden if index == last else width
        for linear in layer.attention_inputs + layer.mlp_inputs:
            _resize(linear, linear.out_features, width, bias=reads_shift)
        _resize(layer.attention_output, out if layer.parallel else width, layer.attention_output.in_features)
        _resize(layer.mlp_output, out, layer.mlp_output.in_features)
        block.shortcut_mlp = nn.Parameter(block.shortcut_mlp.new_empty(width, out))
        if isinstance(block, SequentialRotatedBlock):
            block.shortcut_attention = nn.Parameter(block.shortcut_mlp.new_empty(width, width))
    replace_norm(model, decoder.family.final_norm, hidden)
    _resize(decoder.head, decoder.head.out_features, hidden, bias=reads_shift)


def _resize(module: nn.Linear | nn.Embedding, rows: int, columns: int, *, bias: bool = False) -> None:
    """Give a matrix another shape [rows, columns], in place, values undefined; add a bias where one is asked for."""
    module.weight = nn.Parameter(module.weight.new_empty(rows, columns))
    if isinstance(module, nn.Embedding):
        module.embedding_dim = columns
        return
    module.out_features, module.in_features = rows, columns
    if bias or module.bias is not None:
        module.bias = nn.Parameter(module.weight.new_empty(rows))
