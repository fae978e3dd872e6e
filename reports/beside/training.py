"""`training.csv`: how the parts of ToMoE's loss fell while its masks were learned."""

import csv
import io
import math
from collections.abc import Mapping, Sequence

PARTS = {
    "kd": "distillation (KD)",
    "r_p": "parameters (R_P)",
    "r_u": "union of experts (R_U)",
    "r_l": "load balance (R_L)",
}
"""The parts of the loss by their column, as the paper calls them."""
COLUMNS = ("step", *PARTS)
LARGEST = 1e39
"""No float32 is larger."""

Curves = Sequence[Mapping[str, float]]
"""`COLUMNS` at each step, at least one; NaN where a part is infinite or no number, as in a training that diverged."""


def parse(text: str) -> Curves | None:
    """What the file says; None where the method has other parts.

    Raises:
        ValueError: it is damaged; the message says where.
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    head = next(reader, None)
    if not head:
        raise ValueError("it is empty")
    if not {*COLUMNS} <= {*head}:
        return None
    curves = [_point(head, row, f"its line {reader.line_num}") for row in reader if row]
    if not curves:
        raise ValueError("it has no step")
    return curves


def _point(head: Sequence[str], row: Sequence[str], where: str) -> Mapping[str, float]:
    if len(row) != len(head):
        raise ValueError(f"{where} has {len(row)} values where {len(head)} belong")
    named = dict(zip(head, row, strict=True))
    try:
        point = {name: float(named[name]) for name in COLUMNS}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not 0 <= point["step"] < LARGEST:
        raise ValueError(f"{where} has the step {named['step']}")
    return {name: value if abs(value) < LARGEST else math.nan for name, value in point.items()}
