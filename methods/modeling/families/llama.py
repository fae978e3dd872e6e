"""Llama: Llama 1-3, TinyLlama, SmolLM and everything else with `model_type: llama`. GQA, RMSNorm, gated MLP."""

from collections.abc import Mapping
from typing import Any

from methods.modeling.families.base import Family, head_widths, required
from methods.modeling.shape import DecoderShape


def shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape a Llama config describes."""
    vocabulary, hidden, layers, mlp_width, max_positions = required(
        config, "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"
    )
    attention_width, kv_width = head_widths(config)
    return DecoderShape(
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        attention_width=attention_width,
        kv_width=kv_width,
        mlp_width=mlp_width,
        gated=True,
        parallel=False,
        layer_norm=False,
        tied=config.get("tie_word_embeddings", False),
        max_positions=max_positions,
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
