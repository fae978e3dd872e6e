"""Structure: whole blocks removed (ShortGPT, SLEB). What remains is a stock model with fewer layers."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from methods.errors import UserError
from methods.modeling.decoder import Decoder
from methods.modeling.record import add_structure, structures_of
from methods.modeling.structures import rotated_residual

NAME = "removed_layers"


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Keep the blocks of the given indices, in place.

    The cache slot of every block (`layer_idx`) and the per-layer lists of the config follow, so that generation with
    a cache is right and the saved checkpoint loads in stock transformers.

    Raises:
        UserError: the residual stream is rotated, so that neighbouring blocks only fit each other.
    """
    earlier = structures_of(model.config)
    if rotated_residual.NAME in earlier:
        raise UserError(
            "blocks of a sliced model cannot be removed: each one reads the basis that the one before it writes. "
            "Remove blocks first and slice what is left."
        )
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
    for name, record in earlier.items():
        if "layers" in record:
            add_structure(config, name, {**record, "layers": [record["layers"][index] for index in kept]})
    record = earlier.get(NAME, {"kept": list(range(before)), "of": before})
    add_structure(config, NAME, {**record, "kept": [record["kept"][index] for index in kept]})
    return model
