"""A uniform view of a Hugging Face decoder, and the two ways methods look inside it while it runs.

Models are touched only through public submodules and hooks, never by copying their forward pass.
"""

# Shape suffixes: B batch, T tokens, D hidden size.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from methods.base import Batch
from methods.errors import UserError
from methods.modeling.families import Family, family_of
from methods.modeling.shape import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # not at run time: structures/__init__.py says why


@dataclass(frozen=True)
class DecoderLayer:
    """One block: its module, and its parts by role."""

    module: nn.Module
    family: Family

    def _linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.module.get_submodule(name))

    @property
    def attention(self) -> nn.Module:
        """The attention module; called with keywords it returns (output, weights)."""
        return self.module.get_submodule(self.family.attention)

    @property
    def attention_norm(self) -> nn.Module:
        """The norm that attention reads (and the MLP too, in a parallel block)."""
        return self.module.get_submodule(self.family.attention_norm)

    @property
    def mlp_norm(self) -> nn.Module:
        """The norm that the MLP reads."""
        return self.module.get_submodule(self.family.mlp_norm or self.family.attention_norm)

    @property
    def attention_inputs(self) -> list[nn.Linear]:
        """Query, key, value."""
        return [self._linear(name) for name in (self.family.query, self.family.key, self.family.value)]

    @property
    def attention_output(self) -> nn.Linear:
        """The projection from heads to the residual stream."""
        return self._linear(self.family.output)

    @property
    def mlp(self) -> nn.Module | None:
        """The module that computes the MLP; None where the block does it from projections of its own."""
        module = self.module.get_submodule(self.family.mlp or self.family.up)
        return module if hasattr(module, self.family.down.rpartition(".")[2]) else None

    def _mlp_part(self, name: str) -> nn.Module:
        """A part of the MLP by the last part of its name, wherever a structure has put the rest."""
        holder = self.module if self.mlp is None else self.mlp
        return holder.get_submodule(name.rpartition(".")[2])

    @property
    def mlp_inputs(self) -> list[nn.Linear]:
        """Gate (if there is one) and up."""
        return [cast(nn.Linear, self._mlp_part(name)) for name in (self.family.gate, self.family.up) if name]

    @property
    def mlp_activation(self) -> nn.Module:
        """The function between them and down."""
        return self._mlp_part(self.family.activation)

    @property
    def mlp_output(self) -> nn.Linear:
        """Down."""
        return cast(nn.Linear, self._mlp_part(self.family.down))

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read one norm and add to the stream together."""
        return self.family.mlp_norm is None

    def run_mlp(self, x_BTD: Tensor) -> Tensor:
        """The MLP of normed input, shape [B, T, D] to [B, T, D]."""
        if self.mlp is not None:
            return self.mlp(x_BTD)
        (up,) = self.mlp_inputs
        return self.mlp_output(self.mlp_activation(up(x_BTD)))


class Decoder:
    """A causal language model seen as embeddings, blocks, final norm and head."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UserError when the architecture is not supported."""
        self.model = model
        self.family = family_of(model.config.model_type)

    @property
    def shape(self) -> DecoderShape:
        """The shape its config describes; an error for a model whose modules have other shapes already."""
        return DecoderShape.from_config(self.model.config.to_dict())

    @property
    def module_list(self) -> nn.ModuleList:
        """The list that holds the blocks."""
        return cast(nn.ModuleList, self.model.get_submodule(self.family.layers))

    @property
    def layers(self) -> list[DecoderLayer]:
        """The blocks, first to last."""
        return [DecoderLayer(module, self.family) for module in self.module_list]

    @property
    def embeddings(self) -> list[nn.Embedding]:
        """Every table summed into the residual stream, tokens first."""
        return [cast(nn.Embedding, self.model.get_submodule(name)) for name in self.family.embeddings]

    @property
    def final_norm(self) -> nn.Module:
        """The norm that the head reads."""
        return self.model.get_submodule(self.family.final_norm)

    @property
    def head(self) -> nn.Linear:
        """The projection to the vocabulary; its weight may be the token table."""
        return cast(nn.Linear, self.model.get_submodule(self.family.head))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module where `name` is."""
        self.model.set_submodule(name, module)


@contextmanager
def watch_layers(decoder: Decoder, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While open, `see(i, x_BTD, y_BTD)` is called with each block's input and output.

    Transformers' own `hidden_states[-1]` is taken after the final norm; these are the true residual signals.
    """

    def hook(index: int) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            x_BTD = args[0] if args else kwargs["hidden_states"]
            see(index, x_BTD, output[0] if isinstance(output, tuple) else output)

        return seen

    handles = [
        layer.module.register_forward_hook(hook(index), with_kwargs=True) for index, layer in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _FirstLayerReached(Exception):
    """Ends a forward pass once the first block has been called."""


@torch.no_grad()
def layer_calls(decoder: Decoder, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """What the first block is called with, per batch: the residual signal [B, T, D], and the keywords (mask, positions)
    that every block receives.

    Raises:
        UserError: blocks differ in their kind of attention, so that one mask does not serve all.
    """
    kinds = set(getattr(decoder.model.config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise UserError(
            f"blocks with different kinds of attention ({', '.join(sorted(kinds))}) are not supported by methods that "
            "calibrate block by block. Use a model with one kind throughout, or a method that removes whole blocks."
        )
    call: list[tuple[Tensor, dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        call.append((args[0] if args else rest.pop("hidden_states"), rest))
        raise _FirstLayerReached

    device = decoder.embeddings[0].weight.device
    handle = decoder.layers[0].module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            mask = None if batch.mask is None else batch.mask.to(device)
            try:
                decoder.model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
            except _FirstLayerReached:
                yield call.pop()
    finally:
        handle.remove()
