"""Training on tiny random models: a tokenizer, calibration text and contexts for the tests."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from methods.base import Batch, Context, Training
from tests.methods.tiny import SIZES, RandomCalibration

WORDS = [f"w{number}" for number in range(SIZES["vocab_size"] - 3)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... as tokens 3, 4, ...; <s> is 0."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {word: index + 3 for index, word in enumerate(WORDS)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentences(count: int = 60, seed: int = 0) -> list[str]:
    """Rows of random words."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(WORDS), (count, 20), generator=generator)
    return [" ".join(WORDS[index] for index in row) for row in draws]


@dataclass(frozen=True)
class SmallCalibration(RandomCalibration):
    """Random windows, and rows of random words by source."""

    sources: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"words": sentences()})

    def rows(self) -> Mapping[str, Sequence[str]]:
        return self.sources

    def batches(self, size: int) -> Iterator[Batch]:
        return super().batches(size)


def context(folder: Path, *, steps: int = 4, seed: int = 0, artifacts: Path | None = None) -> Context:
    """Two sequences of 16 tokens per step."""
    training = Training(steps=steps, sequences=2, window=16)
    return Context(scratch=folder, seed=seed, training=training, artifacts=artifacts)
