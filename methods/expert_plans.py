"""How many experts a dense MLP is cut into, and how many of them a token gets, for an asked share of active parameters.

An MLP of F neurons is cut into E parts, F mod E of them one neuron larger; S parts are shared by all tokens, and of the
other E - S a token gets A (`SxAyEz`). Attention stays whole. With c parameters per neuron, B blocks cut so and r what
routing adds to one of them, a token uses at most

    dense - B (F - n) c + B r,      n neurons of the S + A largest parts,

where the grid is one part in every block; behind a router that reads gate and up of all neurons, c is down's share. The
published number of parts is the default, or less where a part would have fewer than `LEAST_NEURONS`; where none of its
sizes is within the tolerance (8 parts are coarse), it is doubled, and doubled again, as far as parts keep so many.
"""

# Shape suffixes: S tokens, D hidden size.

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from methods import modeling
from methods.allocation import channel_size
from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.errors import UserError
from methods.experts import mlp_inputs
from methods.modeling.shape import DecoderShape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import Decoder, DecoderLayer

GROWTH = (1, 2, 4)
"""What the published number of parts may be multiplied with."""
LEAST_NEURONS = 8
"""Of a part, where nobody asks for a number of parts."""


@dataclass(frozen=True)
class Structure:
    """`SxAyEz`."""

    shared: int
    active: int
    experts: int
    """All parts, shared ones included."""

    def __str__(self) -> str:
        return f"S{self.shared}A{self.active}E{self.experts}"

    @property
    def routed(self) -> int:
        """Parts among which tokens choose."""
        return self.experts - self.shared

    def sizes(self, width: int) -> list[int]:
        """Neurons of every part of an MLP, larger ones first; shared parts are the first ones."""
        size, larger = divmod(width, self.experts)
        return [size + 1] * larger + [size] * (self.experts - larger)

    def shared_neurons(self, width: int) -> int:
        """Neurons of all shared parts."""
        return sum(self.sizes(width)[: self.shared])

    def used_neurons(self, width: int) -> int:
        """Neurons that a token gets, at most."""
        return sum(self.sizes(width)[: self.shared + self.active])


def parse(where: str, text: str) -> tuple[int | None, Structure | None]:
    """The number of experts and, where the text says it, the whole structure: of `E16`, `A4E16`, `S3A3E8` or `auto`.

    Raises:
        UserError: it is none of these, or its numbers do not fit each other.
    """
    if text == "auto":
        return None, None
    match = re.fullmatch(r"(?:(?:S(\d+))?A(\d+))?E(\d+)", text)
    shared, active, experts = (int(number or 0) for number in match.groups()) if match else (0, 0, 0)
    if not experts or (match and match[2] and not 1 <= active <= experts - shared):
        raise UserError(
            f"{where} is {text!r}. It must be auto, E16 (sixteen experts, as many of them active as the ratio allows) "
            "or SxAyEz: x shared and y >= 1 chosen of z experts, x + y <= z, for example S3A3E8 or A4E16."
        )
    return experts, Structure(shared, active, experts) if active else None


