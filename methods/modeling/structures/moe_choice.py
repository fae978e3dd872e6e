"""Which way to compute: a fixed rule, or the fastest of all as measured on the spot.

`fixed`, the default, depends on sizes only, so that equal inputs give equal bits in every process. `measured` times
each way once per shape, power of two of tokens, dtype and device, and goes on with the fastest for the life of the
process: what it picks may differ between runs, and with it the last bits.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from methods.modeling.structures.moe_gates import Choice
from methods.modeling.structures.moe_stores import Pseudo

PAYS = 32
"""Tokens at which multiplying a matrix takes as long as fetching it, on a CPU."""

_fastest: dict[tuple[object, ...], str] = {}


def fixed(store: Pseudo, x_TD: Tensor) -> str:
    """The rule.

    With m = `PAYS`, T tokens take about n (T + m) through n neurons: `masked` U (T + m), all of them for every token,
    `sorted` w (k T + N m) + S (T + m), each of N experts for some and S shared neurons for all, with 2 m where it
    copies. (U - S) m is small beside (U - S) T and left out.
    """
    if len(x_TD) == 1 and "single" in store.ways:
        return "single"
    if "grouped" in store.ways and x_TD.is_cuda:
        return "grouped"
    (experts, width), parts = store.parts.index_Nw.shape, store.parts
    left_out = len(store.union.down_wD) - parts.always - parts.active * width
    pays = len(x_TD) * left_out >= PAYS * store.fetches * experts * width
    return "sorted" if "sorted" in store.ways and pays else "masked"


def measured(store: Pseudo, choice: Choice, x_TD: Tensor) -> str:
    """The fastest way for such an input, found on the first of its kind."""
    parts = store.parts
    sizes = (type(store), *parts.index_Nw.shape, *store.union.down_wD.shape, parts.active, parts.always)
    key = (*sizes, len(x_TD).bit_length(), x_TD.dtype, x_TD.device)
    if key not in _fastest:
        able = {name: way for name, way in store.ways.items() if name != "single" or len(x_TD) == 1}
        _fastest[key] = min(able, key=lambda name: _seconds(lambda: able[name](choice, x_TD), x_TD.device))
    return _fastest[key]


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Time of the second of two runs."""
    began = 0.0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
