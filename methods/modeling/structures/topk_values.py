"""Structure: every token chooses K of the v value dimensions of a head (ToMoE, https://arxiv.org/abs/2501.15316).

A small network reads what attention reads, and its K highest scores say which dimensions a token writes as a key/value
position and reads as a query position; the choice is the same for all heads of the layer:

    scores_t = score(gelu(norm(project(x_t))))       s_t = 1 on the K best, ties to the lower index
    v_t = (x_t Wv + bv) * s_t      (cached already masked)        out_t = ((A v)_t * s_t) Wo + bo

rule `exact` keeps K per token; `cap` keeps those with a score above `threshold`, at most K and at least the best one.

A token on its own (decoding) multiplies with K of the v rows of every head, where that pays (`topk_products`). Many
tokens with a choice each have no smaller matrix in common: they multiply with all rows, and the choice is a mask.
"""

# Shape suffixes: B batch, T new tokens, S cached tokens, D hidden size, v value width, K kept of it,
# H query heads, J key (and value) heads, R = heads times K.

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.errors import UserError
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.record import add_structure
from methods.modeling.structures import topk_cache
from methods.modeling.structures.attention import ReshapedAttention, become, reshape_attention
from methods.modeling.structures.row_products import lay_out
from methods.modeling.structures.topk_choice import Choice, ValueRule, ValueSelector, choose
from methods.modeling.structures.topk_products import reads_rows, some_inputs, some_outputs

NAME = "topk_values"


class TopKAttention(ReshapedAttention):
    """Attention whose tokens choose value dimensions; see `convert_values`."""

    selector: ValueSelector
    kept: int
    rule: ValueRule

    def choose(self, x_BTD: Tensor) -> Choice:
        """The choice of every new token."""
        return choose(self.selector(x_BTD), self.kept, self.rule)

    def read_values(self, x_BTD: Tensor, choice: Choice) -> Tensor:
        """Values of the new tokens, [B, J, T, v], zero where a token did not choose."""
        if not self.rule.on_value:
            return super().read_values(x_BTD, choice)
        if self._alone(x_BTD) and reads_rows(self.value):
            return self._read_chosen(x_BTD[0], choice)
        return super().read_values(x_BTD, choice) * choice.mask_BTv[:, None]

    def pack(self, value_BJTv: Tensor, choice: Choice) -> Tensor:
        """Values in the form in which they are cached."""
        return topk_cache.pack(value_BJTv, choice.index_BTK) if self.rule.cache == "compact" else value_BJTv

    def unpack(self, packed: Tensor) -> Tensor:
        """Values [B, J, S, v] from that form."""
        return topk_cache.unpack(packed, self.kept, self.vo_width)

    def write_output(self, attended_BTHv: Tensor, choice: Choice) -> Tensor:
        """The output projection of what each token chose, to [B, T, D]."""
        if not self.rule.on_output:
            return super().write_output(attended_BTHv, choice)
        if reads_rows(self.output):
            lay_out(self.output)  # for one token and for many, so that a prompt has the same logits before and after
            if self._alone(attended_BTHv):
                return self._write_chosen(attended_BTHv[0, 0], choice)
        return super().write_output(attended_BTHv * choice.mask_BTv[:, :, None], choice)

    def idle_parameters(self) -> int:
        """Elements of the value and output projections that one token does not use."""
        per_value = self.value.in_features + (self.value.bias is not None)
        unread = self.rule.on_value * self.kv_heads * per_value
        unwritten = self.rule.on_output * self.heads * self.output.out_features
        return (self.vo_width - self.kept) * (unread + unwritten)

    def _alone(self, x: Tensor) -> bool:
        """Whether there is one token, whose choice leaves something out, and no gradient to compute."""
        return x.shape[0] * x.shape[1] == 1 and self.kept < self.vo_width and not torch.is_grad_enabled()

    def _positions(self, choice: Choice, heads: int) -> Tensor:
        """Where the dimensions that a lone token chose lie among those of all heads, [R]."""
        starts = torch.arange(0, heads * self.vo_width, self.vo_width)
        return (starts[:, None] + choice.index_BTK[0]).flatten()

    def _read_chosen(self, x_1D: Tensor, choice: Choice) -> Tensor:
        positions_R = self._positions(choice, self.kv_heads)
        values_JK = some_outputs(self.value, x_1D, positions_R).view(self.kv_heads, -1) * choice.kept_BTK[0]
        zeros = x_1D.new_zeros(self.value.out_features)
        return zeros.scatter(0, positions_R, values_JK.flatten()).view(1, self.kv_heads, 1, self.vo_width)

    def _write_chosen(self, attended_Hv: Tensor, choice: Choice) -> Tensor:
        positions_R = self._positions(choice, self.heads)
        chosen_HK = attended_Hv.flatten()[positions_R].view(self.heads, -1) * choice.kept_BTK[0]
        return some_inputs(self.output, chosen_HK.flatten(), positions_R)[None]


