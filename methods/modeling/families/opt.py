"""OPT (pre-norm sizes, that is all but OPT-350M): learned positions, LayerNorm, biases, MLP inside the layer."""

from collections.abc import Mapping
from typing import Any

from methods.errors import UserError
from methods.modeling.families.base import Family, required
from methods.modeling.shape import DecoderShape

POSITION_OFFSET = 2
"""OPT's position table has two unused rows in front."""


def shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape an OPT config describes."""
    vocabulary, hidden, layers, mlp_width, max_positions, heads = required(
        config,
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "ffn_dim",
        "max_position_embeddings",
        "num_attention_heads",
    )
    post_norm = not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm", False)
    if post_norm or (config.get("word_embed_proj_dim") or hidden) != hidden:
        raise UserError(
            "OPT-350M (post-norm, projected embeddings) is not supported. Use another OPT size, for example opt-125m."
        )
    if not config.get("layer_norm_elementwise_affine", True):
        raise UserError("OPT models whose LayerNorms have no weights are not supported. Use one of the opt-* sizes.")
    bias = config.get("enable_bias", True)
    return DecoderShape(
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        attention_width=hidden,
        kv_width=hidden,
        head_dim=hidden // heads,
        rotary=0,
        mlp_width=mlp_width,
        gated=False,
        parallel=False,
        layer_norm=True,
        tied=config.get("tie_word_embeddings", True),
        max_positions=max_positions,
        learned_positions=max_positions + POSITION_OFFSET,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


OPT = Family(
    model_type="opt",
    shape=shape,
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    output="self_attn.out_proj",
    scaled_query=True,
    mlp=None,
    gate=None,
    up="fc1",
    down="fc2",
    activation="activation_fn",
)
