"""Pruner-Zero: weights are worth their square times the size of the loss's gradient.

Dong et al., "Pruner-Zero: Evolving Symbolic Pruning Metric from Scratch for Large Language Models",
https://arxiv.org/abs/2406.02924. Of all expressions of weights, gradients and activations that a genetic program tried,

    S_ij = W_ij^2 (G_ij - min G) / (max G - min G)      G_ij = sqrt(sum over samples of (dL_s / dW_ij)^2)

ranked best; minimum and maximum are those of the matrix, L_s is the next-token loss of one sample. Of every group of
weights of an output those of highest S stay; unstructured, weights are compared within an output. Nothing is updated.

Departs from the released code: gradients are taken in fp32 and in evaluation mode (there in fp16, where small ones
vanish, and with dropout) on the calibration text of the run (there WikiText-2; no other text has an effect); where the
gradient of all weights of a matrix is the same, S = W^2. The published expression is written out, not searched.
"""

# Shape suffixes: R outputs, C inputs.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods import modeling
from methods.base import Calibration, Context
from methods.errors import UserError
from methods.gradients import real_texts, visit_gradients
from methods.lazy import torch
from methods.registry import register
from methods.sharing import REUSED, alone, shared_folder
from methods.sparsity import Density, WeightPruning, groups

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Parameter

    from methods.modeling import Decoder


@register("pruner-zero", title="Pruner-Zero", reference="https://arxiv.org/abs/2406.02924", family="semi-structured")
@dataclass(frozen=True, kw_only=True)
class PrunerZero(WeightPruning):
    """Keep the weights of largest square times scaled gradient."""

    samples: int | None = None
    """Calibration windows whose gradients are summed, the first ones (published: 128, for LLaMA-1 one); none: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples is not None and self.samples < 1:
            raise UserError(f"pruner-zero.samples is {self.samples}; the least is 1. Type none for all windows.")

    def prune(self, decoder: Decoder, density: Density, calibration: Calibration, context: Context) -> None:
        """Gradients first, then one projection after the other."""
        with self._squares(decoder, calibration, context) as path, torch.no_grad():
            from safetensors import safe_open

            with safe_open(path, "pt", device=str(decoder.model.device)) as squares:
                for block, layer in enumerate(context.progress.track(decoder.layers, "pruning", len(decoder.layers))):
                    for name in (name for group in groups(layer) for name in group):
                        weight_RC = layer.module.get_submodule(name).get_parameter("weight")
                        scores_RC = scores(weight_RC, squares.get_tensor(f"{block}.{name}").sqrt(), context)
                        modeling.sparsify(layer, name, density.mask(scores_RC), self.pattern)

    @contextmanager
    def _squares(self, decoder: Decoder, calibration: Calibration, context: Context) -> Iterator[Path]:
        """A file with G^2 of every projection by number of the block and name, whoever measured it first."""
        from safetensors.torch import save_file

        with shared_folder(context, calibration, "squared gradients", samples=self.samples) as folder:
            path = folder / "squares.safetensors"
            with alone(folder):
                if path.exists():
                    context.note(REUSED.format("squared gradients"))
                else:
                    save_file(self._measure(decoder, calibration, context), path.with_suffix(".tmp"))
                    path.with_suffix(".tmp").replace(path)
            yield path

    def _measure(self, decoder: Decoder, calibration: Calibration, context: Context) -> dict[str, Tensor]:
        """G^2, in at least fp32."""
        windows = real_texts(calibration, context.batch_size)[: self.samples]
        found: dict[str, Parameter] = {
            f"{block}.{name}": layer.module.get_submodule(name).get_parameter("weight")
            for block, layer in enumerate(decoder.layers)
            for group in groups(layer)
            for name in group
        }
        squares: dict[Parameter, Tensor] = {}

        def add(parameter: Parameter, gradient: Tensor) -> None:
            square = gradient.square()
            squares[parameter] = square if parameter not in squares else squares[parameter].add_(square)

        visit_gradients(decoder.model, list(found.values()), windows, context.progress, add)
        return {name: squares[parameter] for name, parameter in found.items()}


def scores(weight_RC: Tensor, G_RC: Tensor, context: Context) -> Tensor:
    """S, in at least fp32."""
    square_RC = weight_RC.detach().to(G_RC.dtype).square()
    least, most = G_RC.min(), G_RC.max()
    if least == most:
        context.note("the gradient of all weights of some projection is the same, so that it is pruned by magnitude")
        return square_RC
    return square_RC * ((G_RC - least) / (most - least))
