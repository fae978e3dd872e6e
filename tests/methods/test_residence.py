"""Blocks that wait on the host: where they are when they run, and that nothing else changes.

Without a second device a stand-in plays it: what moves is recorded, and nothing moves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import methods
from methods import modeling
from methods.base import Budget, Context
from methods.modeling import residence
from tests.methods.tiny import RandomCalibration, logits, tiny_model

STREAMING = [name for name in methods.names() if methods.get(name).streams]


class Away:
    """Which blocks are on the stand-in device, and the most there ever were at once."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks, self.there, self.most, self.ran = [*modeling.Decoder(model).module_list], set(), 0, 0
        monkeypatch.setattr(residence, "resident", self.resident)
        for block in self.blocks:
            block.register_forward_pre_hook(self.run)

    @contextmanager
    def resident(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        """As the real one, but nothing moves."""
        new = module not in self.there
        self.there.add(module)
        self.most = max(self.most, len(self.there))
        yield
        if new:
            self.there.remove(module)

    def run(self, module: nn.Module, args: Any) -> None:
        """A block is being called."""
        self.ran += 1
        assert module in self.there, "a block ran on the host"


def test_streaming_methods_are_those_that_need_no_gradient() -> None:
    blockwise = {"shortgpt", "sleb", "slicegpt", "modegpt", "magnitude", "wanda", "sparsegpt"}
    assert set(STREAMING) == blockwise | {"moefication", "g-moefication", "cmoe"}


@pytest.mark.parametrize("name", STREAMING)
def test_one_block_at_a_time_is_on_the_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, calibration = Budget(ratio=0.7, basis="block", tolerance=0.2), RandomCalibration(samples=16)
    method, context = methods.configure(name, {}), Context(scratch=tmp_path)
    expected = method.compress(tiny_model("llama-gqa"), None, budget, calibration, context)  # type: ignore[arg-type]
    model = tiny_model("llama-gqa")
    modeling.keep_blocks_on_host(model, model.device)
    away = Away(model, monkeypatch)
    # hooks that were registered before the stand-in look `resident` up when they are called
    monkeypatch.setattr(modeling, "resident", away.resident, raising=False)
    found = method.compress(model, None, budget, calibration, context)  # type: ignore[arg-type]
    assert logits(found).equal(logits(expected))
    assert away.most == 1 and not away.there
    assert away.ran > 0 or name == "magnitude"  # which runs nothing


def test_a_block_goes_back_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("phi")
    modeling.keep_blocks_on_host(model, model.device)
    away = Away(model, monkeypatch)

    def fail(*_: Any) -> None:
        raise RuntimeError("stopped")

    away.blocks[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        logits(model)
    assert not away.there and away.ran == 2
    for _ in modeling.layer_calls(modeling.Decoder(model), RandomCalibration().batches(4)):
        assert not away.there


def test_a_module_that_is_there_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[torch.device] = []
    module = nn.Linear(2, 2, device="meta")
    monkeypatch.setattr(module, "to", lambda device: moves.append(device))
    with modeling.resident(module, torch.device("meta")):
        assert moves == []
    with modeling.resident(module, torch.device("cpu")):
        assert moves == [torch.device("cpu")]
    assert moves == [torch.device("cpu"), torch.device("meta")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", STREAMING)
def test_on_a_real_device(name: str, tmp_path: Path) -> None:
    budget, calibration = Budget(ratio=0.7, basis="block", tolerance=0.2), RandomCalibration(samples=16)
    method, context = methods.configure(name, {}), Context(scratch=tmp_path, device="cuda")
    whole = tiny_model("llama-gqa").cuda()
    expected = method.compress(whole, None, budget, calibration, context)  # type: ignore[arg-type]
    model = tiny_model("llama-gqa")
    modeling.keep_blocks_on_host(model, torch.device("cuda"))
    found = method.compress(model, None, budget, calibration, context)  # type: ignore[arg-type]
    assert {p.device.type for p in modeling.Decoder(found).module_list.parameters()} == {"cpu"}
    torch.testing.assert_close(logits(found.cuda()).cpu(), logits(expected).cpu(), rtol=1e-8, atol=1e-8)
