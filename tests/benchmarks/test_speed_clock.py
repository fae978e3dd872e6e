"""Before the clock is read a device must have finished: each is waited for in its own way."""

import pytest
import torch

from benchmarks.speed import clock, generation, roofline
from tests.methods.tiny import some_ids, tiny_model


@pytest.fixture
def waited(monkeypatch):
    """The kinds of devices that were waited for."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device.type))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    return waited


@pytest.mark.parametrize(("kind", "expected"), [("cuda", ["cuda"]), ("mps", ["mps"]), ("cpu", [])])
def test_devices_that_return_at_once_are_waited_for(waited, kind, expected):
    first = clock.now(torch.device(kind))
    assert clock.now(torch.device(kind)) >= first and waited == 2 * expected


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_every_token_and_every_try_is_waited_for(waited, kind):
    device = torch.device(kind)
    phase = generation._Phase(device, None)
    assert phase.next_token(torch.tensor([[[0.0, 1.0]]])).tolist() == [[1]] and waited == 2 * [kind]
    roofline._best(lambda: waited.append("task"), device)
    assert waited[2:] == (1 + roofline.TRIES) * [kind, "task", kind]


def test_a_generation_reads_this_clock(monkeypatch):
    times = iter([0.0, 3.0, 10.0, 14.0, 15.0])
    monkeypatch.setattr(generation, "now", lambda device: next(times))
    found = generation.run(tiny_model("llama-gqa", dtype=torch.float32), some_ids(1, 4), 2)
    assert (found.first_s, found.next_s) == (3, (4, 1))
