"""Compressed checkpoints: the model classes that `AutoModelForCausalLM` loads after `import methods`.

A compressed model *is* its stock class (generation, caches, attention back-ends, device placement all work), whose
modules were given other shapes by the structures that `config.compression` records. Building from the record is the
only way a compressed model comes into being, so that what was saved is what loads.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    OPTForCausalLM,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from methods.errors import unknown
from methods.modeling.config import (
    CompressedLlamaConfig,
    CompressedOPTConfig,
    CompressedPhiConfig,
    CompressedQwen2Config,
    CompressedQwen3Config,
    compressed_config,
)
from methods.modeling.record import structures_of
from methods.modeling.structures import (
    choice_noise,
    gathered_linears,
    moe_mlp,
    narrow_attention,
    narrow_mlp,
    narrow_residual,
    removed_layers,
    rotated_residual,
    sparse_linears,
    topk_values,
)

STRUCTURES: dict[str, Callable[[PreTrainedModel, dict[str, Any]], None]] = {
    removed_layers.NAME: lambda model, record: None,  # `num_hidden_layers` says it all
    rotated_residual.NAME: rotated_residual.apply,
    narrow_residual.NAME: narrow_residual.apply,
    narrow_mlp.NAME: narrow_mlp.apply,
    moe_mlp.NAME: moe_mlp.apply,
    narrow_attention.NAME: narrow_attention.apply,
    topk_values.NAME: topk_values.apply,
    gathered_linears.NAME: gathered_linears.apply,
    sparse_linears.NAME: sparse_linears.apply,
    choice_noise.NAME: choice_noise.apply,
}
"""What gives a dense model a structure's modules and shapes, by name, in the order they apply (a saved record is sorted
by the alphabet)."""


class _Compressed(PreTrainedModel):
    """Mixin: build the stock model, then give it the recorded structures."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        recorded = structures_of(config)
        for name in recorded:
            if name not in STRUCTURES:
                raise unknown("structure of this checkpoint", name, STRUCTURES, "A newer tomoe-bench may know it.")
        for name, apply in STRUCTURES.items():
            if name in recorded:
                apply(self, recorded[name])


class CompressedLlamaForCausalLM(_Compressed, LlamaForCausalLM):
    """A compressed Llama."""

    config_class = CompressedLlamaConfig


class CompressedQwen2ForCausalLM(_Compressed, Qwen2ForCausalLM):
    """A compressed Qwen2."""

    config_class = CompressedQwen2Config


class CompressedQwen3ForCausalLM(_Compressed, Qwen3ForCausalLM):
    """A compressed Qwen3."""

    config_class = CompressedQwen3Config


class CompressedPhiForCausalLM(_Compressed, PhiForCausalLM):
    """A compressed Phi."""

    config_class = CompressedPhiConfig


class CompressedOPTForCausalLM(_Compressed, OPTForCausalLM):
    """A compressed OPT."""

    config_class = CompressedOPTConfig


MODELS: tuple[type[PreTrainedModel], ...] = (
    CompressedLlamaForCausalLM,
    CompressedQwen2ForCausalLM,
    CompressedQwen3ForCausalLM,
    CompressedPhiForCausalLM,
    CompressedOPTForCausalLM,
)


for _model in MODELS:
    AutoModelForCausalLM.register(cast(type[PreTrainedConfig], _model.config_class), _model, exist_ok=True)


def rebuild(model: PreTrainedModel, structures: dict[str, dict[str, Any]], **changes: Any) -> PreTrainedModel:
    """A model of the right compressed class around the tensors of `model`, whose modules already have their new shapes.

    Nothing is copied: the tensors move over, and no memory is taken for those they replace.

    Args:
        structures: the shape records to add.
        changes: config keys to change, for example `tie_word_embeddings=False`.
    """
    config = compressed_config(model.config, structures, **changes)
    with torch.device("meta"):
        attention = model.config._attn_implementation
        built = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
    built.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # those that no state dict has too, such as rotary frequencies
        module, _, leaf = name.rpartition(".")
        setattr(built.get_submodule(module), leaf, buffer)
    built.tie_weights()
    built.generation_config = model.generation_config
    return built.eval()
