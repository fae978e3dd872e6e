"""The table of expert speeds: what is timed against what. No test depends on the clock."""

import pytest
import torch

from benchmarks import moe_speed
from benchmarks.moe_speed import Size
from methods.modeling.structures.moe_stores import STORES

SMALL = Size(16, 24)


@pytest.fixture
def few_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_speed, "BYTES", 3 * 12 * 16 * 24)


def test_modules_outgrow_caches_and_mixtures_are_cut_from_the_dense_ones(few_modules: None) -> None:
    made = list(moe_speed.pairs(SMALL))
    assert len(made) == 3
    for dense, moe in made:
        assert moe.index.shape == (8, 12)
        assert dense.get_parameter("up_proj.weight")[moe.neurons.long()].equal(moe.get_parameter("up_proj.weight"))


def test_variants_share_weights_and_agree(few_modules: None) -> None:
    _, moe = next(moe_speed.pairs(SMALL))
    x, weights = torch.randn(9, 16), set(map(id, moe.parameters()))
    with torch.no_grad():
        for store, path in moe_speed.settings():
            variant = moe_speed.variant(moe, store, path)
            assert set(map(id, variant.parameters())) == weights
            torch.testing.assert_close(variant(x), moe(x))
    assert (moe.store, moe.path) == ("shared", "fixed")


def test_every_store_is_timed_beside_the_dense_module(
    few_modules: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = []

    def interleaved(tasks, repeats):
        for task in tasks.values():
            task()
        turns.append((list(tasks), repeats))
        return {name: [6.0 if name == "dense" else 3.0] * repeats for name in tasks}

    monkeypatch.setattr(moe_speed, "interleaved", interleaved)
    moe_speed.report(2, (SMALL,), {1: 3, 5: 1})
    assert [repeats for _, repeats in turns] == [6, 2]
    assert {name.split(",")[0] for name in turns[0][0]} == {"dense", *STORES}
    lines = capsys.readouterr().out.splitlines()
    assert "dense, ms".ljust(22) + " 2000.000 2000.000" in lines
    assert sum(line.split()[-2:] == ["0.50", "0.50"] for line in lines) == len(turns[0][0]) - 1
