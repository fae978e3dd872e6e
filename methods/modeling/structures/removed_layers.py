"""Structure: whole blocks removed (ShortGPT, SLEB). What remains is a stock model with fewer layers."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from methods.modeling.decoder import Decoder
from methods.modeling.structures.record import add_structure

NAME = "removed_layers"


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Keep the blocks of the given indices, in place.

    The cache slot of every block (`layer_idx`) and the per-layer lists of the config follow, so that generation with
    a cache is right and the saved checkpoint loads in stock transformers.
    """
    decoder = Decoder(model)
    before = len(decoder.module_list)
    layers = [decoder.module_list[index] for index in kept]
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position  # type: ignore[assignment]
    decoder.replace(decoder.family.layers, nn.ModuleList(layers))
    config = model.config
    for name, value in config.to_dict().items():
        if name.endswith("layer_types") and isinstance(value, list) and len(value) == before:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(layers)
    add_structure(config, NAME, {"kept": list(kept), "of": before})
    return model
