"""Time of a ToMoE training step beside a plain forward pass over the same tokens.

    python -m benchmarks.selfcheck training

A step is a teacher pass, a masked student pass, a backward pass (weights are frozen, so it makes no weight gradients),
three products with the head and the loop around it, in the default preset. The forward pass is the dense model's, with
logits, and takes turns with the steps: before each of them, on an instance that nothing is attached to.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import data, models
from benchmarks.record import device
from methods.base import Budget, Context, Training
from methods.tomoe import ToMoE
from methods.tomoe.training import train

T = TypeVar("T")
MODEL = "smollm2-135m-q4"
TOKENS = (512, 2048)
"""Of the one sequence of a step."""


class Turns:
    """As the progress display of a training run: before every step, runs something else, and times both."""

    def __init__(self, other: Callable[[], object]) -> None:
        self.other = other
        self.seconds: dict[str, list[float]] = {"forward": [], "step": []}

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Pass `items` through; between two of them a step runs."""
        for item in items:
            began = time.perf_counter()
            self.other()
            between = time.perf_counter()
            yield item
            self.seconds["forward"].append(between - began)
            self.seconds["step"].append(time.perf_counter() - between)


def measure(name: str, plain: PreTrainedModel, trained: PreTrainedModel, tokens: int, repeats: int) -> Turns:
    """The turns of a run, after one to warm up."""
    tokenizer = models.load_tokenizer(models.resolve(name).prepare())
    calibration = data.sample_calibration(data.load("wikileads", "calibration"), tokenizer, 1, tokens, seed=0)
    ids = next(calibration.batches(1)).input_ids
    turns = Turns(torch.no_grad()(lambda: plain(input_ids=ids).logits))
    with tempfile.TemporaryDirectory() as scratch:
        granted = Training(steps=repeats + 1, sequences=1, window=tokens)
        context = Context(scratch=Path(scratch), artifacts=Path(scratch), training=granted, progress=turns)
        # No other start: it would take turns of its own before the first step.
        train(ToMoE(start="random"), trained, tokenizer, Budget(ratio=0.6), calibration, context)
    return turns


def report(repeats: int, name: str = MODEL, lengths: Iterable[int] = TOKENS) -> None:
    """Print a line per number of tokens."""
    path = models.resolve(name).prepare()
    plain, trained = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
    print(f"{name}, {plain.dtype}, {plain.config._attn_implementation} attention; one sequence per step")
    print(f"{device('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {repeats} turns")
    for tokens in lengths:
        turns = measure(name, plain, trained, tokens, repeats).seconds
        forward, step = (median(seconds[1:]) for seconds in turns.values())
        print(f"{tokens:6} tokens: forward {forward:.2f} s, step {step:.2f} s, ratio {step / forward:.2f}")
