"""The training loop (ToMoE, section "Training" and appendix): frozen weights, self-distillation in place, AdamW.

A step: the dense model runs without masks (teacher, no gradient), one draw of masks is made, the masked model runs
(student), and the objective's gradient reaches the routers, projections and the hypernetwork.

Every step's noise is seeded by (seed, step, process), so a resumed run draws what an uninterrupted one draws. With
several processes (`accelerate launch`) each one reads its own blocks and draws its own noise, and gradients are
averaged explicitly: the trained modules run inside the frozen model, where no wrapper would see them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.base import Budget, Calibration, Context
from methods.errors import UserError
from methods.modeling.content import Dense
from methods.modeling.decoder import Decoder
from methods.modeling.shape import DecoderShape
from methods.tomoe import objective
from methods.tomoe.accounting import layer_weights, prunable, whole
from methods.tomoe.data import Blocks
from methods.tomoe.distillation import distillation, next_token
from methods.tomoe.log import StepLog
from methods.tomoe.masking import MaskedDecoder
from methods.tomoe.network import LayerMasks, ToMoENetwork
from methods.tomoe.start import TOKENS, begin
from methods.tomoe.state import TrainingState

if TYPE_CHECKING:
    from methods.tomoe.method import ToMoE

PATIENCE = 10
"""Steps in a row that may have a non-finite loss or gradient."""
SAVE_SECONDS = 60.0
"""Between checkpoints."""


def train(
    settings: ToMoE,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget,
    calibration: Calibration,
    context: Context,
) -> ToMoENetwork:
    """The trained network; resumes from `context.scratch`.

    Raises:
        UserError: the target is out of reach, the text is shorter than a block, the checkpoint to resume from belongs
            to another run, or the loss stays non-finite.
    """
    trainer = Trainer(settings, model, tokenizer, budget, calibration, context)
    trainer.run()
    return trainer.network


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first step."""

    steps: int
    sequences: int
    window: int
    target: float
    """p."""
    start: float
    """The fraction of T_total that is on before the first step, but for noise: what the ramp begins with."""
    learning_rate: float
    """At the first step."""
    seed: int

    def rate(self, settings: ToMoE, step: int) -> float:
        """Learning rate of a step."""
        if settings.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * step / self.steps))

    def noise(self, settings: ToMoE, step: int) -> float:
        """Scale of the noise of a step: from 1 to its last value, linear."""
        return 1 - (1 - settings.last_noise) * step / max(1, self.steps - 1)

    def p(self, settings: ToMoE, step: int) -> float:
        """The target of a step: from the size of the start to p, linear over the first `ramp` of the steps."""
        ramp = settings.ramp * self.steps
        return self.target if step >= ramp else self.start - (self.start - self.target) * step / ramp


