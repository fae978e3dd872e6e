"""Training blocks: rows with BOS, concatenated by groups, cut, mixed by rows, the same for the same seed."""

from itertools import islice

import pytest
import torch

from methods.errors import UserError
from methods.training.data import ROWS, Blocks
from tests.methods.training.small import WORDS, sentences, tokenizer


def test_blocks_are_the_rows_of_a_group_cut_and_the_rest_dropped() -> None:
    tokens = tokenizer()
    rows = [" ".join(WORDS[:7]) for _ in range(ROWS)]  # all alike, so that their order does not matter
    blocks = list(islice(Blocks({"a": rows}, tokens, 31, 0), 12))
    ids = [0, *(index + 3 for index in range(7))] * ROWS
    group = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    assert [block.tolist() for block in blocks] == group  # 400 tokens: 12 blocks of 32, 16 tokens dropped


def test_same_seed_same_stream() -> None:
    def first(seed: int) -> torch.Tensor:
        return torch.stack(list(islice(Blocks({"a": sentences()}, tokenizer(), 15, seed), 30)))

    assert first(0).equal(first(0))
    assert not first(0).equal(first(1))


def test_sources_are_mixed_by_rows_and_their_tokens_counted() -> None:
    short, long = [" ".join(WORDS[:3])] * 40, [" ".join(WORDS[:30])] * 40
    blocks = Blocks({"short": short, "long": long}, tokenizer(), 15, 0)
    list(islice(blocks, 1500))
    rows = blocks.tokens["short"] / 4, blocks.tokens["long"] / 31
    assert rows[0] / sum(rows) == pytest.approx(0.5, abs=0.05)


def test_a_group_shorter_than_a_block_takes_more_rows() -> None:
    blocks = Blocks({"a": ["w1 w2"] * 400}, tokenizer(), 511, 0)
    assert [len(block) for block in islice(blocks, 3)] == [512] * 3


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(UserError, match="calibration text b has no tokens"):
        Blocks({"a": sentences(), "b": []}, tokenizer(), 15, 0)


def test_a_text_shorter_than_a_block_is_refused() -> None:
    with pytest.raises(UserError, match=r"shorter than one training block of 65 tokens.*longer text"):
        Blocks({"a": ["w1 w2 w3"] * 5}, tokenizer(), 64, 0)
