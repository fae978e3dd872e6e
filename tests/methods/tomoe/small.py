"""ToMoE on tiny random models: networks for the tests."""

from typing import Any

import torch
from transformers import PreTrainedModel

from methods.modeling import Decoder
from methods.tomoe import ToMoE
from methods.tomoe.masking import MaskedDecoder
from methods.tomoe.network import ToMoENetwork


def network(model: PreTrainedModel, seed: int = 0, **settings: Any) -> ToMoENetwork:
    """A network with mask logits around the threshold, so that about half of everything is on."""
    shape, method = Decoder(model).shape, ToMoE(**{"experts": 4, "embedding": 8} | settings)
    torch.manual_seed(seed)
    made = ToMoENetwork(shape, method, method.width(shape), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "decoder" in name or "dynamic" in name or "static" in name:
                parameter.mul_(60)
    return made.to(model.dtype)


def masked(model: PreTrainedModel, **settings: Any) -> MaskedDecoder:
    """A masked decoder without noise."""
    return MaskedDecoder(Decoder(model), network(model, **settings), noise=0.0)
