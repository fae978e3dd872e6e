"""Noise from a seed alone."""

import torch

from methods.training.seeding import seeded


def test_noise_leaves_the_generators_as_they_were(monkeypatch) -> None:
    """Of the processor, and of a device that has one of its own."""
    states = {"mps": torch.tensor([1, 2, 3])}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: states.update({device: state}))
    before = torch.get_rng_state()
    with seeded(1, "mps"):
        states["mps"] = torch.zeros(3)
        first = torch.rand(3)
    with seeded(1, "cpu"):
        assert torch.rand(3).equal(first)
    assert torch.get_rng_state().equal(before) and states["mps"].tolist() == [1, 2, 3]
