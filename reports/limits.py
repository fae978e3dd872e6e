"""What measured numbers can be. One that cannot is shown as it was recorded and named at the top of the report; it does
not compete."""

import math
import re
from functools import cache

LIMITS = {
    re.compile(r".+/token_ppl(@.*)?"): (1.0, math.inf),
    re.compile(r".+/acc(_norm)?(@.*)?"): (0.0, 1.0),
    re.compile(r"speed/.+"): (0.0, math.inf),
}
"""The least and the greatest value, by the name of the metric."""


def is_possible(name: str, value: float) -> bool:
    """Whether a metric can have the value."""
    low, high = _limits(name)
    return math.isfinite(value) and low <= value <= high


def is_amount(value: float) -> bool:
    """Whether it can be a time, a number of bytes or a standard error."""
    return 0 <= value < math.inf


@cache
def _limits(name: str) -> tuple[float, float]:
    return next((limits for names, limits in LIMITS.items() if names.fullmatch(name)), (-math.inf, math.inf))
