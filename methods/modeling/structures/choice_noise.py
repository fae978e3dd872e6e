"""Structure: chance in what tokens choose (ToMoE's released code keeps its training noise in the converted model).

Routers and value scores get Gumbel(0, 1) noise, drawn anew in every pass from torch's default generator: a token's
expert is a draw from softmax(R x_t / scale). Such a model has no single perplexity; report the mean over several seeds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.modeling.decoder import Decoder
from methods.modeling.structures.moe_mlp import mixtures
from methods.modeling.structures.topk_values import TopKAttention

NAME = "choice_noise"


class NoisyLinear(nn.Linear):
    """A linear map whose outputs get Gumbel noise."""

    scale: float

    def forward(self, input: Tensor) -> Tensor:
        """Shape [..., in] to [..., out]."""
        logits = super().forward(input)
        return logits - self.scale * torch.empty_like(logits).exponential_().log()


def apply(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Make the routers and value scores of a converted model noisy, in place.

    Args:
        record: `{"scale": s}`, what the noise is multiplied with.
    """
    choices = [moe.router for moe in mixtures(model) if moe is not None]
    for layer in Decoder(model).layers:
        if isinstance(layer.attention, TopKAttention):
            choices.append(layer.attention.selector.score)
    for linear in choices:
        linear.__class__ = NoisyLinear
        linear.scale = record["scale"]  # pyright: ignore[reportArgumentType]


@contextmanager
def without_noise(model: PreTrainedModel) -> Iterator[None]:
    """While open, every choice of a noisy model is the likeliest."""
    noisy: list[nn.Module] = [module for module in model.modules() if isinstance(module, NoisyLinear)]
    for linear in noisy:
        linear.__class__ = nn.Linear
    try:
        yield
    finally:
        for linear in noisy:
            linear.__class__ = NoisyLinear
