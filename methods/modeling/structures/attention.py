"""One attention forward for every family, whose heads may have other widths than the stock module's.

It does what the stock modules of Llama, Qwen2, Qwen3, Phi and OPT do (bit for bit when nothing is narrower), with three
freedoms: query and key may be narrower than the head, value and output may be narrower than the head, and a subclass
may treat values in its own way (`topk_values`). Two things must not follow the narrower query:

    scores = q k^T / sqrt(h)      h is the head width of the dense model
    rotary                        uses the frequencies of the kept dimensions (`qk_index`), not the first ones
"""

# Shape suffixes: B batch, T tokens, S cached tokens, D hidden size, H query heads, J key (and value) heads,
# h head width of the dense model, w query and key width, r rotated part of it, v value and output width.

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half
from transformers.utils.generic import is_flash_attention_requested

from methods.modeling.decoder import DecoderLayer
from methods.modeling.families import Family


class ReshapedAttention(nn.Module):
    """Mixin over a stock attention class; see `reshape_attention`."""

    family: Family
    config: PreTrainedConfig
    layer_idx: int
    scaling: float
    num_key_value_groups: int
    """Query heads that share a key head; the attention functions of transformers read it."""
    qk_width: int
    rotary_width: int
    """The first dimensions of a query, which rotate: first halves of the pairs, then second halves."""
    vo_width: int
    qk_index: Tensor | None
    """The original number of every kept query dimension, int32: [w], the same for all heads, or [J, w], of each key
    head and the query heads that read it; None when all are kept."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Normed input [B, T, D] to (output [B, T, D], attention weights where the back-end gives them)."""
        query_BHTw, key_BJTw = self._query_and_key(hidden_states, position_embeddings)
        choice = self.choose(hidden_states)
        value_BJTv = self.read_values(hidden_states, choice)
        if past_key_values is not None:
            packed = self.pack(value_BJTv, choice)
            key_BJTw, packed = past_key_values.update(key_BJTw, packed, self.layer_idx)
            value_BJTv = self.unpack(packed)
        attended_BTHv, weights = self._attend(query_BHTw, key_BJTw, value_BJTv, attention_mask, **kwargs)
        return self.write_output(attended_BTHv, choice), weights

    def part(self, name: str) -> nn.Module:
        """A submodule by the name its family gives it relative to the layer."""
        return getattr(self, name.rpartition(".")[2])

    @property
    def value(self) -> nn.Linear:
        """The value projection, weight [J v, D]."""
        return cast(nn.Linear, self.part(self.family.value))

    @property
    def output(self) -> nn.Linear:
        """The output projection, weight [D, H v]."""
        return cast(nn.Linear, self.part(self.family.output))

    @property
    def kv_heads(self) -> int:
        """Key (and value) heads."""
        return self.value.out_features // self.vo_width

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.output.in_features // self.vo_width

    def choose(self, x_BTD: Tensor) -> Any:
        """What `topk_values` decides per token; nothing here."""
        return None

    def read_values(self, x_BTD: Tensor, choice: Any) -> Tensor:
        """Values of the new tokens, [B, J, T, v]."""
        return _split(self.value(x_BTD), self.vo_width).transpose(1, 2)

    def pack(self, value_BJTv: Tensor, choice: Any) -> Tensor:
        """The form in which values are cached: a tensor whose first and third sizes are B and T."""
        return value_BJTv

    def unpack(self, packed: Tensor) -> Tensor:
        """Values [B, J, S, v] from their cached form."""
        return packed

    def write_output(self, attended_BTHv: Tensor, choice: Any) -> Tensor:
        """The output projection, to [B, T, D]."""
        return self.output(attended_BTHv.flatten(2))

    def _query_and_key(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        query = self.part(self.family.query)(x_BTD)
        if self.family.scaled_query:
            query = query * self.scaling
        query_BTHw, key_BTJw = _split(query, self.qk_width), _split(self.part(self.family.key)(x_BTD), self.qk_width)
        if self.family.query_norm and self.family.key_norm:
            query_BTHw = self.part(self.family.query_norm)(query_BTHw)
            key_BTJw = self.part(self.family.key_norm)(key_BTJw)
        query_BHTw, key_BJTw = query_BTHw.transpose(1, 2), key_BTJw.transpose(1, 2)
        return (query_BHTw, key_BJTw) if angles is None else self._rotate(query_BHTw, key_BJTw, *angles)

    def _rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the first r dimensions; cos and sin are [B, T, every rotated dimension of the dense head]."""
        cos, sin = self._kept(cos), self._kept(sin)
        query = self._turn(query, self._for_readers(cos), self._for_readers(sin))
        return query, self._turn(key, cos, sin)

    def _kept(self, table_BTd: Tensor) -> Tensor:
        """The part of cos or sin that key heads use, [B, 1 where they all use the same and J otherwise, T, r]."""
        if self.qk_index is None:
            return table_BTd[:, None]
        if self.qk_index.ndim == 1:
            return table_BTd.index_select(-1, self.qk_index[: self.rotary_width])[:, None]
        return table_BTd[..., self.qk_index[:, : self.rotary_width]].transpose(1, 2)

    def _for_readers(self, table: Tensor) -> Tensor:
        """The same for query heads."""
        return table if table.shape[1] == 1 else table.repeat_interleave(self.num_key_value_groups, 1)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        r = self.rotary_width
        turned = x[..., :r] * cos + rotate_half(x[..., :r]) * sin
        return turned if r == self.qk_width else torch.cat((turned, x[..., r:]), -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        short = value.shape[-1] - query.shape[-1]
        if short > 0 and is_flash_attention_requested(self.config):  # its kernels have one width; zeros add nothing
            query, key = pad(query, (0, short)), pad(key, (0, short))
        name = self.config._attn_implementation or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        return attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=1.0 if self.family.scaled_query else self.scaling,
            sliding_window=getattr(self, "sliding_window", None),  # an attribute of the Qwen modules
            **kwargs,
        )


def _split(x: Tensor, width: int) -> Tensor:
    """The last axis as heads of a width: [B, T, H width] to [B, T, H, width]."""
    return x.view(*x.shape[:-1], -1, width)


Kind = TypeVar("Kind", bound=ReshapedAttention)


@cache
def _reshaped_class(stock: type[nn.Module], kind: type[ReshapedAttention]) -> type[nn.Module]:
    """The stock attention class with another forward; a subclass of the same name, so that transformers' recording of
    attention weights and everything that goes by name treat it as the stock module."""
    return type(stock.__name__, (kind, stock), {})


def become(module: ReshapedAttention, kind: type[Kind]) -> Kind:
    """Give a reshaped attention module the forward of another kind, in place."""
    stock = type(module).__bases__[-1]
    module.__class__ = cast(type[Kind], _reshaped_class(stock, kind))
    return cast(Kind, module)


def reshape_attention(layer: DecoderLayer) -> ReshapedAttention:
    """Give a layer's attention the forward above, in place: the same function. No effect the second time."""
    module = layer.attention
    if isinstance(module, ReshapedAttention):
        return module
    module.__class__ = _reshaped_class(type(module), ReshapedAttention)
    assert isinstance(module, ReshapedAttention)
    shape = layer.family.shape(module.config.to_dict())
    module.family = layer.family
    module.num_key_value_groups = shape.heads // shape.kv_heads
    module.qk_width = module.vo_width = shape.head_dim
    module.rotary_width = shape.rotary
    module.register_buffer("qk_index", None)
    return module
