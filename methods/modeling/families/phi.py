"""Phi-1, 1.5 and 2: parallel attention and plain MLP behind one LayerNorm, biases everywhere, partial rotary."""

from collections.abc import Mapping
from typing import Any

from methods.errors import UserError
from methods.modeling.families.base import Family, common_sizes
from methods.modeling.shape import DecoderShape


def shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape a Phi config describes."""
    if config.get("qk_layernorm"):
        raise UserError("Phi models with qk_layernorm are not supported; phi-1, phi-1.5 and phi-2 do not use it.")
    sizes = common_sizes(config)
    rope = config.get("rope_parameters") or config
    sizes["rotary"] = int(sizes["head_dim"] * rope.get("partial_rotary_factor", 0.5))
    return DecoderShape(
        **sizes,
        gated=False,
        parallel=True,
        layer_norm=True,
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


PHI = Family(
    model_type="phi",
    shape=shape,
    embeddings=("model.embed_tokens",),
    layers="model.layers",
    final_norm="model.final_layernorm",
    attention_norm="input_layernorm",
    mlp_norm=None,
    output="self_attn.dense",
    gate=None,
    up="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.activation_fn",
)
