"""What a family adapter says: names of submodules, and how to read the config. Plain data, free of torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from methods.errors import UserError
from methods.modeling.shape import DecoderShape

COMPRESSED_PREFIX = "tomoe_bench_"
"""`model_type` of a compressed checkpoint = this + the dense family's `model_type`."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Submodule names of one decoder family; layer parts are relative to a layer."""

    model_type: str
    shape: Callable[[Mapping[str, Any]], DecoderShape]
    embeddings: tuple[str, ...]
    """Every table that is summed into the residual stream, tokens first."""
    layers: str
    final_norm: str
    head: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str
    mlp_norm: str | None
    """None in parallel blocks, where attention and MLP share one norm."""
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str
    query_norm: str | None = None
    """Norm of a query over its head, and below of a key; None where there is none."""
    key_norm: str | None = None
    scaled_query: bool = False
    """Whether 1/sqrt(head_dim) multiplies the query rather than the scores: the same but for rounding."""
    mlp: str | None = "mlp"
    """None where the projections sit in the layer itself."""
    gate: str | None
    up: str
    down: str
    activation: str


def required(config: Mapping[str, Any], *keys: str) -> list[Any]:
    """Values that a config must state.

    Raises:
        UserError: one of them is absent.
    """
    missing = [key for key in keys if key not in config]
    if missing:
        raise UserError(
            f"the config of this {config.get('model_type')!r} model lacks {', '.join(missing)}. "
            "Point --models at a directory whose config.json was written by save_pretrained."
        )
    return [config[key] for key in keys]


def common_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that most configs state under the same keys, as fields of `DecoderShape`."""
    vocabulary, hidden, layers, mlp_width, max_positions, heads = required(
        config,
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
    )
    head_dim = config.get("head_dim") or hidden // heads
    return {
        "vocabulary": vocabulary,
        "hidden": hidden,
        "layers": layers,
        "attention_width": heads * head_dim,
        "kv_width": (config.get("num_key_value_heads") or heads) * head_dim,
        "head_dim": head_dim,
        "rotary": head_dim,
        "mlp_width": mlp_width,
        "max_positions": max_positions,
    }
