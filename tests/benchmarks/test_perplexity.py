"""Token perplexity against closed forms and a naive reading of the protocol."""

import math
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import perplexity
from benchmarks.metric import Metric
from benchmarks.perplexity import TooShort, token_losses, window_loss
from methods.base import Silent
from tests.methods.tiny import tiny_model

V = 96


def characters(text, verbose):
    """A tokenizer that has one token per character, with a BOS token (0) before the whole."""
    return {"input_ids": [0] + [ord(letter) % V for letter in text]}


letters: Any = characters


class Table:
    """A model whose logits depend on the input token only: row `token` of a table."""

    device = torch.device("cpu")

    def __init__(self, table):
        self.table = table

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


Scripted: Any = Table


def token_perplexity(*arguments: Any) -> Metric:
    """Of a text, from its windows' losses."""
    return perplexity.token_perplexity(token_losses(*arguments))


def naive(model, ids, window):
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        chunk = torch.tensor(ids[start : start + window])
        with torch.no_grad():
            log_probs = model(chunk[None]).logits[0].float().log_softmax(-1)
        losses += [-float(log_probs[i, chunk[i + 1]]) for i in range(window - 1)]
    return math.exp(sum(losses) / len(losses))


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    metric = token_perplexity(Scripted(torch.zeros(V, V)), letters, "x" * 99, 10, None, Silent())
    assert metric.value == pytest.approx(V)
    assert metric.stderr == pytest.approx(0, abs=1e-6)
    assert metric.n == 10  # 100 tokens with the BOS token


@pytest.mark.parametrize("window", [2, 7, 64])
def test_it_is_the_naive_mean_over_whole_windows(window):
    model, text = tiny_model("llama-gqa"), "In a hole in the ground there lived a hobbit. " * 6
    metric = token_perplexity(model, letters, text, window, None, Silent())
    assert metric.value == pytest.approx(naive(model, letters(text, False)["input_ids"], window), rel=1e-5)


def test_logits_in_small_pieces_make_no_difference(monkeypatch):
    model, ids = tiny_model("qwen2"), torch.arange(50)
    whole = window_loss(model, ids)
    monkeypatch.setattr(perplexity, "CHUNK", 3)
    assert window_loss(model, ids) == pytest.approx(whole, rel=1e-7)


def test_low_precision_logits_are_summed_in_fp32():
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(V)
    expected = -table.double().log_softmax(-1)[ids[:-1], ids[1:]].mean()
    assert window_loss(Scripted(table), ids) == pytest.approx(float(expected), rel=1e-5)


def test_stderr_is_the_delta_method_over_windows():
    # After token t the model gives token 1 a probability of 1/2 and 1/4 for t = 2 and 3.
    table = torch.full((V, V), -100.0)
    table[2, 1], table[2, 4] = math.log(1 / 2), math.log(1 / 2)
    table[3, 1], table[3, 4] = math.log(1 / 4), math.log(3 / 4)
    text = "".join(map(chr, [1, 3, 1, 2, 1, 3, 1]))
    table[0] = table[2]  # the BOS token comes first
    metric = token_perplexity(Scripted(table), letters, text, 2, None, Silent())
    losses = torch.tensor([2.0, 4.0, 2.0, 4.0]).log()
    assert metric.value == pytest.approx(8**0.5)
    assert metric.stderr == pytest.approx(8**0.5 * float(losses.std()) / 2)


def test_one_window_has_no_stderr_and_max_windows_takes_the_first():
    model = tiny_model("llama-gqa")
    one = token_perplexity(model, letters, "abcdefgh" * 9, 8, 1, Silent())
    assert (one.n, one.stderr) == (1, None)
    assert one.value == pytest.approx(naive(model, letters("abcdefg", False)["input_ids"], 8), rel=1e-5)


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(TooShort, match=r"4 tokens, less than one perplexity window of 5.*--tasks"):
        token_perplexity(Scripted(torch.zeros(V, V)), letters, "abc", 5, None, Silent())


def test_a_window_s_sample_names_its_tokens_and_its_loss():
    model = tiny_model("llama-gqa")
    samples = token_losses(model, letters, "abcdefg" + 2 * "hijklmno" + "tail", 8, None, Silent())
    ids = [letters("abcdefg", False)["input_ids"], *2 * [letters("hijklmno", False)["input_ids"][1:]]]
    expected = [sha256(b"".join(id.to_bytes(8, "little") for id in window)).hexdigest() for window in ids]
    assert [sample["hash"] for sample in samples] == expected
    assert [sample["id"] for sample in samples] == [0, 1, 2] and {sample["tokens"] for sample in samples} == {7}
    assert samples[0]["nll"] == pytest.approx(math.log(naive(model, ids[0], 8)), rel=1e-5)
    assert samples[1]["nll"] == samples[2]["nll"] != samples[0]["nll"]
