"""LLM-Pruner: remove the heads and MLP channels on which the next-token loss depends least, by its gradient.

Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", https://arxiv.org/abs/2305.11627; facts of
the released code from horseee/LLM-Pruner at 128a07d. What must go together is a group of rows and columns:

    head group      a key head, its value head, the query heads that read it (query head q reads key head floor(q / r)),
                    and the columns of the output projection that belong to those
    MLP channel     a row of gate (if there is one) and of up, a column of down
    stream channel  (`mode=channel`) a column of all that reads the residual stream, a row of all that writes to it, an
                    entry of its norms

`methods.importance` has the scores of single rows and columns. A group scores what `reduction` makes of its tensors;
query heads that share a key head are summed first, and a head sums its dimensions. Blocks near both ends stay whole,
the others lose the same share (`methods.allocation`), or, with `ranking=global`, whatever scores lowest among them.
Weights that stay do not change.

Departs from the released code: samples are cut from the run's calibration instead of BookCorpus; the size is solved for
the asked ratio, MLP channels taking up what whole heads cannot (there: the same share of both, rounded); gradients are
fp32 always; `ranking=global` ranks heads among heads and channels among channels, and each block keeps one of both;
norms of a narrower stream are means over the channels that stay, as there. Absent: folding query scores onto key
heads modulo the key width, which pairs the wrong heads; ranges of their own for attention and MLPs (its scripts give
both the same, 4 to 29 of 32; its default is 3 to 30); keeping the first blocks only; recovery by LoRA.
"""

# Shape suffixes: J key heads, r query heads per key head, h head width, F MLP width, D hidden size, M group members.

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from methods import modeling
from methods.allocation import (
    Allocation,
    Kept,
    Scores,
    allocate,
    everything,
    highest,
    narrow,
    predict,
    rebuilt,
    uniform_choice,
)
from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.errors import UserError, overflow
from methods.gradients import gradient_moments, snippets
from methods.importance import WITH_SQUARES, WITHOUT_GRADIENT, Importance, Measure
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register
from methods.sharing import remembered

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import Decoder, DecoderLayer

    Scoring = Callable[[int, Sequence[Parameter], Callable[[Importance], Any]], Any]
    """Step, parameters, and what to make of their importance: the scores, as lists."""

Reduction = Literal["sum", "mean", "max", "prod", "first"]
REDUCTIONS: dict[Reduction, Callable[[Tensor], Tensor]] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
    "prod": lambda scores: scores.prod(0),
    "first": lambda scores: scores[0],
}
"""The scores of a group's members to the group's: [M, ...] to [...]."""


