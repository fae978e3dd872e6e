"""The table of what methods' experts cost: what is timed. No test depends on the clock."""

import pytest
import torch

from benchmarks import construction_speed, moe_speed
from benchmarks.moe_speed import Size

SMALL = Size(32, 256)


@pytest.fixture
def two_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_speed, "BYTES", 2 * 12 * 32 * 256)


def test_every_construction_uses_half_of_the_dense_neurons(two_modules: None) -> None:
    made = list(construction_speed.modules(SMALL))
    assert len(made) == 2
    for dense, mixtures in made:
        assert mixtures.keys() == construction_speed.CONSTRUCTIONS.keys()
        for moe in mixtures.values():
            assert moe.layout.used == pytest.approx(128, abs=24 * (256 % moe.layout.experts > 0))
            assert dense.get_parameter("up_proj.weight")[moe.neurons.long()].equal(moe.get_parameter("up_proj.weight"))


def test_all_are_timed_beside_the_dense_module(
    two_modules: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = []

    def interleaved(tasks, repeats):
        for task in tasks.values():
            task()
        turns.append((list(tasks), repeats))
        return {name: [6.0 if name == "dense" else 3.0] * repeats for name in tasks}

    monkeypatch.setattr(construction_speed, "interleaved", interleaved)
    construction_speed.report(2, (SMALL,), {1: 3, 5: 1})
    assert [repeats for _, repeats in turns] == [6, 2] and len(turns[0][0]) == 11
    lines = capsys.readouterr().out.splitlines()
    assert "dense, ms".ljust(38) + " 3000.000 3000.000" in lines
    assert sum(line.split()[-2:] == ["0.500", "0.500"] for line in lines) == 10
    assert any(line.startswith("cmoe S2A2E8, shared") for line in lines)


def test_stores_agree() -> None:
    (_, mixtures), *_ = construction_speed.modules(SMALL)
    x = torch.randn(9, 32)
    with torch.no_grad():
        for moe in mixtures.values():
            one, other = (moe_speed.variant(moe, store, "fixed")(x) for store in construction_speed.STORES)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
