"""Low-rank adapters on the projections of a decoder's blocks, made by the package peft (extra `finetune`).

An adapted projection is a module around the `nn.Linear` that was there, so whatever calls a projection trains it. What
reads a weight instead, to be fast with one token or with one expert, does so only where the projection is a plain
`nn.Linear` (`moe_mlp`, `topk_products`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from methods.modeling.decoder import Decoder
from methods.modeling.structures.moe_mlp import MoEMLP
from methods.modeling.structures.sparse_linears import SparseLinear
from methods.modeling.structures.topk_choice import ValueSelector
from methods.recovery.settings import would_fill_zeros

if TYPE_CHECKING:
    from methods.recovery.settings import Recovery

NAME = "default"
"""What peft calls a model's only adapter."""
FOLDER = "adapter"
"""Where a checkpoint keeps adapters that were not merged."""


def projections(model: PreTrainedModel) -> list[str]:
    """The names of all linear layers inside blocks, but for those that choose: routers and value selectors."""
    names = {module: name for name, module in model.named_modules()}
    parts = [part for layer in Decoder(model).layers for part in layer.module.modules()]
    choosers = [part.router for part in parts if isinstance(part, MoEMLP)]
    choosers += [part for part in parts if isinstance(part, ValueSelector)]
    choosing = {inner for chooser in choosers for inner in chooser.modules()}
    return [names[part] for part in parts if isinstance(part, nn.Linear) and part not in choosing]


def attach(model: PreTrainedModel, settings: Recovery) -> dict[str, nn.Parameter]:
    """Put adapters around all projections, in place; afterwards only they require a gradient.

    A is drawn from torch's default generator. Adapters are at least fp32.

    Returns:
        Their parameters by name.

    Raises:
        UserError: a projection keeps single weights, so that what is added to it would not be sparse.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if any(isinstance(part, SparseLinear) for part in model.modules()):
        raise would_fill_zeros()
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  (any number serves)
        lora_dropout=settings.dropout,
        target_modules=projections(model),
    )
    inject_adapter_in_model(config, model, NAME)
    for _, layer in adapted(model):
        layer.train()  # their dropout; the model's own stays off
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return trained


def adapted(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The adapted projections, modules of peft, by name."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Add the adapters to the weights, in place, and leave nothing of them."""
    for _, layer in adapted(model):
        layer.get_base_layer().weight.add_(layer.get_delta_weight(NAME))
    detach(model)


def detach(model: PreTrainedModel) -> None:
    """Take the adapters off, in place."""
    for name, layer in adapted(model):
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def save(model: PreTrainedModel, checkpoint: Path) -> None:
    """Take adapters off that were not merged, and write them as peft does to the checkpoint's folder of them.

    `model.load_adapter(folder)` puts them around the same projections again.
    """
    if not hasattr(model, "peft_config"):
        return
    from peft import get_peft_model_state_dict

    folder = checkpoint / FOLDER
    folder.mkdir(parents=True)
    save_file(get_peft_model_state_dict(model, adapter_name=NAME), folder / "adapter_model.safetensors")
    model.peft_config[NAME].save_pretrained(folder)
    detach(model)
