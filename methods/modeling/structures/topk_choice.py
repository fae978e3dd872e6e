"""Which value dimensions a token uses: the scores, and the rule that makes a choice of them."""

# Shape suffixes: B batch, T tokens, D hidden size, v value width, K kept of it.

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn

from methods.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True)
class ValueRule:
    """How scores become a choice, and what the choice acts on; the same in all layers of a model."""

    rule: Literal["exact", "cap"] = "exact"
    """`exact`: the K best. `cap`: those above the threshold, at most K, at least one."""
    threshold: float = -3.0
    """For `cap`; minus the offset of ToMoE's gates."""
    mask: Literal["v_and_o", "v_only", "o_only"] = "v_and_o"
    """Act on the values a token writes, on the attention output it reads, or on both."""
    cache: Literal["zeros", "compact"] = "zeros"
    """Cache values at full width with zeros, or only the kept ones and a bit per dimension in the layers where that is
    smaller (see `topk_cache`); the other layers keep the zeros."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_args(hint) and getattr(self, name) not in get_args(hint):
                raise unknown(f"{name} of chosen values", getattr(self, name), get_args(hint))
        if self.cache == "compact" and not self.on_value:
            raise UserError(
                "a compact cache holds the values a token chose, and with mask 'o_only' it writes all of them. Use "
                "mask 'v_and_o' or 'v_only', or cache 'zeros'."
            )

    @property
    def on_value(self) -> bool:
        """Whether a token writes only the values it chose."""
        return self.mask != "o_only"

    @property
    def on_output(self) -> bool:
        """Whether a token reads only what it chose."""
        return self.mask != "v_only"


class ValueSelector(nn.Module):
    """Scores of a head's value dimensions from what attention reads; exact gelu."""

    def __init__(self, hidden: int, width: int, dims: int) -> None:
        super().__init__()
        self.project = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, dims, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Shape [B, T, D] to [B, T, v]."""
        return self.score(nn.functional.gelu(self.norm(self.project(x_BTD))))


@dataclass(frozen=True)
class Choice:
    """What the tokens of one forward pass chose."""

    index_BTK: Tensor
    """The K best dimensions of every token, ascending."""
    kept_BTK: Tensor
    """1 where such a dimension is kept and 0 where `cap` drops it, in the dtype of the model."""
    width: int
    """v."""

    @cached_property
    def mask_BTv(self) -> Tensor:
        """1 on kept dimensions and 0 elsewhere."""
        zeros = self.kept_BTK.new_zeros(*self.kept_BTK.shape[:-1], self.width)
        return zeros.scatter(-1, self.index_BTK, self.kept_BTK)


def choose(scores_BTv: Tensor, kept: int, rule: ValueRule) -> Choice:
    """At most `kept` dimensions of highest score, ties to the lower index."""
    ranked = scores_BTv.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    index = ranked.sort(-1).values
    if rule.rule == "exact":
        return Choice(index, torch.ones_like(index, dtype=scores_BTv.dtype), scores_BTv.shape[-1])
    above = scores_BTv.gather(-1, index) > rule.threshold
    return Choice(index, (above | (index == ranked[..., :1])).to(scores_BTv.dtype), scores_BTv.shape[-1])