class Trainer:
    """One training run; `run` brings it to its end."""

    def __init__(
        self,
        settings: ToMoE,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> None:
        if model.dtype == torch.float16:
            raise UserError("tomoe trains in bfloat16 or float32: gradients vanish in float16. Type --dtype bfloat16.")
        self.settings, self.model, self.context = settings, model, context
        self.ignored = tokenizer.bos_token_id
        self.decoder = Decoder(model)
        shape, granted = self.decoder.shape, context.training
        target = settings.target(shape, budget)
        self.plan = Plan(
            steps=settings.steps or granted.steps,
            sequences=granted.sequences,
            window=min(granted.window, shape.max_positions),
            target=target,
            start=1.0 if settings.start == "random" else with_mlp_at(target, shape),
            learning_rate=settings.rate(shape),
            seed=context.seed,
        )
        self.process = PartialState(cpu=context.device == "cpu")
        generator = torch.Generator().manual_seed(context.seed)
        with seeded(context.seed, context.device):
            self.network = ToMoENetwork(shape, settings, settings.width(shape), generator).to(model.device)
        self.masked = MaskedDecoder(self.decoder, self.network)
        self.optimizer = optimizer(self.network, settings)
        self.blocks = Blocks(calibration.rows(), tokenizer, self.plan.window, context.seed)
        mathematics = {k: v for k, v in asdict(settings).items() if k not in ("checkpointing", "tensorboard")}
        identity = {"settings": mathematics, "budget": asdict(self.plan), "model": Dense(model.state_dict()).identity}
        identity |= {
            "calibration": calibration.sha256,
            "text": self.blocks.sha256,
            "processes": self.process.num_processes,
        }
        self.state = TrainingState(context.scratch / "tomoe", self.network, self.optimizer, identity)

    def run(self) -> None:
        """Train to the last step, from the latest checkpoint if there is one."""
        self.model.requires_grad_(False)
        start = self._resumed()
        if start == 0 and self.settings.start == "energy":
            begin(self.network, self.decoder, self.plan.target, self._first_windows(), self.context)
        broadcast(self.network.state_dict())  # what was computed alike may differ between devices in the last bit
        batches = islice(self._batches(), start, None)
        steps = self.context.progress.track(range(start, self.plan.steps), "training masks", self.plan.steps - start)
        folder = self.context.artifacts if self.process.is_main_process else None
        with self.masked.attached(), self._recomputed(), StepLog(folder, start, self.settings.tensorboard) as log:
            for step, batch in zip(steps, batches, strict=False):
                log.write(self._step(step, batch.to(self.model.device)))
                if self.process.is_main_process:
                    self.state.save_sometimes(step + 1, SAVE_SECONDS)
        if self.process.is_main_process and start < self.plan.steps:
            self.state.save("final", self.plan.steps)

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

    def _first_windows(self) -> Tensor:
        """Token ids to find the start from, [windows, window]; the same in every process."""
        blocks = islice(self.blocks, math.ceil(TOKENS / self.plan.window))
        return torch.stack(list(blocks))[:, :-1]

    def _batches(self) -> Iterator[Tensor]:
        """Blocks of this process, [sequences, window + 1] per step."""
        blocks, count, rank = iter(self.blocks), self.process.num_processes, self.process.process_index
        while True:
            everyone = list(islice(blocks, count * self.plan.sequences))
            yield torch.stack(everyone[rank::count])

    def _step(self, step: int, batch: Tensor) -> dict[str, float]:
        """One optimiser step; what the log gets of it."""
        ids, targets = batch[:, :-1], batch[:, 1:]
        p, rate = self.plan.p(self.settings, step), self.plan.rate(self.settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        noise_seed = ((self.plan.seed + 1) * 2**40 + step * 2**10 + self.process.process_index) % 2**64
        with seeded(noise_seed, self.context.device):
            terms = self._terms(ids, targets, p, self.plan.noise(self.settings, step))
            terms.loss.backward()
        self._update(step)
        row: dict[str, float] = {"step": step, "target": p, "learning_rate": rate, "skipped": self.state.skipped}
        row |= terms.row() | {f"tokens.{source}": count for source, count in self.blocks.tokens.items()}
        return row | {"batch_tokens": ids.numel() * self.process.num_processes}

    def _terms(self, ids: Tensor, targets: Tensor, p: float, noise: float) -> objective.Terms:
        """The objective on some tokens [sequences, window]."""
        with torch.no_grad():
            teacher_TD = self._hidden(ids, None) if self.settings.loss == "kd" else None
        self.masked.noise, masks = noise, self.network.draw(noise=noise)
        student_TD = self._hidden(ids, masks)
        valid_T = targets.flatten() != (-1 if self.ignored is None else self.ignored)  # what follows a row is chance
        if teacher_TD is None:
            language = next_token(student_TD[valid_T], targets.flatten()[valid_T], self.decoder.head)
            entropy = None
        else:
            language, entropy = distillation(student_TD[valid_T], teacher_TD[valid_T], self.decoder.head)
        pairs = zip(self.network.mlp_sites, masks, strict=True)
        logits = [site.expert_logits(layer.embeddings_NE) for site, layer in pairs]
        return objective.terms(self.settings, self.decoder.shape, masks, logits, p, language, entropy, noise)

    def _hidden(self, ids: Tensor, masks: list[LayerMasks] | None) -> Tensor:
        """Hidden states after the final norm, [tokens, D]; without masks those of the teacher."""
        self.masked.masks = masks
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)

    def _update(self, step: int) -> None:
        """Average gradients over processes and take the step, unless something is not finite anywhere."""
        gradients = [parameter.grad for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [gradient for gradient in gradients if gradient is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        if self.process.num_processes > 1:
            flat = cast(Tensor, reduce(flat, "mean"))
        if flat.isfinite().all():
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            self.optimizer.step()
            self.state.in_a_row = 0
        else:
            self._skip(step)
        self.optimizer.zero_grad()

    def _skip(self, step: int) -> None:
        self.state.skipped += 1
        self.state.in_a_row += 1
        if self.state.in_a_row >= PATIENCE:
            if self.process.is_main_process:
                self.state.save(f"step-{step + 1:06d}", step + 1)
            raise UserError(
                f"the loss was not finite in {PATIENCE} steps in a row, so training stopped; what was trained before "
                f"is in {self.state.folder}. Use a smaller --set tomoe.learning_rate "
                f"(it is {self.plan.learning_rate:g}), or --dtype float32."
            )

    @contextmanager
    def _recomputed(self) -> Iterator[None]:
        """Activation checkpointing per layer, with the noise of the first pass drawn again."""
        layers = self.decoder.layers if self.settings.checkpointing else []
        for layer in layers:
            layer.module.forward = _checkpointed(layer.module.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.module.forward


def _checkpointed(forward: Any) -> Any:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def optimizer(network: ToMoENetwork, settings: ToMoE) -> torch.optim.AdamW:
    """AdamW on everything trained, routers at their own rate."""
    named = network.trained()
    routers = [parameter for name, parameter in named.items() if ".router." in name]
    others = [parameter for name, parameter in named.items() if ".router." not in name]
    groups = [{"params": others, "factor": 1.0}, {"params": routers, "factor": settings.router_rate}]
    return torch.optim.AdamW(groups, lr=1.0, weight_decay=settings.weight_decay)


def with_mlp_at(p: float, shape: DecoderShape) -> float:
    """The fraction of T_total that is on when MLPs keep p of their neurons and attention is whole."""
    return shape.layers * layer_weights(whole(shape, p), shape) / prunable(shape)


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """The default generators seeded while open, and as they were afterwards."""
    kind = torch.device(device).type
    with torch.random.fork_rng([] if kind == "cpu" else [device], device_type=kind):
        torch.manual_seed(seed)
        yield
