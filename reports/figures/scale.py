"""Logarithmic axes that have ordinary numbers at their ticks, whatever their range."""

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

FEW, MANY = 3, 8
"""Ticks that an axis has at least and at most."""
STEPS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))
"""Numbers times powers of ten, the next where these are few."""


class RoundNumbers(LogLocator):
    """Ticks at powers of ten, at more numbers between them where there are few, evenly where those are few too."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """Those of an axis from `vmin` to `vmax`."""
        for steps in STEPS:
            found = _within(vmin, vmax, steps)
            if len(found) >= FEW:
                return found[:: math.ceil(len(found) / MANY)]
        even = MaxNLocator(MANY // 2, min_n_ticks=FEW).tick_values(vmin, vmax)
        return [tick for tick in even if vmin <= tick <= vmax]


def _within(low: float, high: float, steps: Sequence[float]) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = (float(f"{step}e{power}") for power in powers for step in steps)
    return [tick for tick in ticks if low <= tick <= high]


def logarithmic(panel: Axes, which: Literal["x", "y"]) -> None:
    """Makes an axis of the panel a logarithmic one."""
    axis = panel.xaxis if which == "x" else panel.yaxis
    panel.set(**{f"{which}scale": "log"})
    axis.set_major_locator(RoundNumbers())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