@register("llm-pruner", title="LLM-Pruner", reference="https://arxiv.org/abs/2305.11627", family="width")
@dataclass(frozen=True, kw_only=True)
class LLMPruner(Method):
    """Remove the heads and MLP channels of least importance to the loss, between the first and the last blocks."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"matched": {"samples": None, "tokens": None}}
    """The gradients of all of the run's calibration text, as other methods see it."""
    idle = (
        ({"mode": "channel"}, ("ranking", "protect_first", "protect_last")),
        *(({"importance": measure}, ("samples", "tokens")) for measure in WITHOUT_GRADIENT),
    )

    mode: Literal["block", "channel"] = "block"
    """Remove heads and MLP channels, or channels of the residual stream everywhere."""
    importance: Measure = "param_first"
    """The score of a row or column; the released code's default (its README says param_mix)."""
    reduction: Reduction = "sum"
    """How scores of a group's members become the group's; the first is query, gate (or up), the token table."""
    ranking: Literal["layer", "global"] = "layer"
    """Take the same share of every block, or whatever scores lowest."""
    protect_first: float = 4 / 32
    """Share of the blocks that stay whole at the beginning, rounded to blocks."""
    protect_last: float = 2 / 32
    """Share of the blocks that stay whole at the end."""
    samples: int | None = 10
    """Texts whose gradients are taken; None: as many as there are calibration windows."""
    tokens: int | None = 64
    """Tokens of each; None, or where that is shorter: the longest calibration window."""
    iterative_steps: int = 1
    """Remove in so many steps of equal size, and measure before each."""

    def __post_init__(self) -> None:
        for field, least in (("samples", 1), ("tokens", 2), ("iterative_steps", 1)):
            if (value := getattr(self, field)) is not None and value < least:
                raise UserError(
                    f"llm-pruner.{field} is {value}; the least is {least}. Type --set llm-pruner.{field}={least}"
                )
        shares = (self.protect_first, self.protect_last)
        if not (min(shares) >= 0 and sum(shares) < 1):
            raise UserError(
                f"llm-pruner.protect_first={shares[0]:g} and protect_last={shares[1]:g} are shares of the blocks that "
                "stay whole: none may be negative, together less than 1. "
                "Type --set llm-pruner.protect_first=0.125 llm-pruner.protect_last=0.0625"
            )
        if self.mode == "channel" and self.reduction == "prod":
            raise UserError(
                "llm-pruner.reduction=prod multiplies the scores of every tensor of the model in mode=channel, which "
                "no floating-point number holds. Type --set llm-pruner.reduction=sum"
            )

    def blocks(self, shape: DecoderShape) -> range:
        """The blocks that are pruned, at least one."""
        first = min(round(self.protect_first * shape.layers), shape.layers - 1)
        return range(first, max(shape.layers - round(self.protect_last * shape.layers), first + 1))

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The size nearest to the ratio, half a channel off at most."""
        if self.mode == "channel":
            return predict_stream(self.name, shape, budget)
        return predict(self.name, budget, allocate(shape, budget, self.blocks(shape)))

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """Narrow `model`; its tensors are used up."""
        if budget.ratio == 1:
            return model
        decoder = modeling.Decoder(model)
        self.predict(decoder.shape, budget)

        def scoring(step: int, parameters: Sequence[Parameter], score: Callable[[Importance], Any]) -> Any:
            def measure() -> Any:
                return score(self._importance(model, parameters, calibration, context, step))

            if step > 1:
                return measure()
            return remembered(context, calibration, "importance scores", measure, **dataclasses.asdict(self))

        if self.importance not in WITHOUT_GRADIENT:
            count, length = self._stretches(calibration)
            context.note(f"gradients of {count} stretches of {length} tokens of the calibration text")
        prune = self._prune_blocks if self.mode == "block" else self._prune_stream
        return prune(decoder, decoder.shape, budget, scoring)

    def _stretches(self, calibration: Calibration) -> tuple[int, int]:
        """How many texts, and how many tokens of each."""
        count = calibration.samples if self.samples is None else self.samples
        return count, calibration.window if self.tokens is None else min(self.tokens, calibration.window)

    def _importance(
        self,
        model: PreTrainedModel,
        parameters: Sequence[Parameter],
        calibration: Calibration,
        context: Context,
        step: int,
    ) -> Importance:
        """What rows and columns of some parameters score before a step; each step draws texts of its own."""
        generator = torch.Generator().manual_seed(context.seed + 1_000_003 * (step - 1))
        if self.importance in WITHOUT_GRADIENT:
            return Importance(self.importance, {}, generator)
        ids_NT = snippets(calibration, *self._stretches(calibration), context.batch_size, generator)
        squares = self.importance in WITH_SQUARES
        moments = gradient_moments(model, parameters, ids_NT, context.progress, squares=squares)
        return Importance(self.importance, moments, generator)

    def _prune_blocks(self, decoder: Decoder, shape: DecoderShape, budget: Budget, scoring: Scoring) -> PreTrainedModel:
        goal, reduce = allocate(shape, budget, self.blocks(shape)), REDUCTIONS[self.reduction]
        layers = [decoder.layers[block] for block in goal.blocks]
        choose = {"layer": uniform_choice, "global": global_choice}[self.ranking]

        def score(importance: Importance) -> list[list[list[float]]]:
            scores = (block_scores(layer, shape.head_dim, importance, reduce) for layer in layers)
            return [[part.tolist() for part in both] for both in scores]

        for step in range(1, self.iterative_steps + 1):
            found = scoring(step, [p for layer in layers for p in layer.module.parameters()], score)
            scores = [Scores(*(torch.tensor(part, dtype=torch.float64) for part in both)) for both in found]
            narrow(decoder, goal.blocks, choose(scores, part_way(goal, step / self.iterative_steps)))
        return rebuilt(decoder, goal.blocks)

    def _prune_stream(self, decoder: Decoder, shape: DecoderShape, budget: Budget, scoring: Scoring) -> PreTrainedModel:
        goal, reduce = stream_width(shape, budget), REDUCTIONS[self.reduction]

        def score(importance: Importance) -> list[float]:
            return stream_scores(decoder, importance, reduce).tolist()

        for step in range(1, self.iterative_steps + 1):
            scores_D = torch.tensor(scoring(step, list(decoder.model.parameters()), score), dtype=torch.float64)
            width = between(shape.hidden, goal, step / self.iterative_steps)
            modeling.narrow_residual(decoder.model, highest(scores_D, width))
        return modeling.rebuild(decoder.model, {"narrow_residual": {"width": goal}})


def block_scores(
    layer: DecoderLayer, head_dim: int, importance: Importance, reduce: Callable[[Tensor], Tensor]
) -> Scores:
    """The scores of a block's head groups [J] and MLP channels [F]."""
    query, key, value = (importance.rows(linear) for linear in layer.attention_inputs)
    output = importance.columns(layer.attention_output)
    key_Jh, value_Jh = key.view(-1, head_dim), value.view(-1, head_dim)
    # Query heads J r lie in the order of the key heads that they read.
    query_Jh, output_Jh = (wide.view(len(key_Jh), -1, head_dim).sum(1) for wide in (query, output))
    groups = reduce(torch.stack([query_Jh, key_Jh, value_Jh, output_Jh])).sum(1)
    inputs = [importance.rows(linear) for linear in layer.mlp_inputs]
    channels = reduce(torch.stack([*inputs, importance.columns(layer.mlp_output)]))
    return Scores(_finite(groups), _finite(channels))


