"""The shots of LLM Surgeon: curvature, costs, removal and update, again and again, on one model; resumable."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods import modeling
from methods.errors import UserError
from methods.kfac import Curvature, Factors
from methods.kronecker_surgery import Surgery, write
from methods.lazy import torch
from methods.live_parts import (
    Block,
    Part,
    alive_without,
    bury,
    cheapest,
    projections,
    protected,
    stored,
    whole,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from methods.llm_surgeon import LLMSurgeon


class Patient:
    """A dense model on the way to its size: zeros where something is dead, and what a killed run must not lose."""

    def __init__(self, settings: LLMSurgeon, model: PreTrainedModel, file: Path, identity: dict[str, Any]) -> None:
        """Args:
        file: the checkpoint.
        identity: what must be the same for a checkpoint to be this run's.
        """
        self._settings, self._model, self._file = settings, model, file
        self._identity = json.loads(json.dumps(identity))
        decoder = modeling.Decoder(model)
        self._shape = decoder.shape
        self._projections = [projections(layer) for layer in decoder.layers]
        self._biased = [[role for role, one in block.items() if one.bias is not None] for block in self._projections]
        self.alive = [whole(layer) for layer in decoder.layers]
        """Per block."""
        self.history: list[dict[str, Any]] = []
        """Of every finished shot: the loss before it, what it left, what the dearest part that went was to cost (in
        the unit of the factors, see `methods.kfac`), and how many projections took more damping than asked."""

    def operate(self, passes: Sequence[Iterable[Tensor]], goal: int) -> None:
        """One shot.

        Args:
            passes: the text [T] after text of each pass that the curvature takes.
            goal: parameters of all projections after it.
        """
        factors, loss = self._curvature(passes)
        costs, strained = self._costs(factors)
        last = [protected(cost, alive, self._shape) for cost, alive in zip(costs, self.alive, strict=True)]
        gone, threshold = cheapest(costs, last, self._size_without, goal)
        self._remove(factors, gone)
        self.alive = alive_without(self.alive, gone, self._shape)
        bury(self._projections, self.alive)
        size = sum(map(stored, self.alive, self._biased))
        self.history.append({"loss": loss, "parameters": size, "threshold": threshold, "strained": strained})

    def _sites(self) -> Iterator[tuple[int, str, nn.Linear]]:
        """Every projection: its block, its role and itself."""
        for index, block in enumerate(self._projections):
            for role, linear in block.items():
                yield index, role, linear

    def _size_without(self, gone: list[Block]) -> int:
        return sum(map(stored, alive_without(self.alive, gone, self._shape), self._biased))

    def _curvature(self, passes: Sequence[Iterable[Tensor]]) -> tuple[list[Factors], float]:
        """Of every site, and the loss."""
        device = self._model.device if self._settings.factors == "device" else torch.device("cpu")
        curvature = Curvature(self._model, [linear for *_, linear in self._sites()], device)
        if self._settings.power_iterations:
            return curvature.nearest(passes), curvature.loss
        return curvature.independent(*passes), curvature.loss

    def _surgery(self, alive: Part, linear: nn.Linear, factors: Factors) -> Surgery:
        """Of what is alive of one projection."""
        return Surgery.of(linear, alive, factors, damp_g=self._settings.damp_g, damp_a=self._settings.damp_a)

    def _costs(self, factors: list[Factors]) -> tuple[list[Block], int]:
        """Of every row and column, infinite for dead ones; and how many projections took more damping than asked."""
        costs: list[Block] = [{} for _ in self.alive]
        strained = 0
        for (index, role, linear), found in zip(self._sites(), factors, strict=True):
            alive = self.alive[index][role]
            surgery = self._surgery(alive, linear, found)
            costs[index][role] = _placed(surgery.costs(), alive)
            strained += surgery.strained
        return costs, strained

    def _remove(self, factors: list[Factors], gone: list[Block]) -> None:
        """Remove what was chosen and let the others make up, in place."""
        how = self._settings
        for (index, role, linear), found in zip(self._sites(), factors, strict=True):
            alive, chosen = self.alive[index][role], gone[index][role]
            rows, columns = (
                side[flags].nonzero()[:, 0].to(linear.weight.device) for side, flags in zip(chosen, alive, strict=True)
            )
            if len(rows) or len(columns):
                surgery = self._surgery(alive, linear, found)
                write(linear, alive, surgery.remove(rows, columns, how.update, how.max_correlate))

    def save(self) -> None:
        """Write the checkpoint, whole or not at all. Of the processes of a launch only the first does."""
        from safetensors.torch import save_file

        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        content = json.dumps({"identity": self._identity, "history": self.history})
        save_file(self._tensors(), partial, metadata={"content": content})
        partial.replace(self._file)

    def resume(self) -> None:
        """Go on where the checkpoint was left, if there is one.

        Raises:
            UserError: it is of other settings, another size or another text.
        """
        from safetensors import safe_open

        if not self._file.exists():
            return
        with safe_open(self._file, "pt") as saved:
            content = json.loads(saved.metadata()["content"])
            self._check(content["identity"])
            for name, tensor in self._tensors().items():
                tensor.copy_(saved.get_tensor(name))
        self.history = content["history"]

    def _check(self, theirs: dict[str, Any]) -> None:
        different = [key for key in self._identity if theirs.get(key) != self._identity[key]]
        if different:
            raise UserError(
                f"the checkpoint {self._file} is of another {' and another '.join(different)}. Remove it to start "
                "anew, or repeat the command it was made with."
            )

    def _tensors(self) -> dict[str, Tensor]:
        """All that shots change, by name; the tensors themselves."""
        tensors = {}
        for index, role, linear in self._sites():
            alive = self.alive[index][role]._asdict()
            weights = {name: tensor.data for name, tensor in linear.named_parameters()}
            tensors |= {f"{index}.{role}.{name}": tensor for name, tensor in (alive | weights).items()}
        return tensors


def _placed(costs: tuple[Tensor, Tensor], alive: Part) -> Part:
    """Costs of living rows and columns (of which the bias is none) at their places; infinity at the others."""
    sides = [torch.full(flags.shape, torch.inf, dtype=torch.float64) for flags in alive]
    for side, flags, values in zip(sides, alive, costs, strict=True):
        side[flags] = values[: int(flags.sum())].cpu()
    return Part(*sides)
