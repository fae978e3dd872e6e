"""Noise from a seed alone."""

import torch

from methods.training.seeding import mixed, seeded


def test_every_number_changes_the_noise() -> None:
    """A seed of 2**40 and one of 2 * 2**40 are the same to a processor's generator."""

    def draw(*numbers: int) -> tuple[float, ...]:
        with seeded(mixed(*numbers), "cpu"):
            return tuple(torch.rand(3).tolist())

    numbers = [(seed, step, process) for seed in range(3) for step in range(20) for process in range(3)]
    assert len({draw(*three) for three in numbers}) == len(numbers)
    assert draw(1, 2, 3) == draw(1, 2, 3)


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
