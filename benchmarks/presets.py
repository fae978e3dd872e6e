"""What `--budget smoke|demo|paper` stands for: how much calibration, training and evaluation a run may spend."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much calibration, training and evaluation a run may spend."""

    name: str
    """What `--budget` calls it."""
    calibration_samples: int
    """Windows of calibration text every method gets."""
    calibration_window: int
    """Tokens per calibration window, capped at the model's limit."""
    training_steps: int
    """Optimiser steps of methods that train."""
    training_sequences: int
    """Sequences per training step."""
    training_window: int
    """Tokens per training sequence, capped at the model's limit."""
    ppl_windows: int | None
    """Perplexity windows per text; None: all."""
    ppl_lengths: tuple[int, ...]
    """Tokens per perplexity window, each capped at the model's limit."""
    documents: int | None
    """Documents per task; None: all."""
    batch_size: int
    """Sequences per forward pass."""
    speed_prompt: int
    """Prompt tokens of the speed task."""
    speed_new_tokens: int
    """Tokens the speed task decodes."""
    speed_batches: tuple[int, ...]
    """Batch sizes of the speed task, ascending; those that fit into memory are run."""
    speed_repeats: int
    """Timed turns of the speed task."""


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            calibration_samples=8,
            calibration_window=128,
            training_steps=20,
            training_sequences=2,
            training_window=128,
            ppl_windows=2,
            ppl_lengths=(512,),
            documents=8,
            batch_size=4,
            speed_prompt=32,
            speed_new_tokens=8,
            speed_batches=(1,),
            speed_repeats=3,
        ),
        Preset(
            name="demo",
            calibration_samples=16,
            calibration_window=256,
            training_steps=300,
            training_sequences=4,
            training_window=256,
            ppl_windows=8,
            ppl_lengths=(512,),
            documents=40,
            batch_size=8,
            speed_prompt=64,
            speed_new_tokens=16,
            speed_batches=(1, 4),
            speed_repeats=3,
        ),
        Preset(
            name="paper",
            calibration_samples=128,
            calibration_window=2048,
            training_steps=10_000,
            training_sequences=1,
            training_window=2048,
            ppl_windows=None,
            ppl_lengths=(2048, 4096),
            documents=None,
            batch_size=8,
            speed_prompt=512,
            speed_new_tokens=128,
            speed_batches=tuple(2**doublings for doublings in range(9)),
            speed_repeats=5,
        ),
    )
}