def convert_values(layer: DecoderLayer, selector: ValueSelector, kept: int, rule: ValueRule) -> TopKAttention:
    """Let the tokens of a layer choose value dimensions, in place.

    Args:
        selector: it must score as many dimensions as the layer's values have, so that values are narrowed before; it
            gets the layer's dtype and device.
        kept: how many of them, K.

    Raises:
        UserError: the selector or K does not fit the layer.
    """
    attention = reshape_attention(layer)
    width = attention.vo_width
    if selector.score.out_features != width or not 0 < kept <= width:
        raise UserError(
            f"values of this layer are {width} wide: a selector of {selector.score.out_features} scores that keeps "
            f"{kept} does not fit. Score {width} dimensions and keep 1 to {width} of them."
        )
    attention = become(attention, TopKAttention)
    attention.selector = selector.to(attention.value.weight.device, attention.value.weight.dtype)
    attention.kept, attention.rule = kept, rule
    return attention


def set_value_cache(model: PreTrainedModel, cache: Literal["zeros", "compact"]) -> None:
    """Switch how values are cached, in place; see `ValueRule.cache`. Not while a cache is in use.

    Raises:
        UserError: no layer of this model chooses values, or what it caches cannot be compact.
    """
    if not (choosing := _choosing(model)):
        raise UserError("no layer of this model chooses values per token, so that its cache has one form only.")
    for attention in choosing:
        attention.rule = dataclasses.replace(attention.rule, cache=cache)
    add_structure(model.config, NAME, value_record(model) or {})


def _choosing(model: PreTrainedModel) -> list[TopKAttention]:
    attentions = [layer.attention for layer in Decoder(model).layers]
    return [attention for attention in attentions if isinstance(attention, TopKAttention)]


def value_record(model: PreTrainedModel) -> dict[str, Any] | None:
    """The shape record of a model's choosing layers as they are; None where no layer chooses."""
    if not (choosing := _choosing(model)):
        return None
    sizes = [_sizes(layer.attention) for layer in Decoder(model).layers]
    return {"layers": sizes, **dataclasses.asdict(choosing[0].rule)}


def _sizes(attention: nn.Module) -> dict[str, int] | None:
    if not isinstance(attention, TopKAttention):
        return None
    return {"kept": attention.kept, "width": attention.selector.project.out_features}


def apply(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a dense (or narrowed) model this structure's modules, in place; the values are to be loaded afterwards.

    Args:
        record: `{"layers": [{"kept": K, "width": e} | None, ...], ...}` and the fields of `ValueRule`.
    """
    rule = ValueRule(**{key: value for key, value in record.items() if key != "layers"})
    for layer, sizes in zip(Decoder(model).layers, record["layers"], strict=True):
        if sizes is not None:
            attention = reshape_attention(layer)
            selector = ValueSelector(attention.value.in_features, sizes["width"], attention.vo_width)
            convert_values(layer, selector, sizes["kept"], rule)
