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
    assert [line.split() for line in lines[2:]] == [["shortgpt", "decode_tokens_per_s@b1", "100", "10.0"]]


def test_the_compressed_model_is_smaller():
    dense, model = noise._models()
    assert speed.weights_bytes(model) < speed.weights_bytes(dense)
