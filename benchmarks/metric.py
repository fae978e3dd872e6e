"""What evaluations return: measured numbers with their uncertainty, and what they were measured with."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A value of which it is known how sure it is; `dataclasses.asdict` gives its JSON."""

    value: float
    stderr: float | None
    """Standard error; None where it cannot be estimated."""
    n: int
    """Independent observations: perplexity windows, documents or timed repeats."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What running one task gave."""

    metrics: Mapping[str, Metric]
    """By name, as in `arc_easy/acc_norm@0shot`."""
    dataset_revisions: Mapping[str, str]
    """Which data, by data set."""
    task_versions: Mapping[str, str]
    """How it was measured, by task."""
    notes: tuple[str, ...] = ()
    """What was not as asked; each begins with the task's name and a colon."""
    skipped: str | None = None
    """Why nothing could be measured, where that is no failure."""
