"""Structure: an MLP with fewer neurons, decided once for all tokens (LLM-Pruner, MoDeGPT, and the sanity floor).

With J the kept neurons: y = act(x Wg[:,J]) * (x Wu[:,J]) Wdown[J,:], or act(x W1[:,J] + b1[J]) W2[J,:] + b2. It equals
the dense MLP with the rows of Wdown of the other neurons set to zero, in the stock module.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.structures.linears import keep_columns, keep_rows

NAME = "narrow_mlp"


def narrow_mlp(layer: DecoderLayer, neurons: Tensor) -> None:
    """Keep some neurons of a layer's MLP, in place.

    Args:
        neurons: their numbers among the present ones, int64, shape [w], in the order they are to have.
    """
    for linear in layer.mlp_inputs:
        keep_rows(linear, neurons)
    keep_columns(layer.mlp_output, neurons)


def apply(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a dense model this structure's shapes, in place; the values are to be loaded afterwards.

    Args:
        record: `{"layers": [w or None, ...]}`, None where an MLP keeps its width.
    """
    for layer, width in zip(Decoder(model).layers, record["layers"], strict=True):
        if width is not None:
            narrow_mlp(layer, torch.arange(width))
