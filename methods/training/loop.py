"""The training loop: AdamW on some tensors, everything else being the caller's.

    batch -> loss(step, batch) -> gradient -> mean over processes -> clipped -> AdamW at rate(step)

Every step's noise is seeded by (seed, step, process), so a resumed run draws what an uninterrupted one draws. With
several processes (`accelerate launch`) each one reads its own blocks and draws its own noise, and gradients are
averaged explicitly: what is trained may run inside a frozen model, where no wrapper would see it.

A step whose gradient is not finite in some process is left out in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn

from methods.base import Context
from methods.errors import UserError
from methods.training.data import Blocks
from methods.training.log import StepLog
from methods.training.seeding import mixed, seeded
from methods.training.state import TrainingState

PATIENCE = 10
"""Steps in a row that may have a non-finite loss or gradient."""
SAVE_SECONDS = 60.0
"""Between checkpoints."""

Loss = Callable[[int, Tensor], tuple[Tensor, Mapping[str, Tensor | float]]]
"""From a step's number and its token ids, int64 [sequences, T + 1], to what is to fall, and what to log of it."""


class Group(NamedTuple):
    """Parameters with a learning rate of their own."""

    parameters: Mapping[str, nn.Parameter]
    """By a name that no other group has."""
    factor: float = 1.0
    """What the learning rate is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How to train."""

    name: str
    """Of the method: checkpoints lie in a folder of that name."""
    label: str
    """What the progress display says."""
    remedy: str
    """A sentence that says what to type when the loss stays non-finite."""
    steps: int
    sequences: int
    """Of each process and step."""
    seed: int
    weight_decay: float
    """Of AdamW, on everything trained."""
    clip: float | None = None
    """Largest norm of the gradient of everything trained; None: any."""
    tensorboard: bool = False
    """Write TensorBoard events beside training.csv."""


class Loop:
    """One training run; `run` brings it to its end."""

    def __init__(
        self,
        settings: LoopSettings,
        groups: Sequence[Group],
        loss: Loss,
        rate: Callable[[int], float],
        blocks: Blocks,
        context: Context,
        identity: Mapping[str, Any],
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            rate: the learning rate of a step.
            identity: JSON, by what it is of: a checkpoint whose identity is another is refused. The text and the number
                of processes are added.
            constants: tensors that are not trained, but saved, restored and equal in all processes all the same.
        """
        self.settings, self.context, self.blocks = settings, context, blocks
        self.loss, self.rate = loss, rate
        self.process = PartialState(cpu=context.device == "cpu")
        self.optimizer = _optimizer(groups, settings.weight_decay)
        parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
        self.tensors = parameters | dict(constants or {})
        identity = {**identity, "text": blocks.sha256, "processes": self.process.num_processes}
        self.state = TrainingState(context.scratch / settings.name, self.tensors, self.optimizer, identity)

    def run(self, begin: Callable[[], None] | None = None) -> None:
        """Train to the last step, from the latest checkpoint if there is one.

        Args:
            begin: called before the first step, not when resuming, to set what is trained.

        Raises:
            UserError: the checkpoint to resume from belongs to another run, or the loss stays non-finite.
        """
        start, steps = self._resumed(), self.settings.steps
        if start == 0 and begin is not None:
            begin()
        # What was computed alike may differ between devices in the last bit.
        broadcast({name: tensor.detach() for name, tensor in self.tensors.items()})
        batches = islice(self.batches(), start, None)
        numbers = self.context.progress.track(range(start, steps), self.settings.label, steps - start)
        folder = self.context.artifacts if self.process.is_main_process else None
        with StepLog(folder, start, self.settings.tensorboard) as log:
            for number, batch in zip(numbers, batches, strict=False):
                log.write(self.step(number, batch.to(self.context.device)))
                if self.process.is_main_process:
                    self.state.save_sometimes(number + 1, SAVE_SECONDS)
        if self.process.is_main_process and start < steps:
            self.state.save("final", steps)

    def _resumed(self) -> int:
        """The step to go on from, the same in every process."""
        start = self.state.resume()
        starts = cast(list[int], gather_object([start]))
        if len({*starts}) > 1:
            raise UserError(
                f"the processes of this run found checkpoints of different steps ({starts}) in {self.state.folder}. "
                "Let --out be a folder that all of them share."
            )
        return start

    def batches(self) -> Iterator[Tensor]:
        """Blocks of this process, [sequences, T + 1] per step, from the first step on."""
        blocks, count, rank = iter(self.blocks), self.process.num_processes, self.process.process_index
        while True:
            everyone = list(islice(blocks, count * self.settings.sequences))
            yield torch.stack(everyone[rank::count])

    def step(self, number: int, batch: Tensor) -> dict[str, float]:
        """One optimiser step; what the log gets of it."""
        rate = self.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with seeded(mixed(self.settings.seed, number, self.process.process_index), self.context.device):
            loss, told = self.loss(number, batch)
            loss.backward()
        self._update(number)
        row: dict[str, float] = {"step": number, "learning_rate": rate, "skipped": self.state.skipped}
        row |= {name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in told.items()}
        row |= {f"tokens.{source}": count for source, count in self.blocks.tokens.items()}
        return row | {"batch_tokens": batch[:, 1:].numel() * self.process.num_processes}

    def _update(self, number: int) -> None:
        """Average gradients over processes and take the step, unless something is not finite anywhere."""
        gradients = [parameter.grad for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [gradient for gradient in gradients if gradient is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        if self.process.num_processes > 1:
            flat = cast(Tensor, reduce(flat, "mean"))
        if flat.isfinite().all():
            if self.settings.clip is not None:
                flat *= self.settings.clip / flat.norm().clamp_min(self.settings.clip)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            self.optimizer.step()
            self.state.in_a_row = 0
        else:
            self._skip(number)
        self.optimizer.zero_grad()

    def _skip(self, number: int) -> None:
        self.state.skipped += 1
        self.state.in_a_row += 1
        if self.state.in_a_row >= PATIENCE:
            if self.process.is_main_process:
                self.state.save(f"step-{number + 1:06d}", number + 1)
            raise UserError(
                f"the loss was not finite in {PATIENCE} steps in a row, so training stopped; what was trained before "
                f"is in {self.state.folder}. {self.settings.remedy}"
            )


def _optimizer(groups: Sequence[Group], weight_decay: float) -> torch.optim.AdamW:
    """AdamW, whose learning rates every step sets."""
    content = [{"params": list(group.parameters.values()), "factor": group.factor} for group in groups]
    return torch.optim.AdamW(content, lr=1.0, weight_decay=weight_decay)
