"""Qwen2 and Qwen2.5: Llama's layout with biases on query, key and value."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from methods.modeling.families import llama
from methods.modeling.families.base import Family, required
from methods.modeling.shape import DecoderShape


def shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape a Qwen2 config describes."""
    required(config, "num_key_value_heads")  # transformers' default is not the number of heads
    return dataclasses.replace(llama.shape(config), qkv_bias=True, output_bias=False, mlp_bias=False)


QWEN2: Family = dataclasses.replace(llama.LLAMA, model_type="qwen2", shape=shape)
