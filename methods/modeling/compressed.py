"""Compressed checkpoints: the model classes that `AutoModelForCausalLM` loads after `import methods`.

A compressed model *is* its stock class (generation, caches, attention back-ends, device placement all work), whose
modules were given other shapes by the structures that `config.compression` records. Building from the record is the
only way a compressed model comes into being, so that what was saved is what loads.
"""

from collections.abc import Callable
from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    OPTForCausalLM,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)
from transformers.initialization import no_init_weights

from methods.errors import unknown
from methods.modeling.config import (
    CompressedLlamaConfig,
    CompressedOPTConfig,
    CompressedPhiConfig,
    CompressedQwen2Config,
    compressed_config,
)
from methods.modeling.structures import removed_layers, rotated_residual
from methods.modeling.structures.record import structures_of

STRUCTURES: dict[str, Callable[[PreTrainedModel, dict[str, Any]], None]] = {
    removed_layers.NAME: lambda model, record: None,  # `num_hidden_layers` says it all
    rotated_residual.NAME: rotated_residual.apply,
}
"""What gives a dense model a structure's modules and shapes, by the structure's name."""


class _Compressed(PreTrainedModel):
    """Mixin: build the stock model, then give it the recorded structures."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        for name, record in structures_of(config).items():
            if name not in STRUCTURES:
                raise unknown("structure of this checkpoint", name, STRUCTURES, "A newer tomoe-bench may know it.")
            STRUCTURES[name](self, record)


class CompressedLlamaForCausalLM(_Compressed, LlamaForCausalLM):
    """A compressed Llama."""

    config_class = CompressedLlamaConfig


class CompressedQwen2ForCausalLM(_Compressed, Qwen2ForCausalLM):
    """A compressed Qwen2."""

    config_class = CompressedQwen2Config


class CompressedPhiForCausalLM(_Compressed, PhiForCausalLM):
    """A compressed Phi."""

    config_class = CompressedPhiConfig


class CompressedOPTForCausalLM(_Compressed, OPTForCausalLM):
    """A compressed OPT."""

    config_class = CompressedOPTConfig


MODELS: tuple[type[PreTrainedModel], ...] = (
    CompressedLlamaForCausalLM,
    CompressedQwen2ForCausalLM,
    CompressedPhiForCausalLM,
    CompressedOPTForCausalLM,
)


def register_auto_classes() -> None:
    """Make transformers' Auto classes know the classes above and their configs."""
    for model_class in MODELS:
        config_class = cast(type[PreTrainedConfig], model_class.config_class)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def rebuild(model: PreTrainedModel, structures: dict[str, dict[str, Any]], **changes: Any) -> PreTrainedModel:
    """A model of the right compressed class around the tensors of `model`, whose modules already have their new shapes.

    Nothing is copied: the tensors move over.

    Args:
        structures: the shape records to add.
        changes: config keys to change, for example `tie_word_embeddings=False`.
    """
    config = compressed_config(model.config, structures, **changes)
    with no_init_weights():
        attention = model.config._attn_implementation
        built = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
    built.load_state_dict(model.state_dict(), assign=True)
    built.generation_config = model.generation_config
    return built.to(model.device).eval()
