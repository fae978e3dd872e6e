"""Counting parameters from the tensors of a model, whatever method made it."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from methods.modeling.decoder import Decoder


@dataclass(frozen=True)
class Footprint:
    """Parameter counts of one model, in elements; a matrix used twice (tied) counts once."""

    active_total: int
    """What one token's forward pass multiplies with or indexes from, whole embedding tables included."""
    active_block: int
    """The part of it inside decoder blocks, norms and added matrices included."""
    distinct_total: int
    """Different parameters in memory."""
    stored_total: int
    """Elements a checkpoint holds."""


def count(*modules: nn.Module) -> int:
    """Elements of the distinct parameters of some modules."""
    distinct = {id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}
    return sum(distinct.values())


def footprint(model: PreTrainedModel) -> Footprint:
    """Count a model. Works on the meta device too.

    Every structure so far is static (a removed layer, a rotated residual stream), so that active, distinct and stored
    parameters are the same; structures that store more than they use will part them.
    """
    total = count(model)
    return Footprint(
        active_total=total,
        active_block=count(Decoder(model).module_list),
        distinct_total=total,
        stored_total=total,
    )
