"""The speed task: what is run, in which order, when it ends, and what is made of it. No test depends on the clock."""

import mmap
from dataclasses import replace
from statistics import median

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from benchmarks import speed
from benchmarks.presets import PRESETS
from benchmarks.progress import Tracker
from benchmarks.speed import memory, summary
from benchmarks.speed.generation import Generation, run
from benchmarks.speed.roofline import Ceilings, ceilings
from benchmarks.speed.work import Work
from methods.base import Silent
from methods.modeling.structures.sparse_linears import SparseLinear
from tests.methods.test_sparse_linears import sparse
from tests.methods.tiny import tiny_model

SMOKE = PRESETS["smoke"]
SWEEP = replace(SMOKE, speed_batches=(1, 2, 4, 8))
CPU = torch.device("cpu")
needs_peak = pytest.mark.skipif(not memory.CLEAR_PEAK.exists(), reason="the system does not tell peak memory")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa", dtype=torch.float32)


def generation(batch=1, prompt=4, first=1.0, steps=(1.0, 1.0), **others):
    return Generation(batch, prompt, first, tuple(steps), **others)


@pytest.fixture
def calls(monkeypatch):
    """Replaces the clockwork: the n-th generation makes n tokens per second of each sequence; none share a turn."""
    calls = []

    def stand_in(model, prompt, new_tokens, counter):
        calls.append((model, tuple(prompt.shape), new_tokens))
        batch, length = prompt.shape
        return generation(batch, length, length / len(calls), [1 / len(calls)] * new_tokens, cache_bytes=10)

    monkeypatch.setattr(speed, "run", stand_in)
    monkeypatch.setattr(speed, "ceilings", lambda device, dtype: Ceilings(1e9, 1e9))
    return calls


def test_a_generation_is_one_prefill_and_a_step_per_token(model):
    shapes = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    found = run(model, torch.zeros(3, 5, dtype=torch.int64), 4)
    hook.remove()
    assert shapes == [(3, 5)] + [(3, 1)] * 4
    assert (found.batch, found.prompt, len(found.next_s)) == (3, 5, 4)
    assert min(found.first_s, *found.next_s) > 0 and (found.prefill_j, found.decode_j) == (None, None)


def test_decoding_is_greedy_and_uses_the_cache(model):
    tokens = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0]))
    run(model, torch.tensor([[5, 6, 7]]), 6)
    hook.remove()
    whole = torch.cat(tokens, dim=1)
    with torch.no_grad():
        expected = model(whole).logits.argmax(-1)
    assert whole[:, 3:].equal(expected[:, 2:-1])


def test_rates_are_over_all_sequences():
    found = generation(batch=3, prompt=8, first=2.0, steps=(0.5, 1.5))
    assert (found.prefill, found.decode, found.seconds) == (3 * 8 / 2, 3 * 2 / 2, 4)


def test_models_take_turns_and_the_first_turn_does_not_count(model, calls):
    dense = tiny_model("llama-mha", dtype=torch.float32)
    metrics = speed.measure(model, dense, SMOKE, Silent())
    assert [call[0] for call in calls] == [model, dense] * 4
    own, other = [3, 5, 7], [4, 6, 8]
    assert metrics["speed/prefill_tokens_per_s@b1"].value == pytest.approx(median(own))
    assert metrics["speed/decode_tokens_per_s@b1"].value == pytest.approx(median(own))
    ratio = metrics["speed/decode_tokens_per_s_vs_dense@b1"]
    assert ratio.value == pytest.approx(median(a / b for a, b in zip(own, other, strict=True))) and ratio.n == 3
    assert metrics["speed/prefill_tokens_per_s_iqr@b1"].value == pytest.approx(2)


def test_the_dense_model_is_not_compared_with_itself(model, calls):
    metrics = speed.measure(model, None, SMOKE, Silent())
    assert not [name for name in metrics if "vs_dense" in name]
    assert len(calls) == 4


def test_prompt_and_new_tokens_fit_the_model(model, calls):
    speed.measure(model, None, replace(SMOKE, speed_prompt=4096), Silent())
    assert calls[0][1:] == ((1, 64 - SMOKE.speed_new_tokens), SMOKE.speed_new_tokens)


def test_progress_counts_every_repeat(model, calls):
    events = []
    speed.measure(model, None, SMOKE, Tracker(events.append))
    assert (events[-1].done, events[-1].total, events[-1].finished) == (4, 4, True)


