"""How much rows and columns of weights matter, by gradient, by size or by lot (the measures of LLM-Pruner).

With g and f the mean of the gradient and of its square over samples (`methods.gradients`), a row or column with weights
w scores

    vectorize     |sum w g|              param_first   sum |w g|
    param_second  sum |w^2 f|            param_mix     sum |w g - w^2 f / 2|
    l1            sum |w|                l2            sum w^2                  random    a number in [0, 1)

A bias belongs to the row it is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from methods.gradients import Moments
from methods.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from torch.nn import Parameter

Measure = Literal["vectorize", "param_first", "param_second", "param_mix", "l1", "l2", "random"]
WITHOUT_GRADIENT: tuple[Measure, ...] = ("l1", "l2", "random")
WITH_SQUARES: tuple[Measure, ...] = ("param_second", "param_mix")
TERMS: dict[Measure, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "vectorize": lambda w, g, f: w * g,  # the absolute value is taken of the sum
    "param_first": lambda w, g, f: (w * g).abs(),
    "param_second": lambda w, g, f: w.square() * f,
    "param_mix": lambda w, g, f: (w * g - w.square() * f / 2).abs(),
    "l1": lambda w, g, f: w.abs(),
    "l2": lambda w, g, f: w.square(),
}
"""What a single weight adds to the score of its row or column."""


@dataclass(frozen=True)
class Importance:
    """Scores of rows and columns of a model's tensors, fp64 on the CPU."""

    measure: Measure
    moments: Mapping[Parameter, Moments]
    """Of every parameter that is asked about; empty for measures without gradient."""
    generator: Generator
    """Of the lots."""

    def rows(self, module: nn.Module) -> Tensor:
        """Of a linear's outputs, weight [out, in] and bias, or of a norm's channels: shape [out]."""
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        if self.measure == "random":
            return self._lots(len(weight))
        score = self._terms(weight).view(len(weight), -1).sum(1)
        return _as_score(score if bias is None else score + self._terms(bias))

    def columns(self, module: nn.Module) -> Tensor:
        """Of a linear's inputs, or of an embedding's channels: shape [in]."""
        weight = module.get_parameter("weight")
        if self.measure == "random":
            return self._lots(weight.shape[1])
        return _as_score(self._terms(weight).sum(0))

    def _lots(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64)

    def _terms(self, parameter: Parameter) -> Tensor:
        weight = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        mean, square = self.moments.get(parameter, (None, None))
        return TERMS[self.measure](weight, mean, square)  # type: ignore[arg-type]


def _as_score(signed: Tensor) -> Tensor:
    return signed.abs().cpu().double()
