"""What a compression method is: the `Method` interface, and what it is given (budget, calibration, context)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from methods.errors import UserError
from methods.modeling.shape import DecoderShape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
DEFAULT_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The size a method will reach, known from shapes alone."""

    active_total: int
    """Parameters of the compressed model that a token's forward pass uses, embeddings and head included."""
    active_block: int
    """The part of them inside decoder blocks."""
    grid_step: float = 0.0
    """The method's smallest size step, as a share of the dense model in the asked basis (0: continuous)."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The asked share of active parameters."""

    ratio: float
    """Active parameters of the compressed model / parameters of the dense one, in (0, 1]."""
    basis: Literal["total", "block"] = "total"
    """Count everything, or decoder blocks only."""
    tolerance: float | None = None
    """Largest accepted difference from `ratio`; None means 0.01 or one step of the method's grid."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"ratio {self.ratio} is outside (0, 1]. It is the share that stays: type --ratios 0.5")

    def dense(self, shape: DecoderShape) -> int:
        """Parameters of the dense model in the asked basis."""
        return shape.total if self.basis == "total" else shape.block

    def achieved(self, active_total: int, active_block: int, shape: DecoderShape) -> float:
        """The ratio that a pair of counts amounts to in the asked basis."""
        return (active_total if self.basis == "total" else active_block) / self.dense(shape)

    def accepts(self, achieved: float, grid_step: float = 0.0) -> bool:
        """Whether an achieved ratio is on budget."""
        tolerance = max(DEFAULT_TOLERANCE, grid_step) if self.tolerance is None else self.tolerance
        return abs(achieved - self.ratio) <= tolerance + 1e-12

    def require(self, method: str, prediction: Prediction, shape: DecoderShape, neighbours: Iterable[float]) -> None:
        """Reject a ratio that the method's nearest size misses.

        Args:
            neighbours: the ratios the method can reach nearest to the asked one, for the message.
        """
        achieved = self.achieved(prediction.active_total, prediction.active_block, shape)
        if self.accepts(achieved, prediction.grid_step):
            return
        near = sorted({round(ratio, 4) for ratio in neighbours})
        raise UserError(
            f"ratio {self.ratio:g} is not reachable for {method}: the nearest sizes it can make keep "
            f"{' or '.join(f'{ratio:.4f}' for ratio in near)} of the {self.basis} parameters. Use --ratios "
            f"{' '.join(f'{ratio:g}' for ratio in near)}, or --ratio-tolerance "
            f"{abs(achieved - self.ratio) + 0.0005:.3f} to accept the nearest."
        )


class Batch(NamedTuple):
    """One batch of calibration text."""

    input_ids: Tensor
    """Token ids, int64, shape [B, T]."""
    mask: Tensor | None
    """True where a token is real, shape [B, T]; None when nothing is padding."""


@runtime_checkable
class Calibration(Protocol):
    """A named, hashed, seeded sample of text, the same for every method of a run. Never test data."""

    @property
    def name(self) -> str:
        """The source."""
        ...

    @property
    def sha256(self) -> str:
        """Of the token ids."""
        ...

    @property
    def samples(self) -> int:
        """Windows."""
        ...

    @property
    def window(self) -> int:
        """Tokens per window."""
        ...

    def batches(self, size: int) -> Iterator[Batch]:
        """The sample in batches of at most `size` windows, always in the same order."""
        ...

    def rows(self) -> Mapping[str, Sequence[str]]:
        """All text the sample was drawn from, for methods that train: the non-empty rows of every source, by name."""
        ...


class Progress(Protocol):
    """Somewhere to show that long work advances."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Pass `items` through, showing rate and time left."""
        ...


class Silent:
    """Progress that shows nothing."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Pass `items` through."""
        yield from items


@dataclass(frozen=True, kw_only=True)
class Training:
    """How much a method that trains may spend; the others ignore it."""

    steps: int = 10_000
    """Optimiser steps."""
    sequences: int = 1
    """Sequences per step."""
    window: int = 2048
    """Tokens per sequence."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where and how a method runs."""

    device: str = "cpu"
    """Where the model lies, and where methods compute."""
    seed: int = 0
    batch_size: int = 8
    """Calibration windows per forward pass."""
    scratch: Path
    """A folder (to be made when needed) that survives a kill, for the checkpoints of methods that train."""
    shared: Path | None = None
    """A folder (likewise) for what other cells of the same model, text and seed can use, see `methods.sharing`; None:
    nothing is shared."""
    training: Training = field(default_factory=Training)
    artifacts: Path | None = None
    """A folder that outlives the run, for what a method leaves to be analysed (training.csv); None: keep nothing."""
    progress: Progress = field(default_factory=Silent)
    notes: list[str] = field(default_factory=list)
    """What the reader of the result must know; see `note`."""

    def note(self, text: str) -> None:
        """Tell the reader of the result, once, what was not as usual: a fallback, a damping that had to grow."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class AnyBut:
    """Of a field in `Method.idle`: all values but one."""

    value: Any


class Method(ABC):
    """A way to compress a model: a frozen dataclass whose fields are its hyperparameters."""

    name: ClassVar[str]
    title: ClassVar[str]
    """As papers write it."""
    reference: ClassVar[str]
    """Link to the paper."""
    family: ClassVar[str]
    """What it removes: `dense` (nothing), `depth`, `width`, `semi-structured` or `moe`."""
    idle: ClassVar[Sequence[tuple[Mapping[str, Any], Collection[str]]]] = ()
    """Values of some fields (or `AnyBut` one), and the fields that have no effect beside them."""
    streams: ClassVar[bool] = False
    """Whether it works block by block and without gradients, so that blocks may wait in host memory
    (`methods.modeling.residence`) where a model is larger than the device."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings beside the defaults (`--set METHOD.preset=NAME`), for example those of a publication."""

    def check(self, given: Collection[str]) -> None:
        """Refuse settings that somebody gave although they have no effect beside the others (`idle`).

        Args:
            given: names of the fields that were set on the command line, not by a preset.

        Raises:
            UserError: one of them is idle.
        """
        for causes, names in self.idle:
            if all(self._has(name, value) for name, value in causes.items()):
                for name in sorted({*names} & {*given}):
                    value, *beside = (f"{self.name}.{key}={self._typed(key)}" for key in (name, *causes))
                    raise UserError(
                        f"{value} has no effect beside {' and '.join(beside)}. Leave one of them out of --set."
                    )

    def _has(self, name: str, value: Any) -> bool:
        found = getattr(self, name)
        return found != value.value if isinstance(value, AnyBut) else found == value

    def _typed(self, name: str) -> str:
        """The value of a field as one types it: truth values and none in small letters."""
        value = getattr(self, name)
        return str(value).lower() if value is None or isinstance(value, bool) else str(value)

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction | None:
        """The size this method will reach, from shapes alone and without torch; None when only running it tells.

        Raises:
            UserError: no size this method can make is within the budget's tolerance.
        """
        return None

    def work(self, shape: DecoderShape, budget: Budget, tokens: int, training: Training) -> float:
        """Tokens that compressing puts through the model, for the plan's estimate of time; one that is also put back
        (a gradient) counts three times.

        Args:
            tokens: of the calibration windows.
        """
        return 3.0 * tokens

    @abstractmethod
    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """The compressed model. May use up `model`; at ratio 1 it is `model`, unchanged.

        `model` is dense, in evaluation mode and on `context.device`; of methods that stream, blocks may be on the host.

        Raises:
            UserError: the model, the ratio or the calibration does not suit this method.
        """