@pytest.mark.parametrize(("seconds", "expected"), [(9, 1), (0.5, 1), (0.4, 2), (0.04, 13), (1e-6, speed.MOST)])
def test_short_generations_share_a_turn(model, calls, monkeypatch, seconds, expected):
    count = []

    def stand_in(model, prompt, new_tokens, counter):
        count.append(model)
        return generation(*prompt.shape, seconds / 2, [seconds / 2], cache_bytes=10)

    monkeypatch.setattr(speed, "run", stand_in)
    metrics = speed.measure(model, model, SMOKE, Silent())
    assert len(count) == 2 + 2 * expected * SMOKE.speed_repeats
    assert metrics["speed/prefill_tokens_per_s_vs_dense@b1"].n == expected * SMOKE.speed_repeats


def too_large(monkeypatch, limit, after=0):
    """The device has memory for fewer than `limit` sequences, but for some generations."""
    within, spared = speed.run, iter(range(after))

    def stand_in(model, prompt, *rest):
        if len(prompt) >= limit and next(spared, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return within(model, prompt, *rest)

    monkeypatch.setattr(speed, "run", stand_in)


def test_the_sweep_ends_where_the_device_has_no_memory(model, calls, monkeypatch):
    too_large(monkeypatch, 4)
    events = []
    metrics = speed.measure(model, model, SWEEP, Tracker(events.append))
    assert metrics["speed/largest_batch"].value == 2 and metrics["speed/batch_without_room"].value == 4
    assert {name.rpartition("@")[2] for name in metrics if "@" in name} == {"b1", "b2"}
    assert events[-1].finished


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_device_without_memory_for_one_sequence_is_an_error(model, calls, monkeypatch, after):
    too_large(monkeypatch, 1, after)
    with pytest.raises(torch.OutOfMemoryError):
        speed.measure(model, None, SWEEP, Silent())


def test_nothing_is_said_of_room_where_all_batches_fit(model, calls):
    metrics = speed.measure(model, None, SWEEP, Silent())
    assert metrics["speed/largest_batch"].value == 8 and "speed/batch_without_room" not in metrics


def test_the_sweep_ends_before_the_host_has_no_memory(model, calls, monkeypatch):
    seen = []

    def fits(needed, held, growth):
        seen.append((needed, held, growth))
        return len(seen) < 2

    usage = iter([100, 110, 120, 130, 140, 150, 160])  # at rest; before each batch, twice: asked, and about to run
    peaks = iter([1000, 1100, 2000, 2100])
    monkeypatch.setattr(speed, "fits_host", fits)
    monkeypatch.setattr(speed, "reset_peak", lambda device: memory.Usage(next(usage), None))
    monkeypatch.setattr(speed, "peak", lambda device: memory.Usage(next(peaks), None))
    metrics = speed.measure(model, model, replace(SMOKE, speed_batches=(1, 4, 8)), Silent())
    assert seen == [(1000, 30, 4), (2000, 50, 2)]
    assert metrics["speed/largest_batch"].value == 4 and metrics["speed/batch_without_room"].value == 8
    assert [size for _, (size, _), _ in calls] == [1] * 8 + [4] * 8
    assert metrics["speed/peak_bytes@b1"].value == memory.weights_bytes(model) + 1000 - 100
    assert metrics["speed/peak_bytes@b4"].value == memory.weights_bytes(model) + 2000 - 100


def test_room_on_the_host(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    assert memory.fits_host(needed=500, held=100, growth=2) and not memory.fits_host(needed=501, held=100, growth=2)


def test_available_memory_is_that_of_the_control_group(monkeypatch, tmp_path):
    free = 1 << 40
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"available": free}))
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available() == free
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2500\ninactive_file 500\n")
    assert memory.available() == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() == free


def test_weights_count_tied_matrices_once(model):
    tied = tiny_model("llama-tied", dtype=torch.float32)
    assert memory.weights_bytes(model) - memory.weights_bytes(tied) == 96 * 32 * 4


def test_weights_include_what_says_which_they_are():
    model = sparse("llama-gqa", torch.bfloat16)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    masks = sum(part.mask.nbytes for part in model.modules() if isinstance(part, SparseLinear))
    rotary = model.model.rotary_emb.inv_freq.nbytes + model.model.rotary_emb.original_inv_freq.nbytes
    assert masks > 0 and memory.weights_bytes(model) == parameters + masks + rotary


