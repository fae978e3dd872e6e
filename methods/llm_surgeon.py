"""LLM Surgeon: remove rows and columns of every projection by curvature, in many small shots, the others making up.

van der Ouderaa et al., "The LLM Surgeon", https://arxiv.org/abs/2312.17244; facts of the released code from
Qualcomm-AI-research/llm-surgeon at 7267344. Every shot, on the model as it is by then,

1. gathers the Kronecker factors of all projections in decoder blocks (`methods.kfac`),
2. computes what every row and column would cost alone (`methods.kronecker_surgery`),
3. removes the cheapest of all of them, raw costs compared, until the model has the size of this shot: sizes fall
   linearly to the asked one,
4. updates the other weights, and declares dead what does nothing any more (`methods.live_parts`).

Departs from the released code: sizes are those of what is stored and counted in the end, without anything dead (there:
zeros over weights, where what died this way counts from the next shot on), and the nearest to the shot's goal is taken;
a bias is updated and goes with its row, but is no candidate as a column of its own; one row and one column of every
projection stay; projections of any family; rows and columns without curvature cost nothing instead of going at once;
the calibration is the run's. Absent: 2:4 and single weights, LoRA between shots, factors of rank two.
"""

# Shape suffixes: R rows, C columns (with the bias).

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from methods import modeling
from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.errors import UserError
from methods.gradients import full_precision, only_gradients_of, real_texts
from methods.kfac import Curvature, Factors
from methods.kronecker_surgery import Surgery, Update, write
from methods.lazy import torch
from methods.live_parts import (
    Block,
    Part,
    alive_without,
    bury,
    cheapest,
    least,
    pack,
    projections,
    protected,
    stored,
    whole,
)
from methods.modeling.shape import DecoderShape
from methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn
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
        shape = modeling.Decoder(model).shape
        goal = _prunable(shape) - (shape.block - self.predict(shape, budget).active_block)
        texts = real_texts(calibration, context.batch_size)
        identity = {"settings": asdict(self), "goal": goal, "calibration": calibration.sha256}
        with full_precision(model), only_gradients_of(model, []), torch.no_grad():
            patient = Patient(self, model, context.scratch / "llm-surgeon.safetensors", identity)
            patient.resume()
            for shot in range(len(patient.history) + 1, self.shots + 1):
                patient.operate(texts, _between(_prunable(shape), goal, shot / self.shots), context)
                patient.save()
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
        """Of every finished shot: the loss before it, what it left, what the dearest part that went was to cost, and
        how many projections took more damping than asked."""

    def operate(self, texts: Sequence[Tensor], goal: int, context: Context) -> None:
        """One shot.

        Args:
            goal: parameters of all projections after it.
        """
        factors, loss = self._curvature(texts, context)
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

    def _curvature(self, texts: Sequence[Tensor], context: Context) -> tuple[list[Factors], float]:
        """Of every site, and the loss."""
        device = self._model.device if self._settings.factors == "device" else torch.device("cpu")
        curvature = Curvature(self._model, [linear for *_, linear in self._sites()], device)
        passes = max(1, 2 * self._settings.power_iterations)
        label = f"shot {len(self.history) + 1} of {self._settings.shots}"
        tracked = [context.progress.track(texts, label, len(texts)) for _ in range(passes)]
        factors = curvature.nearest(tracked) if self._settings.power_iterations else curvature.independent(*tracked)
        return factors, curvature.loss

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


def _report(context: Context, content: dict[str, Any]) -> None:
    if context.artifacts is not None:
        context.artifacts.mkdir(parents=True, exist_ok=True)
        (context.artifacts / "llm-surgeon.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
