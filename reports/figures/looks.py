"""What tells methods apart in every figure of a report, and asked ratios.

Colours are those of Okabe and Ito, which colour-blind people tell apart. There are more methods than such colours, so
the colour is the family's. Markers run on from family to family: two methods that share one differ in brightness, in
print without colour too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import matplotlib
from matplotlib.colors import to_hex

from reports.figures.select import tomoe
from reports.results import Result

FAMILIES = {
    "#000000": ("dense",),
    "#d55e00": ("tomoe",),
    "#0072b2": ("shortgpt", "sleb"),
    "#009e73": ("slicegpt", "llm-pruner", "llm-surgeon", "modegpt", "disp-llm"),
    "#888888": ("random", "structured-magnitude"),
    "#e69f00": ("magnitude", "wanda", "sparsegpt", "pruner-zero"),
    "#cc79a7": ("moefication", "g-moefication", "llama-moe", "llama-moe-v2", "cmoe"),
}
OTHERS = ("#56b4e9", "#882255", "#999933")
"""For methods from elsewhere, each colour with all markers."""
MARKERS = "os^DvX<P>*dp"


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    """Its family's."""
    marker: str
    """Its own within the family."""


@dataclass(frozen=True)
class Looks:
    """How everything is drawn in one report."""

    methods: Mapping[str, Look]
    """All known ones and all of the report, in the order of legends."""
    ratios: Mapping[float, str]
    """Colours of ToMoE's asked ratios, from large to small."""


def looks(results: Sequence[Result]) -> Looks:
    """Those of a report on the results."""
    return Looks(_methods({result.name for result in results}), _ratios({result.ratio for result in tomoe(results)}))


def _methods(shown: set[str]) -> dict[str, Look]:
    known = {name: colour for colour, names in FAMILIES.items() for name in names}
    strange = {name: OTHERS[at // len(MARKERS) % len(OTHERS)] for at, name in enumerate(sorted(shown - {*known}))}
    coloured = zip((known | strange).items(), cycle(MARKERS), strict=False)
    return {name: Look(colour, marker) for (name, colour), marker in coloured}


def _ratios(ratios: set[float]) -> dict[float, str]:
    """From light green for the largest to dark violet for the smallest, told apart in grey too."""
    scale, last = matplotlib.colormaps["viridis"], max(1, len(ratios) - 1)
    rising = [(ratio, to_hex(scale(0.8 * at / last))) for at, ratio in enumerate(sorted(ratios))]
    return dict(reversed(rising))
