"""Training text: rows of every source with equal chance, tokenised, joined and cut into blocks (ToMoE, appendix).

A row gets the tokenizer's own BOS in front (some have none); 50 rows are concatenated and cut into blocks of T + 1
tokens, the rest is dropped. Attention crosses rows within a block.

Departs from the released code: empty rows are dropped, BOS is not masked out of attention, and a group that is shorter
than a block takes more rows instead of padding. Sources are mixed by rows, so short rows give few tokens:
`Blocks.tokens` counts what each source gave.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from methods.errors import UserError

ROWS = 50
"""Rows that are concatenated before they are cut."""


class Blocks:
    """An endless stream of blocks of T + 1 token ids; every iteration over it begins anew, and alike."""

    tokens: dict[str, int]
    """What each source gave to the latest iteration."""

    def __init__(
        self, rows: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, window: int, seed: int
    ) -> None:
        """Raises UserError when all rows of the text together are shorter than one block."""
        self._rows, self._tokenizer, self._length, self._seed = rows, tokenizer, window + 1, seed
        if empty := [name for name, texts in rows.items() if not any(map(self._encode, texts))]:
            raise UserError(f"the calibration text {empty[0]} has no tokens. Use another text (--calibration).")
        lengths = accumulate(len(self._encode(text)) for texts in rows.values() for text in texts)
        if not any(length >= self._length for length in lengths):
            raise UserError(
                f"the calibration text is shorter than one training block of {self._length} tokens. "
                "Use a longer text (--calibration), or a smaller --budget."
            )

    @property
    def sha256(self) -> str:
        """Of all rows and the names of their sources."""
        digest = hashlib.sha256()
        for name, texts in self._rows.items():
            for text in (name, *texts):
                digest.update(f"{len(text)} {text}".encode())
        return digest.hexdigest()

    def predictable(self, targets: Tensor) -> Tensor:
        """Which of some tokens, of any shape, a model can learn to predict: the BOS after a row comes by chance."""
        bos: Any = self._tokenizer.bos_token_id
        return targets != (-1 if bos is None else bos)

    def __iter__(self) -> Iterator[Tensor]:
        self.tokens, chance = dict.fromkeys(self._rows, 0), random.Random(self._seed)
        sources = {name: _shuffled_forever(texts, chance) for name, texts in self._rows.items()}
        while True:
            group: list[int] = []
            count = 0
            while count < ROWS or len(group) < self._length:
                name = chance.choice(list(sources))
                ids = self._encode(next(sources[name]))
                self.tokens[name] += len(ids)
                group += ids
                count += 1
            yield from torch.tensor(group[: len(group) // self._length * self._length]).view(-1, self._length)

    def _encode(self, text: str) -> list[int]:
        encoded: Any = self._tokenizer(text, add_special_tokens=False, verbose=False)
        bos: Any = self._tokenizer.bos_token_id
        return [*([] if bos is None else [bos]), *encoded["input_ids"]]


def _shuffled_forever(texts: Sequence[str], chance: random.Random) -> Iterator[str]:
    """The rows in random order, again and again."""
    order = list(range(len(texts)))
    while True:
        chance.shuffle(order)
        yield from (texts[index] for index in order)
