"""Pruning weights block by block, by what the projections read in a network whose earlier blocks are pruned already.

For every block: one pass of the calibration text, in which every projection's inputs are looked at; its projections are
pruned; another pass gives what enters the next block. A method says what it sums of the inputs, and prunes with that.
"""

# Shape suffixes: B batch, T tokens, D hidden size, N real tokens, R outputs, C inputs.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from methods import modeling
from methods.base import Calibration, Context
from methods.lazy import torch
from methods.sparsity import Density, WeightPruning, groups

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.modeling import Decoder, DecoderLayer, Signals


class Statistic(Protocol):
    """What is known of the inputs of some projections; of a size that does not depend on the number of tokens."""

    def add(self, x_NC: Tensor, /) -> None:
        """See some tokens."""
        ...


S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True, kw_only=True)
class CalibratedPruning(WeightPruning, Generic[S]):
    """A method that prunes by what projections read."""

    streams: ClassVar[bool] = True

    @abstractmethod
    def statistic(self, width: int, device: torch.device) -> S:
        """Of no tokens yet."""

    @abstractmethod
    def masks(self, linears: Sequence[nn.Linear], seen: S, density: Density, context: Context) -> list[Tensor]:
        """What stays of projections that read the same input, bool [R, C] each; may change their weights in place."""

    def stages(self, layer: DecoderLayer) -> list[list[list[str]]]:
        """The groups of projections of which the inputs are looked at in one pass; here all of a block."""
        return [groups(layer)]

    def prune(self, decoder: Decoder, density: Density, calibration: Calibration, context: Context) -> None:
        """Block by block; the residual stream waits in host memory."""
        with torch.no_grad():
            signals = modeling.Signals.of(decoder, calibration, context.batch_size)
            for layer in context.progress.track(decoder.layers, "pruning", len(decoder.layers)):
                with modeling.resident(layer.module, signals.device):
                    for stage in self.stages(layer):
                        self._prune_stage(layer, stage, signals, density, context)
                    signals.update(lambda x, keywords, mask, layer=layer: run(layer, x, keywords))
                    modeling.forget(layer)  # else the dense matrices of all blocks would gather

    def _prune_stage(
        self, layer: DecoderLayer, stage: list[list[str]], signals: Signals, density: Density, context: Context
    ) -> None:
        found = [[layer.module.get_submodule(name) for name in names] for names in stage]
        statistics = [self.statistic(linears[0].in_features, signals.device) for linears in found]  # type: ignore[arg-type]
        observe(layer, [linears[0] for linears in found], statistics, signals)
        for names, linears, seen in zip(stage, found, statistics, strict=True):
            masks = self.masks(linears, seen, density, context)  # type: ignore[arg-type]
            for name, mask_RC in zip(names, masks, strict=True):
                modeling.sparsify(layer, name, mask_RC, self.pattern)


def run(layer: DecoderLayer, x_BTD: Tensor, keywords: dict[str, Any]) -> Tensor:
    """A block's output."""
    output = layer.module(x_BTD, **keywords)
    return output[0] if isinstance(output, tuple) else output


def observe(
    layer: DecoderLayer, readers: Sequence[nn.Module], statistics: Sequence[Statistic], signals: Signals
) -> None:
    """Run a block on all batches and show every reader's inputs, padding aside, to its statistic."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for index, reader in enumerate(readers):
            hooks.callback(reader.register_forward_pre_hook(partial(_note, seen, index)).remove)
        for x_BTD, keywords, mask_BT in signals.calls():
            run(layer, x_BTD, keywords)
            for index, statistic in enumerate(statistics):
                x_BTC = seen.pop(index)
                statistic.add(modeling.real_tokens(x_BTC.reshape(*x_BTD.shape[:2], -1), mask_BT))


def _note(seen: dict[int, Tensor], index: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen[index] = args[0]
