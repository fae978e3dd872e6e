"""Pruning written naively: the whole model runs for every block, and rows and groups are loops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods import modeling
from methods.modeling.decoder import DecoderLayer

Choose = Callable[[Tensor, Tensor], Tensor]
"""From a weight [R, C] and what it reads [N, C] to what becomes of it."""


def names(layer: DecoderLayer) -> list[list[str]]:
    """Projections by what they read."""
    family = layer.family
    mlp = [family.up] if family.gate is None else [family.gate, family.up]
    return [[family.query, family.key, family.value], [family.output], mlp, [family.down]]


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The matrices that are pruned, by block and name."""
    layers = modeling.Decoder(model).layers
    every = [(i, layer, name) for i, layer in enumerate(layers) for part in names(layer) for name in part]
    return {f"{i}.{name}": layer.module.get_submodule(name).weight.detach() for i, layer, name in every}  # type: ignore[misc]


def share_of(model: PreTrainedModel, ratio: float) -> float:
    """The share of these that must stay for a share of the blocks' parameters."""
    block = sum(parameter.numel() for parameter in modeling.Decoder(model).module_list.parameters())
    return 1 - (1 - ratio) * block / sum(weight.numel() for weight in weights(model).values())


@torch.no_grad()
def read(model: PreTrainedModel, layer: DecoderLayer, wanted: list[str], calibration: Any) -> dict[str, Tensor]:
    """What some projections of a block read, real tokens only, [N, C] each."""
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    hooks = [
        layer.module.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found[name].append(args[0])
        )
        for name in wanted
    ]
    for batch in calibration.batches(1):
        model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    masks = [batch.mask for batch in calibration.batches(1)]
    for name, parts in found.items():
        rows = [x.reshape(-1, x.shape[-1]) for x in parts]
        found[name] = [x if mask is None else x[mask[0]] for x, mask in zip(rows, masks, strict=True)]
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def naive(model: PreTrainedModel, calibration: Any, choose: Choose, sequential: bool = False) -> PreTrainedModel:
    """The model with dense matrices of zeros, pruned block after block."""
    for layer in modeling.Decoder(model).layers:
        parts = names(layer)
        for stage in parts if sequential else [[name for part in parts for name in part]]:
            inputs = read(model, layer, stage, calibration)
            for name in stage:
                weight = layer.module.get_submodule(name).weight
                weight.copy_(choose(weight, inputs[name]))  # type: ignore[operator]
    return model


def best(scores: list[float], count: int) -> set[int]:
    """Places of the highest, the first among equals."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask of the n best of every m."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            for place in best(scores[row, start : start + m].tolist(), n):
                mask[row, start + place] = True
    return mask
