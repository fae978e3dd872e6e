"""The self-check of speeds: what it repeats, and how far it finds figures apart."""

from dataclasses import replace

import pytest
import torch

from benchmarks import speed
from benchmarks.metric import Metric
from benchmarks.presets import PRESETS
from benchmarks.speed import noise
from tests.methods.tiny import tiny_model


def test_spread_is_the_largest_distance_from_the_median():
    assert noise.spread([10.0, 9.0, 13.0]) == pytest.approx(0.3)
    assert noise.spread([10.0, 5.0, 13.0]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        ("decode_tokens_per_s@b1", 10),
        ("decode_tokens_per_s_vs_dense@b4", 5),
        ("next_token_s_p50@b1", 10),
        ("first_token_s_p90@b1", None),
        ("next_token_s_p99@b4", None),
        ("decode_tokens_per_s_iqr@b1", None),
    ],
)
def test_medians_and_ratios_have_limits_and_tails_have_none(figure, expected):
    assert noise.limit(f"shortgpt {figure}") == expected


def test_tails_are_marked(monkeypatch):
    lines, values = [], iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(noise, "_models", lambda: (None, None))
    monkeypatch.setattr(speed, "measure", lambda *_: {"speed/next_token_s_p99@b1": Metric(next(values), None, 1)})
    noise.report(2, PRESETS["smoke"], lines.append)
    assert [line.split()[-1] for line in lines[2:]] == ["exempt", "exempt"]


def test_every_figure_that_differs_is_shown(monkeypatch):
    dense, model = (tiny_model("llama-gqa", dtype=torch.float32, seed=seed) for seed in (0, 1))
    rates, calls, lines = iter([100.0, 7.0, 110.0, 7.0, 95.0, 7.0]), [], []

    def measure(*arguments):
        calls.append(arguments[:3])
        return {"speed/decode_tokens_per_s@b1": Metric(next(rates), None, 1)}

    monkeypatch.setattr(noise, "_models", lambda: (dense, model))
    monkeypatch.setattr(speed, "measure", measure)
    settings = replace(PRESETS["smoke"], speed_repeats=2)
    noise.report(3, settings, lines.append)
    assert calls == [(model, dense, settings), (dense, None, settings)] * 3
    assert [line.split() for line in lines[2:]] == [["shortgpt", "decode_tokens_per_s@b1", "100", "10.0", "10"]]


def test_the_compressed_model_is_smaller():
    dense, model = noise._models()
    assert speed.weights_bytes(model) < speed.weights_bytes(dense)
