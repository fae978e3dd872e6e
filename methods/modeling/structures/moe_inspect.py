"""Looking at the mixtures of a model: who goes where, and how alike the experts are."""

# Shape suffixes: B batch, T tokens, L blocks, N experts, w neurons of an expert, U neurons of all experts.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.modeling.structures.moe_mlp import MoEMLP, mixtures


@torch.no_grad()
def expert_ids(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Which expert each token meets in each block, int64 [L, B, T]; -1 where the MLP is dense.

    Args:
        input_ids: int64 [B, T].
        attention_mask: True where a token is real, [B, T]; padding gets an expert as well.
    """
    found = mixtures(model)
    ids_LBT = input_ids.new_full((len(found), *input_ids.shape), -1)

    def keep(ids_BT: Tensor) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple, logits: Tensor) -> None:
            ids_BT.copy_(logits.argmax(-1).view_as(ids_BT))

        return seen

    handles = [moe.router.register_forward_hook(keep(ids_LBT[i])) for i, moe in enumerate(found) if moe is not None]
    try:
        model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return ids_LBT


def describe_experts(model: PreTrainedModel) -> list[dict[str, Any] | None]:
    """Of each block, sizes of its experts and how much they overlap; None where the MLP is dense.

    Returns:
        `experts` N, `width` w, `union` U, and `cosine` and `jaccard`, similarities of the experts' 0/1 masks, [N, N].
    """
    return [None if moe is None else _description(moe) for moe in mixtures(model)]


def _description(moe: MoEMLP) -> dict[str, Any]:
    experts, width = moe.index.shape
    mask_NU = torch.zeros(experts, len(moe.neurons)).scatter_(1, moe.index.long().cpu(), 1.0)
    shared_NN = mask_NU @ mask_NU.T
    return {
        "experts": experts,
        "width": width,
        "union": len(moe.neurons),
        "cosine": (shared_NN / width).tolist(),
        "jaccard": (shared_NN / (2 * width - shared_NN)).tolist(),
    }
