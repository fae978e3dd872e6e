"""Counting parameters from the tensors of a model, whatever method made it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class PartlyIdle(Protocol):
    """A module of which a token uses only a part: experts, dynamic value heads."""

    def idle_parameters(self) -> int:
        """Parameters of the module that one token's forward pass does not use."""
        ...


def active(*modules: nn.Module) -> int:
    """Elements that one token's forward pass uses."""
    inner = {part for module in modules for part in module.modules()}
    return count(*modules) - sum(part.idle_parameters() for part in inner if isinstance(part, PartlyIdle))


def footprint(model: PreTrainedModel) -> Footprint:
    """Count a model. Works on the meta device too.

    A checkpoint holds every parameter once, so that stored and distinct parameters are the same; copies that a loaded
    model makes to be faster are not counted. Tables of indices are not parameters, but they are bytes of the file.
    """
    total = count(model)
    return Footprint(
        active_total=active(model),
        active_block=active(Decoder(model).module_list),
        distinct_total=total,
        stored_total=total,
    )
