"""One measured number with its uncertainty: what every evaluation returns and a record's `metrics` hold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A value of which it is known how sure it is; `dataclasses.asdict` gives its JSON."""

    value: float
    stderr: float | None
    """Standard error; None where it cannot be estimated."""
    n: int
    """Independent observations: perplexity windows, documents or timed repeats."""
