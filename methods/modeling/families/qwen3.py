"""Qwen3 (dense): Llama's layout with an RMS norm over every head of query and key, and a head width of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from methods.modeling.families import llama
from methods.modeling.families.base import Family, required
from methods.modeling.shape import DecoderShape


def shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape a Qwen3 config describes."""
    required(config, "num_key_value_heads", "head_dim")  # transformers' defaults do not follow from the other sizes
    return dataclasses.replace(llama.shape(config), qk_norm=True, mlp_bias=False)


QWEN3: Family = dataclasses.replace(
    llama.LLAMA, model_type="qwen3", shape=shape, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"
)