def stream_scores(decoder: Decoder, importance: Importance, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """The scores of the residual stream's channels, shape [D]."""
    readers, writers, norms = modeling.stream_parts(decoder)
    members = [importance.columns(reader) for reader in readers]
    members += [importance.rows(module) for module in (*writers, *norms)]
    return _finite(reduce(torch.stack(members)))


def _finite(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise overflow()
    return scores


def global_choice(scores: Sequence[Scores], allocation: Allocation) -> list[Kept]:
    """The groups, and the channels, of highest score of all pruned blocks, and of each block the best one."""
    groups = spread([s.groups for s in scores], allocation.groups * len(scores))
    channels = spread([s.channels for s in scores], allocation.total_channels)
    return [Kept(*both) for both in zip(groups, channels, strict=True)]


def spread(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Per tensor, the places of the `count` highest scores of all tensors; at least the best one of each."""
    best = [torch.zeros_like(part).index_fill(0, highest(part, 1), torch.inf) for part in scores]
    kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
    kept[highest(torch.cat([*scores]) + torch.cat(best), count)] = True
    return [part.nonzero()[:, 0] for part in kept.split([len(part) for part in scores])]


def between(full: int, goal: int, share: float) -> int:
    """A number that lies some share of the way from one to another."""
    return round(full + (goal - full) * share)


def part_way(goal: Allocation, share: float) -> Allocation:
    """An allocation that lies some share of the way from the dense model to another."""
    full = everything(goal.shape, goal.blocks)
    return dataclasses.replace(
        goal,
        groups=between(full.groups, goal.groups, share),
        total_channels=between(full.total_channels, goal.total_channels, share),
    )


def stream_width(shape: DecoderShape, budget: Budget) -> int:
    """The width of the residual stream whose size is nearest to the budget, at least 1: sizes are linear in it."""
    step = _channel(shape, budget)
    surplus = (1 - budget.ratio) * budget.dense(shape)
    return max(shape.hidden - round(surplus / step), 1)


def predict_stream(method: str, shape: DecoderShape, budget: Budget) -> Prediction:
    """The size of the model with the stream of that width.

    Raises:
        UserError: it is not within the budget's tolerance.
    """
    narrower = dataclasses.replace(shape, hidden=stream_width(shape, budget))
    step = _channel(shape, budget) / budget.dense(shape)
    prediction = Prediction(active_total=narrower.total, active_block=narrower.block, grid_step=step)
    budget.require(method, prediction, shape, [budget.achieved(narrower.total, narrower.block, shape)])
    return prediction


def _channel(shape: DecoderShape, budget: Budget) -> int:
    """Parameters of one channel of the stream, in the budget's basis."""
    return budget.dense(shape) - budget.dense(dataclasses.replace(shape, hidden=shape.hidden - 1))