@dataclass(frozen=True, kw_only=True)
class ExpertMethod(Method):
    """A method that cuts MLPs into experts and does nothing else."""

    with_shared: ClassVar[bool] = False
    """Whether some parts may be shared by all tokens."""

    experts: str = "auto"
    """`auto`, `E16` (so many experts), or a whole structure such as `S3A3E8`, whose ratio must be the asked one."""

    def __post_init__(self) -> None:
        _, structure = self.asked
        if structure is not None and structure.shared and not self.with_shared:
            raise UserError(
                f"{self.name}.experts is {self.experts!r}, and here no expert is shared. "
                f"Use --set {self.name}.experts=A{structure.active}E{structure.experts}"
            )

    @property
    def asked(self) -> tuple[int | None, Structure | None]:
        """What `experts` says, see `parse`."""
        return parse(f"{self.name}.experts", self.experts)

    @abstractmethod
    def default_experts(self, shape: DecoderShape) -> int:
        """The published number of parts for an MLP of this width."""

    @abstractmethod
    def added(self, shape: DecoderShape, structure: Structure) -> int:
        """Active parameters that one block gets beside its neurons."""

    @abstractmethod
    def convert(
        self, decoder: Decoder, structure: Structure, blocks: range, calibration: Calibration, context: Context
    ) -> None:
        """Make the MLPs of some blocks mixtures, in place."""

    def spared(self, shape: DecoderShape) -> int:
        """Parameters of a neuron that a token does without where it is in none of its experts: all of them."""
        return channel_size(shape)

    def divided(self, parts: int, experts: int) -> Structure:
        """The structure in which a token gets so many of the parts."""
        return Structure(0, parts, experts)

    def told_apart(self, tokens: int) -> int:
        """How many experts so many tokens are enough for: one each."""
        return tokens

    def inputs(
        self,
        decoder: Decoder,
        structure: Structure,
        calibration: Calibration,
        context: Context,
        tokens: int,
        *,
        sequential: bool = False,
    ) -> Iterator[tuple[DecoderLayer, Tensor]]:
        """What `mlp_inputs` yields.

        Raises:
            UserError: also, there are too few tokens for the experts among which they choose.
        """
        for layer, x_SD in mlp_inputs(decoder, calibration, context, tokens, sequential=sequential):
            if self.told_apart(len(x_SD)) < structure.routed:
                raise self._too_few(len(x_SD), tokens, structure)
            yield layer, x_SD

    def _too_few(self, seen: int, asked: int, structure: Structure) -> UserError:
        more, most = "a longer text, such as --calibration NAME:16x512", self.told_apart(seen)
        if seen == asked:
            more = f"--set {self.name}.tokens={max(16384, 4 * structure.routed)}"
        fewer = f", or fewer experts: --set {self.name}.experts=E{most}" if most > 1 else ""
        return UserError(
            f"{self.name} cannot tell {structure.routed} experts apart by {seen} {'token' if seen == 1 else 'tokens'} "
            f"of the calibration text. Use {more}{fewer}"
        )

    def blocks(self, shape: DecoderShape) -> range:
        """The blocks that are converted: all of them."""
        return range(shape.layers)

    def structure(self, shape: DecoderShape, budget: Budget) -> Structure:
        """The structure whose size is nearest to the budget.

        Raises:
            UserError: more experts are asked for than an MLP has neurons, or no block is left to convert.
        """
        asked, whole = self.asked
        if asked is not None and asked > shape.mlp_width:
            raise UserError(
                f"{self.name}.experts asks for {asked} experts, and an MLP of this model has {shape.mlp_width} "
                f"neurons. Use --set {self.name}.experts=E{self.default_experts(shape)}"
            )
        if whole is not None:
            return whole

        def missed(structure: Structure) -> float:
            return abs(budget.achieved(*self._size(shape, structure), shape) - budget.ratio)

        nearest: list[Structure] = []
        for experts in self._numbers(shape, asked):
            nearest.append(min((self.divided(n, experts) for n in range(1, experts + 1)), key=missed))
            if budget.accepts(budget.ratio + missed(nearest[-1])):
                return nearest[-1]
        return min(nearest, key=missed)

    def _numbers(self, shape: DecoderShape, asked: int | None) -> list[int]:
        if asked is not None:
            return [asked]
        most = max(1, shape.mlp_width // LEAST_NEURONS)
        return sorted({min(factor * self.default_experts(shape), most) for factor in GROWTH})

    def _size(self, shape: DecoderShape, structure: Structure) -> tuple[int, int]:
        """Active parameters in all, and those of blocks."""
        gone = (shape.mlp_width - structure.used_neurons(shape.mlp_width)) * self.spared(shape)
        change = len(self.blocks(shape)) * (self.added(shape, structure) - gone)
        return shape.total + change, shape.block + change

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction | None:
        """The size nearest to the ratio, half a part of every MLP off at most; a whole structure has no grid."""
        if budget.ratio == 1:
            return Prediction(active_total=shape.total, active_block=shape.block)
        if not len(self.blocks(shape)):
            raise UserError(f"{self.name} leaves all {shape.layers} blocks of this model dense. Use a deeper model.")
        structure = self.structure(shape, budget)
        total, block = self._size(shape, structure)
        part = structure.sizes(shape.mlp_width)[0] * self.spared(shape) * len(self.blocks(shape))
        step = 0.0 if self.asked[1] else part / budget.dense(shape)
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
        """Make the MLPs of `model` mixtures; its tensors are used up."""
        if budget.ratio == 1:
            return model
        decoder = modeling.Decoder(model)
        shape = decoder.shape
        self.predict(shape, budget)
        structure, default = self.structure(shape, budget), self.default_experts(shape)
        if self.experts == "auto" and structure.experts != default:
            context.note(
                f"MLPs were cut into {structure.experts} parts (usual: {default}) for their width and the ratio"
            )
        self.convert(decoder, structure, self.blocks(shape), calibration, context)
        return modeling.rebuild(model, {"moe_mlp": modeling.expert_record(model)})


def router_size(shape: DecoderShape, structure: Structure, *, mlp: bool) -> int:
    """Parameters of a linear router, or of one with a layer in between."""
    return structure.routed * shape.hidden + mlp * structure.routed**2
