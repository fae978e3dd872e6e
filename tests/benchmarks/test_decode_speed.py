"""The table of decoding speeds: what is timed against what. No test depends on the clock."""

from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import decode_speed
from benchmarks.decode_speed import Shape

SMALL = Shape("small", 2, 32, 4, 2, 48, 100, tied=False)


@pytest.fixture
def dense() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SMALL.config()).eval()


def test_half_of_everything_is_read(dense: PreTrainedModel) -> None:
    """By hand: what a token multiplies with, in 4 bytes each; a selector is 16 wide."""
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    norms, head, added = 2 * 32, 32 * 100, 8 * 32 + (32 + 1 + 2 + 8) * 16
    assert decode_speed.bytes_read(dense) == 4 * (2 * (block + norms) + 32 + head)
    halved = decode_speed.halved(dense)
    assert decode_speed.bytes_read(halved) == 4 * (2 * (block // 2 + norms + added) + 32 + head)
    assert decode_speed.bytes_read(dense) == 4 * (2 * (block + norms) + 32 + head), "the dense model was changed"


def test_a_tied_table_is_read_whole() -> None:
    tied = AutoModelForCausalLM.from_config(SMALL._replace(tied=True).config())
    assert decode_speed.bytes_read(tied) == 4 * sum(parameter.numel() for parameter in tied.parameters())


def test_turns_decode_what_generation_decodes(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_speed, "PROMPT", 5)
    prompt = torch.randint(100, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        turn = decode_speed.Decoding(dense, prompt)
        made = [int(turn.output.logits[0, -1].argmax())]
        for _ in range(6):
            turn.token()
            made.append(int(turn.output.logits[0, -1].argmax()))
    stock = cast(Any, dense).generate(prompt, max_new_tokens=7, do_sample=False)
    assert made == stock[0, 5:].tolist()
    assert len(turn.seconds) == 6


def test_every_store_is_timed_beside_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_speed, "milliseconds", lambda models, tokens: [6.0, 3.0])
    lines: list[str] = []
    decode_speed.report(2, (SMALL,), lines.append)
    rows = [line.split() for line in lines[-4:]]
    assert [row[:4] for row in rows] == [
        [store, "6.0", "3.0", "2.00"] for store in ("shared", "materialised", "core+rest", "pseudo")
    ]
