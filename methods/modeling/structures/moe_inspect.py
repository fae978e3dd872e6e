"""Looking at the mixtures of a model: who goes where, and how alike the experts are."""

# Shape suffixes: B batch, T tokens, L blocks, k experts of a token, N experts, w neurons of the largest
# expert, U neurons in use.

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.modeling.structures.moe_mlp import MoEMLP, mixtures

Told = TypeVar("Told")


@torch.no_grad()
def routed(
    model: PreTrainedModel,
    input_ids: Tensor,
    tell: Callable[[MoEMLP, Tensor], Told],
    attention_mask: Tensor | None = None,
) -> list[Told | None]:
    """What there is to tell of each block's routing in one pass; None where the MLP is dense.

    Args:
        input_ids: int64 [B, T].
        tell: gets a mixture and its router's logits, [B T, N], while the pass is at that block.
        attention_mask: True where a token is real, [B, T]; padding gets experts as well.
    """
    found = mixtures(model)
    told: list[Told | None] = [None] * len(found)

    def keep(i: int, moe: MoEMLP) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple, logits: Tensor) -> None:
            told[i] = tell(moe, logits)

        return seen

    handles = [moe.router.register_forward_hook(keep(i, moe)) for i, moe in enumerate(found) if moe is not None]
    try:
        model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return told


def expert_choices(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> list[Tensor | None]:
    """Which experts each token meets in each block, best first, int64 [B, T, k]; None where the MLP is dense.

    Args:
        input_ids, attention_mask: as for `routed`.
    """

    def choice(moe: MoEMLP, logits: Tensor) -> Tensor:
        return moe.choose(logits).experts_Tk.view(*input_ids.shape, -1)

    return routed(model, input_ids, choice, attention_mask)


def expert_ids(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The first choice of each token in each block, int64 [L, B, T]; -1 where the MLP is dense.

    Args:
        input_ids, attention_mask: as for `routed`.
    """
    dense_BT = torch.full_like(input_ids, -1)
    choices = expert_choices(model, input_ids, attention_mask)
    return torch.stack([dense_BT if choice is None else choice[..., 0] for choice in choices])


def describe_experts(model: PreTrainedModel) -> list[dict[str, Any] | None]:
    """Of each block, sizes of its experts and how much they overlap; None where the MLP is dense.

    Returns:
        `experts` N, `width` w (of the largest), `union` U, `active` experts and `shared` neurons of a token, `used`
        neurons of a token in all, and `cosine` and `jaccard`, similarities of the experts' 0/1 masks, [N, N].
    """
    return [None if moe is None else _description(moe) for moe in mixtures(model)]


def _description(moe: MoEMLP) -> dict[str, Any]:
    layout = moe.layout
    mask_NU = torch.stack([torch.zeros(layout.neurons).index_fill(0, own.long().cpu(), 1.0) for own in moe.sets])
    both_NN = mask_NU @ mask_NU.T
    sizes_N = both_NN.diagonal()
    return {
        "experts": layout.experts,
        "width": layout.width,
        "union": layout.neurons,
        "active": layout.active,
        "shared": layout.shared,
        "used": layout.used,
        "cosine": (both_NN / (sizes_N[:, None] * sizes_N).sqrt()).tolist(),
        "jaccard": (both_NN / (sizes_N[:, None] + sizes_N - both_NN)).tolist(),
    }
