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
    from methods.modeling.structures.removed_layers import keep_layers as keep_layers
    from methods.modeling.structures.rotated_residual import convert_layer as convert_layer
    from methods.modeling.structures.rotated_residual import replace_norm as replace_norm

_HOMES = {
    "rebuild": "compressed",
    "Decoder": "decoder",
    "DecoderLayer": "decoder",
    "layer_calls": "decoder",
    "watch_layers": "decoder",
    "keep_layers": "structures.removed_layers",
    "convert_layer": "structures.rotated_residual",
    "replace_norm": "structures.rotated_residual",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'methods.modeling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"methods.modeling.{_HOMES[name]}"), name)
