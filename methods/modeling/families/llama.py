"""Llama: Llama 1-3, TinyLlama, SmolLM and everything else with `model_type: llama`. GQA, RMSNorm, gated MLP."""

from collections.abc import Mapping
from typing import Any

from methods.modeling.families.base import Family, common_sizes
from methods.modeling.shape import DecoderShape


def shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape a Llama config describes."""
    return DecoderShape(
        **common_sizes(config),
        gated=True,
        parallel=False,
        layer_norm=False,
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )


LLAMA = Family(
    model_type="llama",
    shape=shape,
    embeddings=("model.embed_tokens",),
    layers="model.layers",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    output="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation="mlp.act_fn",
)
