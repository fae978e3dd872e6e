"""Configs of compressed checkpoints: the stock config of the family plus `compression`, the shape record."""

import importlib
from typing import Any

from transformers import AutoConfig, LlamaConfig, OPTConfig, PhiConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from methods.modeling.families import COMPRESSED_PREFIX, family_of
from methods.modeling.record import add_structure


class CompressedLlamaConfig(LlamaConfig):
    """LlamaConfig with a compression record."""

    model_type = COMPRESSED_PREFIX + "llama"
    compression: dict[str, Any] | None = None


class CompressedQwen2Config(Qwen2Config):
    """Qwen2Config with a compression record."""

    model_type = COMPRESSED_PREFIX + "qwen2"
    compression: dict[str, Any] | None = None


class CompressedQwen3Config(Qwen3Config):
    """Qwen3Config with a compression record."""

    model_type = COMPRESSED_PREFIX + "qwen3"
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
    "qwen3": CompressedQwen3Config,
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


for _config in CONFIGS.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
importlib.import_module("methods.modeling.compressed")  # registers the models, which need the classes above
