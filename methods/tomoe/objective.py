"""The regularisers of the objective (ToMoE, equations 6 to 10), and the widths they count.

    loss = w KD + alpha R_P + beta R_U + gamma R_L
    f(x, y) = log((max(x, y) + c) / (min(x, y) + c))
    R_P = f(T(w) / T_total, p)             active weights against the target
    R_U = mean over sites of f(u, 1)       u: share of neurons that some expert (some token, in attention) uses
    R_L = mean over layers of N sum_i F_i P_i        F: share of tokens, P: mean router probability of expert i

p is the fraction that is *kept*. T counts the matrices that masks act on, and nothing else; `keep_fraction` of
`accounting` turns a budget into p. The union is over N experts, not over T tokens: T / N times cheaper and the same
set.

c = 0.001, as in the released code; the paper has 0.
"""

# Shape suffixes: B batch, T tokens, N experts, M MLP width, h head dimension.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.modeling.shape import DecoderShape
from methods.tomoe.accounting import Kept, layer_weights, prunable
from methods.tomoe.network import LayerMasks
from methods.training.straight_through import probability_on, straight_through

if TYPE_CHECKING:
    from methods.tomoe.method import ToMoE

C = 0.001


def log_ratio(x: Tensor, y: Tensor | float) -> Tensor:
    """f(x, y) of the module's docstring; 0 where they are equal, symmetric."""
    y = torch.as_tensor(y, dtype=x.dtype, device=x.device)
    return ((torch.maximum(x, y) + C) / (torch.minimum(x, y) + C)).log()


def widths(masks: LayerMasks, shape: DecoderShape, settings: ToMoE) -> Kept:
    """The widths of one layer's masks; tensors that carry gradient.

    The MLP counts its widest expert, query and key their mask, and value and output their widest token, or the mean
    over tokens where conversion will give every token that many (`vo_count`).
    """
    mlp, full = masks.experts_NM.sum(1).max(), shape.head_dim
    if masks.heads_H is not None:
        kept = masks.heads_H.mean() * full
        return Kept(kept, kept, kept, mlp)
    assert masks.values_BTh is not None
    per_token = masks.values_BTh.sum(-1)
    vo = per_token.mean() if settings.vo_count == "mean" else per_token.max()
    value = full if settings.masks_only("output") else vo
    output = full if settings.masks_only("value") else vo
    return Kept(full if masks.qk_h is None else masks.qk_h.sum(), value, output, mlp)


def active_fraction(layers: Sequence[Kept], shape: DecoderShape) -> Tensor:
    """T(w) / T_total, with gradient."""
    return torch.stack([layer_weights(kept, shape) for kept in layers]).sum() / prunable(shape)


def union_terms(masks: LayerMasks, converted_NM: Tensor, settings: ToMoE) -> list[Tensor]:
    """f(u, 1) of those sites of a layer that offer a choice: for a single expert the term would only fight R_P."""
    sites = []
    if settings.experts > 1:
        sites.append(union(converted_NM if settings.union == "converted" else masks.experts_NM))
    if settings.attention_union and settings.dynamic_values:
        assert masks.values_BTh is not None
        sites.append(union(masks.values_BTh).mean())  # over the tokens of each sequence
    return [log_ratio(u, 1.0) for u in sites]


def union(masks: Tensor) -> Tensor:
    """Mean over the last axis of 1 - prod over the one before it of (1 - mask): [..., N, M] to [...]."""
    return 1 - (1 - masks).prod(-2).mean(-1)


@dataclass(frozen=True)
class Balance:
    """Load of one layer's experts."""

    loads_N: Tensor
    """F: fraction of tokens per expert; no gradient."""
    paper: Tensor
    """N sum F P, P the mean probabilities; at least 1 under a uniform load."""
    released: Tensor
    """sum F P, P from the straight-through one-hot rows (its value is sum F^2); at least 1 / N."""


def balance(masks: LayerMasks) -> Balance:
    """Both published forms of R_L for one layer."""
    assert masks.routes_BTN is not None and masks.shares_BTN is not None
    routes, shares = masks.routes_BTN.flatten(0, -2), masks.shares_BTN.flatten(0, -2)
    loads = routes.detach().mean(0)
    return Balance(loads, len(loads) * (loads * shares.mean(0)).sum(), (loads * routes.mean(0)).sum())


