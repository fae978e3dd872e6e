"""LLM Surgeon: remove rows and columns of every projection by curvature, in many small shots, the others making up.

van der Ouderaa et al., "The LLM Surgeon", https://arxiv.org/abs/2312.17244; facts of the released code from
Qualcomm-AI-research/llm-surgeon at 7267344. Every shot, on the model as it is by then,

1. gathers the Kronecker factors of all projections in decoder blocks (`methods.kfac`),
2. computes what every row and column would cost alone (`methods.kronecker_surgery`),
3. removes the cheapest of all of them, raw costs compared, until the model has the size of this shot: sizes fall
   linearly to the asked one,
4. updates the other weights, and declares dead what does nothing any more (`methods.live_parts`).

`methods.surgery_shots` puts them together.

Departs from the released code: sizes are those of what is stored and counted in the end, without anything dead (there:
zeros over weights, where what died this way counts from the next shot on), and the nearest to the shot's goal is taken;
a bias is updated and goes with its row, but is no candidate as a column of its own; one row and one column of every
projection stay; projections of any family; rows and columns without curvature cost nothing instead of going at once;
the calibration is the run's; factors are summed on the device unless `factors=host`. Absent: 2:4 and single weights,
LoRA between shots, factors of rank two.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from methods import modeling
from methods.base import Budget, Calibration, Context, Method, Prediction, Training
from methods.errors import UserError
from methods.gradients import full_precision, only_gradients_of, real_texts
from methods.kronecker_surgery import Update
from methods.lazy import torch
from methods.live_parts import least, pack
from methods.modeling.shape import DecoderShape
from methods.registry import register
from methods.surgery_shots import Patient

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("llm-surgeon", title="LLM Surgeon", reference="https://arxiv.org/abs/2312.17244", family="width")
@dataclass(frozen=True, kw_only=True)
class LLMSurgeon(Method):
    """Remove the cheapest rows and columns of all projections, by Kronecker-factored curvature."""

    shots: int = 40
    """Remove in so many steps, and measure the curvature before each."""
    damp_g: float = 0.01
    """Added to the diagonal of G, as a share of its mean; ten times more as often as the factorization fails."""
    damp_a: float = 0.01
    """To that of A."""
    update: Update = "sum"
    """Add the corrections for rows and for columns (the published script), or make them exact together."""
    max_correlate: int = 0
    """Correct for so many removed rows (or columns) at a time, as if the others did not go; 0: for all together."""
    power_iterations: int = 0
    """Rounds of two passes towards the nearest Kronecker product; 0: independent factors, one pass (published)."""
    factors: Literal["device", "host"] = "device"
    """Where factors are summed: beside the model, or in the host's memory, where copies of them arrive window by window
    (published; LLaMA-2-7B has 70 GB of them)."""

    def __post_init__(self) -> None:
        for name, low in (("shots", 1), ("max_correlate", 0), ("power_iterations", 0)):
            if (value := getattr(self, name)) < low:
                raise UserError(
                    f"llm-surgeon.{name} is {value}; the least is {low}. Type --set llm-surgeon.{name}={low}"
                )
        if not (0 <= self.damp_g <= 1 and 0 <= self.damp_a <= 1):
            raise UserError(
                f"llm-surgeon.damp_g is {self.damp_g} and llm-surgeon.damp_a {self.damp_a}: both are shares of a mean "
                "diagonal between 0 and 1. Published are 0.01 for both."
            )

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The asked size: rows and columns are small, and the nearest to it is taken."""
        dense = budget.dense(shape)
        gone = min(dense - round(budget.ratio * dense), _prunable(shape) - least(shape))
        prediction = Prediction(
            active_total=shape.total - gone, active_block=shape.block - gone, grid_step=_largest(shape) / dense
        )
        budget.require(self.name, prediction, shape, [budget.achieved(shape.total - gone, shape.block - gone, shape)])
        return prediction

    def work(self, shape: DecoderShape, budget: Budget, tokens: int, training: Training) -> float:
        """A gradient of every window in every pass of every shot."""
        return 3.0 * tokens * self.shots * max(1, 2 * self.power_iterations)

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """All shots on `model`, whose tensors are used up. After each a checkpoint is left in the scratch folder.

        The loss, size and threshold of every shot go to `llm-surgeon.json` among the artifacts.
        """
        if budget.ratio == 1:
            return model
        if model.device.type == "mps":
            raise UserError("llm-surgeon computes in fp64, which this device does not have. Use --device cpu.")
        from methods.modeling.content import Dense  # needs torch, and listing methods must not

        shape = modeling.Decoder(model).shape
        goal = _prunable(shape) - (shape.block - self.predict(shape, budget).active_block)
        texts = real_texts(calibration, context.batch_size)
        identity = {"settings": asdict(self), "goal": goal, "calibration": calibration.sha256}
        identity["model"] = Dense(model.state_dict()).identity
        with full_precision(model), only_gradients_of(model, []), torch.no_grad():
            patient = Patient(self, model, context.scratch / "llm-surgeon.safetensors", identity)
            patient.resume()
            to_do, passes = range(len(patient.history) + 1, self.shots + 1), max(1, 2 * self.power_iterations)
            windows = [text for _ in to_do for _ in range(passes) for text in texts]
            stream = context.progress.track(windows, "surgery", len(windows))
            for shot in to_do:
                size = _between(_prunable(shape), goal, shot / self.shots)
                patient.operate([islice(stream, len(texts)) for _ in range(passes)], size)
                patient.save()
        _notes(
            context, patient.history, sum(map(len, texts)), max(shape.hidden, shape.mlp_width, shape.attention_width)
        )
        _report(context, identity | {"shots": patient.history})
        return pack(model, patient.alive)


def _prunable(shape: DecoderShape) -> int:
    """Parameters of all projections in decoder blocks."""
    return shape.layers * (shape.attention - shape.head_norms + shape.mlp)


def _largest(shape: DecoderShape) -> int:
    """Parameters of the largest structure: a neuron, or a row or column of a projection."""
    biases = 2 * shape.mlp_bias
    neuron = (3 if shape.gated else 2) * shape.hidden + biases
    return max(neuron, shape.mlp_width, shape.attention_width, shape.hidden) + 1


def _between(dense: int, goal: int, share: float) -> int:
    return dense - round((dense - goal) * share)


def _notes(context: Context, history: list[dict[str, Any]], tokens: int, width: int) -> None:
    if tokens < width:
        context.note(
            f"{tokens} calibration tokens are fewer than the widest projection has inputs or outputs ({width}): "
            "damping alone makes its curvature invertible"
        )
    if count := sum(shot["strained"] for shot in history):
        context.note(f"the curvature of a projection took more damping than asked, {count} times in all shots")


def _report(context: Context, content: dict[str, Any]) -> None:
    if context.artifacts is not None:
        context.artifacts.mkdir(parents=True, exist_ok=True)
        (context.artifacts / "llm-surgeon.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
