"""The vocabulary all methods share: a uniform view of a decoder, and the structures a compressed one is made of.

Names are imported from their modules on first use, so that `import methods` stays free of torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methods.modeling.compressed import rebuild as rebuild
    from methods.modeling.decoder import Decoder as Decoder
    from methods.modeling.decoder import DecoderLayer as DecoderLayer
    from methods.modeling.decoder import layer_calls as layer_calls
    from methods.modeling.decoder import watch_layers as watch_layers
    from methods.modeling.delta import load_delta as load_delta
    from methods.modeling.delta import save_delta as save_delta
    from methods.modeling.residence import keep_blocks_on_host as keep_blocks_on_host
    from methods.modeling.residence import resident as resident
    from methods.modeling.signals import Signals as Signals
    from methods.modeling.signals import real_tokens as real_tokens
    from methods.modeling.structures.gathered_linears import gather_linear as gather_linear
    from methods.modeling.structures.gathered_linears import gathered_record as gathered_record
    from methods.modeling.structures.moe_convert import convert_mlp as convert_mlp
    from methods.modeling.structures.moe_inspect import describe_experts as describe_experts
    from methods.modeling.structures.moe_inspect import expert_choices as expert_choices
    from methods.modeling.structures.moe_inspect import expert_ids as expert_ids
    from methods.modeling.structures.moe_mlp import expert_record as expert_record
    from methods.modeling.structures.moe_mlp import set_experts as set_experts
    from methods.modeling.structures.moe_routers import AnalyticRouter as AnalyticRouter
    from methods.modeling.structures.moe_routers import MLPRouter as MLPRouter
    from methods.modeling.structures.moe_routers import OracleRouter as OracleRouter
    from methods.modeling.structures.narrow_attention import attention_record as attention_record
    from methods.modeling.structures.narrow_attention import fold_value_bias as fold_value_bias
    from methods.modeling.structures.narrow_attention import narrow_heads as narrow_heads
    from methods.modeling.structures.narrow_attention import narrow_qk as narrow_qk
    from methods.modeling.structures.narrow_attention import narrow_vo as narrow_vo
    from methods.modeling.structures.narrow_mlp import narrow_mlp as narrow_mlp
    from methods.modeling.structures.narrow_residual import narrow_residual as narrow_residual
    from methods.modeling.structures.narrow_residual import stream_parts as stream_parts
    from methods.modeling.structures.removed_layers import keep_layers as keep_layers
    from methods.modeling.structures.rotated_residual import convert_layer as convert_layer
    from methods.modeling.structures.rotated_residual import replace_norm as replace_norm
    from methods.modeling.structures.sparse_linears import forget as forget
    from methods.modeling.structures.sparse_linears import made_bytes as made_bytes
    from methods.modeling.structures.sparse_linears import runs_sparse as runs_sparse
    from methods.modeling.structures.sparse_linears import sparse_record as sparse_record
    from methods.modeling.structures.sparse_linears import sparsify as sparsify
    from methods.modeling.structures.topk_choice import ValueRule as ValueRule
    from methods.modeling.structures.topk_choice import ValueSelector as ValueSelector
    from methods.modeling.structures.topk_values import convert_values as convert_values
    from methods.modeling.structures.topk_values import set_value_cache as set_value_cache
    from methods.modeling.structures.topk_values import value_record as value_record

_HOMES = {
    "rebuild": "compressed",
    "Decoder": "decoder",
    "DecoderLayer": "decoder",
    "layer_calls": "decoder",
    "watch_layers": "decoder",
    "load_delta": "delta",
    "save_delta": "delta",
    "keep_blocks_on_host": "residence",
    "resident": "residence",
    "Signals": "signals",
    "real_tokens": "signals",
    "gather_linear": "structures.gathered_linears",
    "gathered_record": "structures.gathered_linears",
    "describe_experts": "structures.moe_inspect",
    "expert_choices": "structures.moe_inspect",
    "expert_ids": "structures.moe_inspect",
    "convert_mlp": "structures.moe_convert",
    "expert_record": "structures.moe_mlp",
    "set_experts": "structures.moe_mlp",
    "AnalyticRouter": "structures.moe_routers",
    "MLPRouter": "structures.moe_routers",
    "OracleRouter": "structures.moe_routers",
    "attention_record": "structures.narrow_attention",
    "fold_value_bias": "structures.narrow_attention",
    "narrow_heads": "structures.narrow_attention",
    "narrow_qk": "structures.narrow_attention",
    "narrow_vo": "structures.narrow_attention",
    "narrow_mlp": "structures.narrow_mlp",
    "narrow_residual": "structures.narrow_residual",
    "stream_parts": "structures.narrow_residual",
    "keep_layers": "structures.removed_layers",
    "convert_layer": "structures.rotated_residual",
    "replace_norm": "structures.rotated_residual",
    "forget": "structures.sparse_linears",
    "made_bytes": "structures.sparse_linears",
    "runs_sparse": "structures.sparse_linears",
    "sparse_record": "structures.sparse_linears",
    "sparsify": "structures.sparse_linears",
    "ValueRule": "structures.topk_choice",
    "ValueSelector": "structures.topk_choice",
    "convert_values": "structures.topk_values",
    "set_value_cache": "structures.topk_values",
    "value_record": "structures.topk_values",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'methods.modeling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"methods.modeling.{_HOMES[name]}"), name)
