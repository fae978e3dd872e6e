"""Pruning single weights: patterns, their sizes, masks from scores, and what methods of this kind share.

A method scores every weight of the projections of a block (R outputs, C inputs), and keeps the highest

    2:4, or any n:m     n of every m aligned inputs of an output (C must be a multiple of m): share n / m
    unstructured        s R C, with s solved for the asked share of active parameters; among which weights they are
                        compared is the method's (an output's, a block of columns, the matrix)

Among equals the first stay, in the order of the matrix. Embeddings, head, norms and biases stay as they are, and a
weight that is kept counts as a parameter, one that is not does not.
"""

# Shape suffixes: R outputs, C inputs, G groups of W weights.

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods import modeling
from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.errors import UserError, overflow
from methods.lazy import torch
from methods.modeling.shape import DecoderShape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import Decoder, DecoderLayer

UNSTRUCTURED = "unstructured"


def group_of(pattern: str) -> tuple[int, int] | None:
    """(n, m) of a pattern `n:m`, None of `unstructured`.

    Raises:
        UserError: it is neither, or keeps nothing or everything.
    """
    n, _, m = pattern.partition(":")
    if pattern != UNSTRUCTURED and not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise UserError(
            f"the pattern {pattern!r} is neither {UNSTRUCTURED!r} nor n:m with n of every m weights kept, 0 < n < m. "
            "Type for example 2:4."
        )
    return None if pattern == UNSTRUCTURED else (int(n), int(m))


@dataclass(frozen=True)
class Density:
    """How many weights of every projection stay."""

    share: float
    group: tuple[int, int] | None
    """n of every m aligned inputs; None: wherever they are."""

    def count(self, rows: int, columns: int) -> int:
        """Kept weights of a matrix [rows, columns], at least one."""
        return max(1, round(self.share * rows * columns))

    def mask(self, scores_RC: Tensor) -> Tensor:
        """The highest scores of every group, or else of every row: bool [R, C]."""
        return self.highest(scores_RC, self.count(*scores_RC.shape))

    def highest(self, scores_RC: Tensor, count: int) -> Tensor:
        """The same with the number of weights to keep where there are no groups.

        Raises:
            UserError: scores are not numbers.
        """
        if not scores_RC.isfinite().all():
            raise overflow()
        if self.group is None:
            return highest_of_rows(scores_RC, count)
        n, m = self.group
        scores_GW = scores_RC.reshape(-1, m)
        return highest_of_rows(scores_GW, n * len(scores_GW)).view(scores_RC.shape)


def highest_of_rows(scores_GW: Tensor, count: int) -> Tensor:
    """The `count` highest scores, equally many of every row (one more of the first ones): bool [G, W]."""
    each, rest = divmod(count, len(scores_GW))
    order_GW = scores_GW.argsort(dim=1, descending=True, stable=True)
    mask_GW = torch.zeros_like(scores_GW, dtype=torch.bool).scatter_(1, order_GW[:, :each], True)
    mask_GW[:rest].scatter_(1, order_GW[:rest, each : each + 1], True)
    return mask_GW


def projections(shape: DecoderShape) -> dict[str, tuple[int, int]]:
    """The matrices of a block that are pruned, by role: outputs and inputs."""
    D, A, K, F = shape.hidden, shape.attention_width, shape.kv_width, shape.mlp_width
    attention = {"query": (A, D), "key": (K, D), "value": (K, D), "output": (D, A)}
    return {**attention, **({"gate": (F, D)} if shape.gated else {}), "up": (F, D), "down": (D, F)}


def prunable(shape: DecoderShape) -> int:
    """Weights of these matrices in all blocks."""
    return shape.layers * sum(rows * columns for rows, columns in projections(shape).values())


def groups(layer: DecoderLayer) -> list[list[str]]:
    """Names of the same projections in a block, those together that read the same input, in the order of the pass."""
    family = layer.family
    mlp = [name for name in (family.gate, family.up) if name]
    return [[family.query, family.key, family.value], [family.output], mlp, [family.down]]


@dataclass(frozen=True, kw_only=True)
class WeightPruning(Method):
    """A method that keeps some weights of every projection."""

    pattern: str = "2:4"
    """`n:m` keeps n of every m aligned weights, whatever the ratio says; `unstructured` as many as the ratio asks."""

    def __post_init__(self) -> None:
        group_of(self.pattern)

    def density(self, shape: DecoderShape, budget: Budget) -> Density:
        """How much stays.

        Raises:
            UserError: inputs of a projection cannot be divided into groups.
        """
        if group := group_of(self.pattern):
            for role, (_, columns) in projections(shape).items():
                if columns % group[1]:
                    raise UserError(
                        f"{self.name} cannot keep {self.pattern} of the {role} projection: it reads {columns} inputs, "
                        f"no multiple of {group[1]}. Use --set {self.name}.pattern={UNSTRUCTURED}"
                    )
            return Density(group[0] / group[1], group)
        return Density(1 - (1 - budget.ratio) * budget.dense(shape) / prunable(shape), None)

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """Of n:m the one size there is, else the size to half a weight of every projection."""
        if budget.ratio == 1:
            return Prediction(active_total=shape.total, active_block=shape.block)
        density, matrices = self.density(shape, budget), projections(shape).values()
        gone = shape.layers * sum(rows * columns - density.count(rows, columns) for rows, columns in matrices)
        total, block = shape.total - gone, shape.block - gone
        step = 0 if density.group else shape.layers * len(matrices) / budget.dense(shape)
        prediction = Prediction(active_total=total, active_block=block, grid_step=step)
        budget.require(self.name, prediction, shape, [budget.achieved(total, block, shape)])
        return prediction

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """Prune `model`, whose tensors are used up."""
        if budget.ratio == 1:
            return model
        decoder = modeling.Decoder(model)
        self.predict(decoder.shape, budget)
        self.prune(decoder, self.density(decoder.shape, budget), calibration, context)
        sparse, pruned = modeling.runs_sparse(model)
        if sparse < pruned:
            context.note(
                f"{pruned - sparse} of {pruned} pruned projections are multiplied as dense matrices with zeros, so no "
                "speed-up of these is to be expected: there are kernels for 2:4 in float16 and bfloat16 on CUDA "
                "devices with sparse tensor cores, for multiples of 32 outputs and 64 inputs"
            )
        return modeling.rebuild(model, {"sparse_linears": modeling.sparse_record(model)})

    @abstractmethod
    def prune(self, decoder: Decoder, density: Density, calibration: Calibration, context: Context) -> None:
        """Make every projection of the blocks sparse, in place (`modeling.sparsify`)."""