def ranked(logits_NM: Tensor) -> Tensor:
    """Each expert's neurons from the highest logit to the lowest, ties by lower index; int64 [N, M]."""
    return logits_NM.argsort(dim=-1, descending=True, stable=True)


def equalised(logits_NM: Tensor, width: int) -> Tensor:
    """The noise-free sets of conversion: each expert's `width` highest logits. 0/1, [N, M]."""
    return torch.zeros_like(logits_NM).scatter_(-1, ranked(logits_NM)[:, :width], 1.0)


def expected_width(logits_NM: Tensor, noise: float = 1.0) -> int:
    """max over experts of the expected number of neurons that are on, at least 1."""
    return max(1, round(float(probability_on(logits_NM.detach(), noise).sum(-1).max())))


def converted_masks(logits_NM: Tensor, tau: float, noise: float = 1.0) -> Tensor:
    """The sets that conversion would make of the expected widths, before it solves its shift.

    They have the gradient of a sigmoid around each expert's cut.
    """
    width = expected_width(logits_NM, noise)
    logits, order = logits_NM.detach(), ranked(logits_NM.detach())
    hard = torch.zeros_like(logits).scatter_(-1, order[:, :width], 1.0)
    cut = logits.gather(-1, order[:, width - 1 : width])
    return straight_through(torch.sigmoid((logits_NM - cut) / tau), hard)


@dataclass(frozen=True)
class Terms:
    """The objective on one batch, and what the log wants to know of it."""

    loss: Tensor
    language: Tensor
    """KD, or the next-token loss of the ablation."""
    entropy: Tensor | None
    """Of the teacher, None without one; language + entropy is the released code's distillation loss."""
    r_p: Tensor
    r_u: Tensor
    r_l: Tensor
    fraction: Tensor
    """T(w) / T_total."""
    union: Tensor
    """Mean over layers, of the sampled masks."""
    union_converted: Tensor
    """Mean over layers, of the sets that conversion would make."""
    widths: list[Kept]
    balances: list[Balance]

    def row(self) -> dict[str, Any]:
        """The numbers, as scalar tensors, by column."""
        language = {"lm": self.language}
        if self.entropy is not None:
            language = {"kd": self.language, "kd_cross_entropy": self.language + self.entropy}
        columns: dict[str, Any] = {
            "loss": self.loss,
            **language,
            "r_p": self.r_p,
            "r_u": self.r_u,
            "r_l": torch.stack([b.paper for b in self.balances]).mean(),
            "r_l_released": torch.stack([b.released for b in self.balances]).mean(),
            "fraction": self.fraction,
            "union": self.union,
            "union_converted": self.union_converted,
        }
        for layer, (width, balance) in enumerate(zip(self.widths, self.balances, strict=True)):
            columns |= {f"{name}.{layer}": value for name, value in width._asdict().items()}
            columns |= {f"load.{layer}.{expert}": load for expert, load in enumerate(balance.loads_N)}
        return columns


def terms(
    settings: ToMoE,
    shape: DecoderShape,
    masks: Sequence[LayerMasks],
    logits: Sequence[Tensor],
    p: float,
    language: Tensor,
    entropy: Tensor | None,
    noise: float = 1.0,
) -> Terms:
    """The whole objective of one step.

    Args:
        masks: of every layer, after the student has run.
        logits: mask logits A of every layer's experts, [N, M].
        p: the step's target.
        noise: the step's scale of the noise.
    """
    layers = [widths(m, shape, settings) for m in masks]
    fraction = active_fraction(layers, shape)
    converted = [converted_masks(a, settings.tau, noise) for a in logits]
    unions = [union_terms(m, s, settings) for m, s in zip(masks, converted, strict=True)]
    balances = [balance(m) for m in masks]
    r_p = log_ratio(fraction, p)
    r_u = torch.stack([term for site in unions for term in site] or [torch.zeros_like(r_p)]).mean()
    r_l = torch.stack([getattr(b, settings.load_balance) for b in balances]).mean()
    weight = settings.kd_weight if settings.loss == "kd" else 1.0
    return Terms(
        loss=weight * language + settings.alpha * r_p + settings.beta * r_u + settings.gamma * r_l,
        language=language,
        entropy=entropy,
        r_p=r_p,
        r_u=r_u,
        r_l=r_l,
        fraction=fraction,
        union=torch.stack([union(m.experts_NM) for m in masks]).mean(),
        union_converted=torch.stack([union(s) for s in converted]).mean(),
        widths=layers,
        balances=balances,
    )
