"""Recovery: fine-tuning what a method has compressed, by the same recipe and budget for all methods.

Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) on every projection of every block, whatever its structure:

    y = W x + (alpha / rank) B A dropout(x)        W frozen; A random, B zero at the start

next-token loss on the text that the run calibrates on, for as many tokens as `--budget` grants to methods that train.
Everything else is frozen: embeddings, head, norms, biases, shortcut matrices, and whatever chooses (routers, value
selectors) but for gates that weigh what they choose (`methods.recovery.gates`). Afterwards W + (alpha / rank) B A takes
the place of W, so that the size stays what it was.

Published recipes (from the README and the script of either repository), and where the defaults come from:

    LLM-Pruner, https://arxiv.org/abs/2305.11627: rank 8, alpha 16, dropout 0.05; rate 1e-4 after 100 steps of warm-up,
    then linear to 0; 50,000 texts of Alpaca of at most 256 tokens, twice, 64 a step
    SliceGPT, https://arxiv.org/abs/2401.15024: rank 32, alpha 10, dropout 0.05; rate 2e-4 after 400 steps of warm-up,
    then linear to 0; 8,000 stretches of 1,024 tokens of Alpaca, once, 3 a step

Their "+ fine-tuning" rows are trained on instructions; here it is the calibration text, as for everything else. (The
preset `slicegpt` lacks its second-moment decay of 0.95.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Self

from methods.errors import UserError
from methods.registry import from_text

KINDS = ("lora",)
"""What `--recover` can ask for."""
LIMITS = (
    ("rank", 1, 4096),
    ("alpha", 1e-3, 1e6),
    ("dropout", 0, 0.99),
    ("learning_rate", 1e-9, 10.0),
    ("weight_decay", 0, 1.0),
    ("warmup", 0, 1.0),
    ("clip", 1e-6, 1e6),
    ("steps", 1, 10**9),
)
"""Least and largest value of each number; neither infinity nor a number that is none is between."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How compressed models are fine-tuned: LLM-Pruner's recipe, but for text, batch and number of steps."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "slicegpt": {"rank": 32, "alpha": 10.0, "learning_rate": 2e-4, "weight_decay": 0.01, "warmup": 0.15}
    }

    rank: int = 8
    """Rows of A, columns of B."""
    alpha: float = 16.0
    """Over `rank`, what the adapters' output is multiplied with."""
    dropout: float = 0.05
    """Of the adapters' input while training; the model's own dropout is off."""
    learning_rate: float | None = None
    """Of AdamW at its highest; None: 0.4096 / hidden size, at most 0.01. LLM-Pruner's 1e-4 was for 4,096, and what a
    step changes of W x grows with the number of inputs."""
    weight_decay: float = 0.0
    """Of AdamW, on the adapters."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from 0, linearly; in the others it falls to 0, linearly."""
    clip: float = 1.0
    """Largest norm of the gradient of all adapters."""
    steps: int | None = None
    """Optimiser steps; None: what `--budget` grants, as are sequences and tokens of each."""
    merge: bool = True
    """Add the adapters to the weights. False: keep them in the checkpoint's folder `adapter`, and count them."""
    checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, one more forward pass."""

    def __post_init__(self) -> None:
        for name, low, high in LIMITS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"lora.{name} is {value:g}, which is not between {low:g} and {high:g}. Use --set lora.{name}=VALUE."
                )

    def highest_rate(self, hidden: int) -> float:
        """The highest learning rate, for a model of some hidden size."""
        return self.learning_rate or min(0.01, 0.4096 / hidden)

    def share(self, step: int, steps: int) -> float:
        """What of it a step has: up and down again, and never nothing."""
        rising = max(1.0, self.warmup * steps)
        return (step + 1) / rising if step + 1 < rising else (steps - step) / (steps - rising + 1)

    def record(self) -> dict[str, Any]:
        """What identifies a fine-tuned cell, as JSON."""
        return {"kind": "lora", **asdict(self)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """What `record` wrote."""
        return cls(**{key: value for key, value in record.items() if key != "kind"})


def configure(kind: str, settings: Mapping[str, str]) -> Recovery:
    """The fine-tuning that `--recover` asks for, with the fields that `--set lora.FIELD=VALUE` gives.

    Raises:
        UserError: an unknown field or preset, or a value that the field cannot take.
    """
    return from_text(Recovery, Recovery.presets, kind, settings)


def would_fill_zeros() -> UserError:
    """The error for methods that prune single weights."""
    return UserError(
        "--recover lora cannot fine-tune a model whose single weights were pruned: adapters added to them would fill "
        "the zeros. Leave these methods (magnitude, wanda, sparsegpt, pruner-zero) out of --methods, or leave out "
        "--recover."
    )


def require_package() -> None:
    """Raises UserError where the package that makes the adapters is not installed."""
    if find_spec("peft") is None:
        raise UserError(
            "--recover lora needs the package peft, which is not installed. Type pip install '.[finetune]' in the "
            "project's folder, or leave --recover out."
        )
