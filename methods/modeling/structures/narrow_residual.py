"""Structure: a narrower residual stream, the same channels removed everywhere (LLM-Pruner, channel-wise).

With P the kept channels: columns P of the embedding tables, of all projections that read the stream and of the head;
rows P of those that write it; entries P of the norms over it, which from then on are means over |P| channels. Stock
modules throughout; heads and MLPs keep their widths, and `config.hidden_size` stays that of the dense model.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.errors import UserError
from methods.modeling.decoder import Decoder
from methods.modeling.record import structures_of
from methods.modeling.structures import rotated_residual
from methods.modeling.structures.linears import keep_columns, keep_rows

NAME = "narrow_residual"


class StreamParts(NamedTuple):
    """Everything that has an entry per channel of the residual stream, each tensor once."""

    readers: list[nn.Linear | nn.Embedding]
    """A column per channel: tables, projections that read the stream, and the head unless it is the token table."""
    writers: list[nn.Linear]
    """A row per channel, and an entry of the bias."""
    norms: list[nn.Module]
    """Norms over the stream: a weight, and of a LayerNorm also a bias, per channel."""


def stream_parts(decoder: Decoder) -> StreamParts:
    """The parts of a model, tables first."""
    layers = decoder.layers
    inputs = [linear for layer in layers for linear in layer.attention_inputs + layer.mlp_inputs]
    norms = [norm for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)]
    return StreamParts(
        readers=[*decoder.embeddings, *inputs, *([] if _tied(decoder) else [decoder.head])],
        writers=[linear for layer in layers for linear in (layer.attention_output, layer.mlp_output)],
        norms=[*dict.fromkeys(norms), decoder.final_norm],  # in a parallel block the two are one
    )


def _tied(decoder: Decoder) -> bool:
    return decoder.head.weight is decoder.embeddings[0].weight


def narrow_residual(model: PreTrainedModel, channels: Tensor) -> None:
    """Keep some channels of the residual stream, in place.

    Args:
        channels: their numbers among the present ones, int64, shape [d], in the order they are to have.

    Raises:
        UserError: the stream is rotated.
    """
    if rotated_residual.NAME in structures_of(model.config):
        raise UserError(
            "channels of a sliced model's residual stream cannot be removed: every block has a basis of its own. "
            "Give the dense model."
        )
    decoder = Decoder(model)
    parts, tied = stream_parts(decoder), _tied(decoder)
    for reader in parts.readers:
        _keep_entries(reader, channels) if isinstance(reader, nn.Embedding) else keep_columns(reader, channels)
    for writer in parts.writers:
        keep_rows(writer, channels)
    for norm in parts.norms:
        _keep_norm(norm, channels)
    if tied:
        decoder.head.weight = decoder.embeddings[0].weight  # type: ignore[assignment]
        decoder.head.in_features = len(channels)


@torch.no_grad()
def _keep_entries(table: nn.Embedding, channels: Tensor) -> None:
    table.weight = nn.Parameter(table.weight[:, channels].contiguous(), requires_grad=table.weight.requires_grad)
    table.embedding_dim = len(channels)


@torch.no_grad()
def _keep_norm(norm: nn.Module, channels: Tensor) -> None:
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, nn.Parameter(parameter[channels], requires_grad=parameter.requires_grad))
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (len(channels),)


def apply(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a dense model this structure's shapes, in place; the values are to be loaded afterwards.

    Args:
        record: `{"width": d}`.
    """
    narrow_residual(model, torch.arange(record["width"]))