@needs_peak
def test_peaks_count_mapped_weights_once(monkeypatch, tmp_path):
    """Weights loaded in their file's dtype become resident when they are first read, the dense model's too."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
    tiny_model("llama-mha", dtype=torch.float32, **sizes).save_pretrained(tmp_path)
    model, dense = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval() for _ in range(2))
    monkeypatch.setattr(speed, "TURN_S", 0)
    settings = replace(SMOKE, speed_batches=(1, 2), speed_prompt=4, speed_new_tokens=2)
    found = speed.measure(model, dense, settings, Silent())
    weights = memory.weights_bytes(model)
    assert weights > 80e6  # so that libraries and activations weigh little
    for batch in (1, 2):
        assert weights <= found[f"speed/peak_bytes@b{batch}"].value < 1.5 * weights


@needs_peak
def test_peak_memory_sees_what_was_freed_again():
    before = memory.reset_peak(CPU).host
    with mmap.mmap(-1, 64 << 20) as fresh:  # an allocator may have as much left from earlier tests
        for start in range(0, len(fresh), mmap.PAGESIZE):
            fresh[start] = 1
    peak = memory.peak(CPU).host
    assert before is not None and peak is not None
    assert 60 << 20 < peak - before < 200 << 20


def test_peak_memory_is_left_out_where_it_cannot_be_measured(model, calls, monkeypatch, tmp_path):
    assert "speed/peak_bytes@b1" in speed.measure(model, None, SMOKE, Silent()) or not memory.CLEAR_PEAK.exists()
    monkeypatch.setattr(memory, "CLEAR_PEAK", tmp_path / "missing" / "clear_refs")
    assert "speed/peak_bytes@b1" not in speed.measure(model, None, SMOKE, Silent())


def test_a_device_has_a_peak_of_its_own(model, calls):
    sweep = speed.Sweep(model, None, SMOKE)
    sweep.device, sweep.at_rest = torch.device("cuda"), memory.Usage(500, 100)
    found = sweep._peaks(1, memory.Usage(900, 250))
    assert {name: metric.value for name, metric in found.items()} == {
        "speed/peak_bytes@b1": memory.weights_bytes(model) + 150,
        "speed/peak_host_bytes@b1": 900,
    }


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.sampled_from([0, 25, 50, 75, 90, 99, 100]))
def test_percentiles_are_those_of_numpy(values, percent):
    assert summary.percentile(values, percent) == pytest.approx(numpy.percentile(values, percent), rel=1e-12)


def test_latencies_are_over_generations_and_over_all_steps():
    found = summary.timings([generation(2, first=f, steps=(f / 10, f / 5)) for f in (1.0, 2.0, 4.0)], [])
    steps = [0.1, 0.2, 0.2, 0.4, 0.4, 0.8]
    for percent in (50, 90, 99):
        first, following = (found[f"speed/{which}_token_s_p{percent}@b2"] for which in ("first", "next"))
        assert (first.value, first.n) == (pytest.approx(numpy.percentile([1, 2, 4], percent)), 3)
        assert (following.value, following.n) == (pytest.approx(numpy.percentile(steps, percent)), 6)


def test_stderr_of_a_median():
    assert summary.median_stderr([1.0, 2.0]) is None
    assert summary.median_stderr([1.0, 2.0, 3.0]) == pytest.approx(1.2533 * 1 / 1.349 / 3**0.5)
    draws = numpy.random.default_rng(0).normal(5, 2, (4000, 101))
    claimed = numpy.mean([summary.median_stderr(row.tolist()) for row in draws[:400]])
    assert claimed == pytest.approx(numpy.median(draws, axis=1).std(), rel=0.05)


def test_the_bound_is_the_slower_of_reading_and_computing():
    limits = Ceilings(bandwidth=10, peak=100)
    assert (limits.seconds(Work(flops=1000, bytes=20)), limits.seconds(Work(flops=100, bytes=20))) == (10, 2)


def test_time_over_bound(model):
    own = [generation(2, 5, first, [first / 10] * 3, cache_bytes=7) for first in (1.0, 3.0, 2.0)]
    found = summary.work(model, own, Ceilings(bandwidth=1e-3, peak=1e30))
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    bound = (4 * matrices + 2 * 5 * 7) / 1e-3
    assert found["speed/prefill_time_over_bound@b2"].value == pytest.approx(2 / bound)
    assert found["speed/decode_time_over_bound@b2"].value == pytest.approx(0.2 / bound)
    assert found["speed/cache_bytes_per_token"].value == 7
    assert found["speed/threads"].value == torch.get_num_threads()


def test_ceilings_are_measured():
    found = ceilings(CPU, torch.float32)
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.peak < 1e15
