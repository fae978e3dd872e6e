"""Training (ToMoE, section "Training" and appendix): frozen weights, self-distillation in place, AdamW.

A step: the dense model runs without masks (teacher, no gradient), one draw of masks is made, the masked model runs
(student), and the objective's gradient reaches the routers, projections and the hypernetwork. `methods.training` has
the loop around it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.base import Budget, Calibration, Context
from methods.errors import UserError
from methods.modeling.content import Dense
from methods.modeling.decoder import Decoder
from methods.modeling.shape import DecoderShape
from methods.tomoe import objective
from methods.tomoe.accounting import layer_weights, prunable, whole
from methods.tomoe.masking import MaskedDecoder
from methods.tomoe.network import LayerMasks, ToMoENetwork
from methods.tomoe.start import TOKENS, begin
from methods.training.data import Blocks
from methods.training.loop import Group, Loop, LoopSettings
from methods.training.losses import distillation, next_token
from methods.training.recomputation import recomputed
from methods.training.seeding import seeded

if TYPE_CHECKING:
    from methods.tomoe.method import ToMoE


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
        generator = torch.Generator().manual_seed(context.seed)
        with seeded(context.seed, context.device):
            self.network = ToMoENetwork(shape, settings, settings.width(shape), generator).to(model.device)
        self.masked = MaskedDecoder(self.decoder, self.network)
        self.blocks = Blocks(calibration.rows(), tokenizer, self.plan.window, context.seed)
        self.loop = self._loop(calibration)

    def _loop(self, calibration: Calibration) -> Loop:
        settings, plan = self.settings, self.plan
        mathematics = {k: v for k, v in asdict(settings).items() if k not in ("checkpointing", "tensorboard")}
        identity = {"settings": mathematics, "budget": asdict(plan), "model": Dense(self.model.state_dict()).identity}
        how = LoopSettings(
            name="tomoe",
            label="training masks",
            remedy=f"Use a smaller --set tomoe.learning_rate (it is {plan.learning_rate:g}), or --dtype float32.",
            steps=plan.steps,
            sequences=plan.sequences,
            seed=plan.seed,
            weight_decay=settings.weight_decay,
            tensorboard=settings.tensorboard,
        )
        return Loop(
            how,
            groups(self.network, settings),
            self._loss,
            lambda step: plan.rate(settings, step),
            self.blocks,
            self.context,
            identity | {"calibration": calibration.sha256},
            dict(self.network.named_buffers()),
        )

    def run(self) -> None:
        """Train to the last step, from the latest checkpoint if there is one."""
        self.model.requires_grad_(False)
        layers = self.decoder.layers if self.settings.checkpointing else []
        with self.masked.attached(), recomputed(layers):
            self.loop.run(self._begin)

    def _begin(self) -> None:
        if self.settings.start == "energy":
            begin(self.network, self.decoder, self.plan.target, self._first_windows(), self.context)

    def _first_windows(self) -> Tensor:
        """Token ids to find the start from, [windows, window]; the same in every process."""
        blocks = islice(self.blocks, math.ceil(TOKENS / self.plan.window))
        return torch.stack(list(blocks))[:, :-1]

    def _loss(self, step: int, batch: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The objective of a step on its blocks [sequences, window + 1], and what the log gets of it."""
        p, noise = self.plan.p(self.settings, step), self.plan.noise(self.settings, step)
        terms = self._terms(batch[:, :-1], batch[:, 1:], p, noise)
        return terms.loss, {"target": p, **terms.row()}

    def _terms(self, ids: Tensor, targets: Tensor, p: float, noise: float) -> objective.Terms:
        """The objective on some tokens [sequences, window]."""
        with torch.no_grad():
            teacher_TD = self._hidden(ids, None) if self.settings.loss == "kd" else None
        self.masked.noise, masks = noise, self.network.draw(noise=noise)
        student_TD = self._hidden(ids, masks)
        valid_T = self.blocks.predictable(targets.flatten())
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


def groups(network: ToMoENetwork, settings: ToMoE) -> list[Group]:
    """Everything trained, routers at their own rate."""
    named = network.trained()
    routers = {name: parameter for name, parameter in named.items() if ".router." in name}
    others = {name: parameter for name, parameter in named.items() if ".router." not in name}
    return [Group(others), Group(routers, settings.router_rate)]


def with_mlp_at(p: float, shape: DecoderShape) -> float:
    """The fraction of T_total that is on when MLPs keep p of their neurons and attention is whole."""
    return shape.layers * layer_weights(whole(shape, p), shape) / prunable(shape)
