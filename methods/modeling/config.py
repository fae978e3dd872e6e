"""Configs of compressed checkpoints: the stock config of the family plus `compression`, the shape record."""

from typing import Any

from transformers import LlamaConfig, OPTConfig, PhiConfig, PreTrainedConfig, Qwen2Config

from methods.modeling.families import COMPRESSED_PREFIX, family_of
from methods.modeling.structures.record import add_structure


class CompressedLlamaConfig(LlamaConfig):
    """LlamaConfig with a compression record."""

    model_type = COMPRESSED_PREFIX + "llama"
    compression: dict[str, Any] | None = None


class CompressedQwen2Config(Qwen2Config):
    """Qwen2Config with a compression record."""

    model_type = COMPRESSED_PREFIX + "qwen2"
    compression: dict[str, Any] | None = None


class CompressedPhiConfig(PhiConfig):
    """PhiConfig with a compression record."""

    model_type = COMPRESSED_PREFIX + "phi"
    compression: dict[str, Any] | None = None


class CompressedOPTConfig(OPTConfig):
    """OPTConfig with a compression record."""

    model_type = COMPRESSED_PREFIX + "opt"
    compression: dict[str, Any] | None = None


CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": CompressedLlamaConfig,
    "qwen2": CompressedQwen2Config,
    "phi": CompressedPhiConfig,
    "opt": CompressedOPTConfig,
}


def compressed_config(
    dense: PreTrainedConfig, structures: dict[str, dict[str, Any]], **changes: Any
) -> PreTrainedConfig:
    """The config of a model plus some structures (and other changed keys); structures it already has stay."""
    config_class = CONFIGS[family_of(dense.model_type).model_type]
    content = {**dense.to_dict(), **changes, "model_type": config_class.model_type}
    config = config_class.from_dict(content)
    for name, record in structures.items():
        add_structure(config, name, record)
    return config
