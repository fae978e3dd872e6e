"""What fine-tuning trains of a mixture beside its adapters: gates that weigh what they choose, as their papers do.

    softmax   the router                                                                    (LLaMA-MoE and v2)
    scaled    u, and b moves against the loads after each step; the router stays            (CMoE)

Routers whose experts all have weight 1 stay (ToMoE's are trained already, MoEfication's too). The papers' noise on
routers and losses that balance loads are absent.
"""

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.modeling.structures.moe_gates import ScaledGate, SoftmaxGate
from methods.modeling.structures.moe_mlp import mixtures

RATE = 1e-3
"""The highest learning rate: that of u in CMoE's paper and code."""


def trained_gates(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that are to be trained, by name; from now on they require a gradient, and loads are counted."""
    found = [moe for moe in mixtures(model) if moe is not None]
    parts: list[nn.Module] = [moe.router for moe in found if isinstance(moe.gate, SoftmaxGate)]
    parts += [gate.train() for gate in _scaled(model)]
    wanted = {parameter.requires_grad_() for part in parts for parameter in part.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if parameter in wanted}


def balances(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `balance` reads and writes, by a name."""
    tensors = {id(tensor) for gate in _scaled(model) for tensor in (gate.bias, gate.loads)}
    return {name: buffer for name, buffer in model.named_buffers() if id(buffer) in tensors}


@torch.no_grad()
def balance(model: PreTrainedModel) -> None:
    """Move b against the loads that the last pass had in all processes."""
    for gate in _scaled(model):
        gate.loads.copy_(reduce(gate.loads))  # pyright: ignore[reportArgumentType]  (a tensor of a tensor)
        gate.balance()


def _scaled(model: PreTrainedModel) -> list[ScaledGate]:
    return [moe.gate for moe in mixtures(model) if moe is not None and isinstance(moe.gate, ScaledGate)]
