"""The speed task: what is run, in which order, and what is made of the timings. No test depends on the clock."""

from dataclasses import replace
from statistics import median

import pytest
import torch

from benchmarks import speed
from benchmarks.presets import PRESETS
from benchmarks.progress import Tracker
from methods.base import Silent
from tests.methods.tiny import tiny_model

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa", dtype=torch.float32)


@pytest.fixture
def timings(monkeypatch):
    """Replaces the clockwork: the n-th call of `run` is n tokens per second fast; returns the list of calls."""
    calls = []

    def run(model, prompt, new_tokens):
        calls.append((model, tuple(prompt.shape), new_tokens))
        return speed.Timing(prefill=len(calls), decode=10 * len(calls))

    monkeypatch.setattr(speed, "run", run)
    return calls


def test_a_run_is_one_prefill_and_a_step_per_token(model):
    shapes = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    timing = speed.run(model, torch.zeros(3, 5, dtype=torch.int64), 4)
    hook.remove()
    assert shapes == [(3, 5)] + [(3, 1)] * 4
    assert timing.prefill > 0 and timing.decode > 0


def test_decoding_is_greedy_and_uses_the_cache(model):
    tokens = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0]))
    prompt = torch.tensor([[5, 6, 7]])
    speed.run(model, prompt, 6)
    hook.remove()
    whole = torch.cat(tokens, dim=1)
    with torch.no_grad():
        expected = model(whole).logits.argmax(-1)
    assert whole[:, 3:].equal(expected[:, 2:-1])


def test_models_take_turns_and_the_first_turn_does_not_count(model, timings):
    dense = tiny_model("llama-mha", dtype=torch.float32)
    metrics = speed.measure(model, dense, SMOKE, Silent())
    assert [call[0] for call in timings] == [model, dense] * 4
    own, other = [3, 5, 7], [4, 6, 8]
    assert metrics["speed/prefill_tokens_per_s@b1"].value == median(own)
    assert metrics["speed/decode_tokens_per_s@b1"].value == 10 * median(own)
    ratio = metrics["speed/decode_tokens_per_s_vs_dense@b1"]
    assert (ratio.value, ratio.n) == (median(own) / median(other), 3)


def test_the_dense_model_is_not_compared_with_itself(model, timings):
    metrics = speed.measure(model, None, SMOKE, Silent())
    assert not [name for name in metrics if "vs_dense" in name]
    assert len(timings) == 4


def test_prompt_and_new_tokens_fit_the_model(model, timings):
    speed.measure(model, None, replace(SMOKE, speed_prompt=4096), Silent())
    assert timings[0][1:] == ((1, 64 - SMOKE.speed_new_tokens), SMOKE.speed_new_tokens)


def test_progress_counts_every_repeat(model, timings):
    events = []
    speed.measure(model, None, SMOKE, Tracker(events.append))
    assert (events[-1].done, events[-1].total, events[-1].finished) == (4, 4, True)


def test_weights_count_tied_matrices_once(model):
    tied = tiny_model("llama-tied", dtype=torch.float32)
    assert speed.weights_bytes(model) - speed.weights_bytes(tied) == 96 * 32 * 4


@pytest.mark.skipif(not speed.CLEAR_PEAK.exists(), reason="the system does not tell peak memory")
def test_peak_memory_sees_what_was_freed_again():
    before = speed._reset_peak(torch.device("cpu"))
    torch.ones(16 << 20).sum()
    peak = speed._peak(torch.device("cpu"))
    assert before is not None and peak is not None
    assert 60 << 20 < peak - before < 200 << 20


def test_peak_memory_is_left_out_where_it_cannot_be_measured(model, timings, monkeypatch, tmp_path):
    assert "speed/peak_bytes@b1" in speed.measure(model, None, SMOKE, Silent()) or not speed.CLEAR_PEAK.exists()
    monkeypatch.setattr(speed, "CLEAR_PEAK", tmp_path / "missing" / "clear_refs")
    assert "speed/peak_bytes@b1" not in speed.measure(model, None, SMOKE, Silent())


def test_stderr_of_a_median():
    assert speed.median_stderr([1.0, 2.0]) is None
    assert speed.median_stderr([1.0, 2.0, 3.0]) == pytest.approx(1.2533 / 3**0.5)
