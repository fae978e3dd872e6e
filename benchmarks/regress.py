"""Compare the records of two runs, cell by cell and metric by metric, and fail if something got worse.

    python -m benchmarks.regress --results results --baseline baseline

Cells are the same if everything that identifies them is, whatever the weights and the code. A metric got worse if it
moved in its bad direction by more than twice the standard error of the difference; speeds and memory depend on the
machine and are not judged. A finished cell of the baseline that is not finished in the results is missing. Exit status:
0 nothing worse or missing, 1 something is, 2 the comparison is not possible.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from benchmarks import store, tasks
from benchmarks.store import Record
from methods.errors import UserError

FLOOR = 1e-6
"""Share of the baseline value that counts as equal where no standard error is known."""
NOT_JUDGED = ("speed/", "/truncated_requests@")
"""Parts of the names of metrics that depend on the machine, or are recorded only where they are not zero."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of one cell in both runs, or a whole cell that the results lack."""

    cell: str
    """Model, method, ratio and seed."""
    metric: str
    """Its name with the protocol; of a whole cell, what became of it."""
    before: float | None
    """In the baseline; None: a whole cell."""
    after: float | None = None
    """In the results; None: it is missing there."""
    tolerance: float | None = None
    """Largest difference that may be chance; None: nothing to compare."""

    @property
    def verdict(self) -> str:
        """`same`, `better`, `worse` or `missing`."""
        if self.before is None or self.after is None or self.tolerance is None:
            return "missing"
        gain = (self.before - self.after) * (1 if tasks.lower_is_better(self.metric) else -1)
        if abs(gain) <= self.tolerance:
            return "same"
        return "better" if gain > 0 else "worse"


def identity(record: Record) -> str:
    """What makes two records measurements of the same cell."""
    return json.dumps({key: value for key, value in record["cell"].items() if key != "id"}, sort_keys=True)


def compare(results: Sequence[Record], baseline: Sequence[Record]) -> list[Change]:
    """Every judged metric of the baseline's cells, in its order; one row for a cell that is not finished any more.

    Args:
        results: records of any status.
        baseline: records of finished cells.

    Raises:
        UserError: the two have no cell in common.
    """
    found = {identity(record): record for record in results}
    pairs = [(record, found.get(identity(record))) for record in baseline]
    if not any(after for _, after in pairs):
        raise UserError(
            "The results and the baseline have no cell in common (same model, method and its settings, ratio, seed, "
            "calibration, budget and dtype). Run the command that is recorded in the baseline under provenance.command."
        )
    return [change for before, after in pairs for change in _changes(before, after)]


def _changes(before: Record, after: Record | None) -> list[Change]:
    cell = before["cell"]
    method = cell["method"] + (" + fine-tuning" if cell["recover"] else "")
    label = f"{cell['model']} {method} {cell['ratio']:g} seed {cell['seed']}"
    if after is None or after["status"] != "done":
        why = after and (after["error"] or "; ".join(after["skipped"]))
        fate = f"{after['status']}: {why}" if after else "no record"
        return [Change(cell=label, metric=f"(whole cell, {fate})", before=None)]
    judged = [name for name in before["metrics"] if not any(part in name for part in NOT_JUDGED)]
    return [_change(label, name, before["metrics"][name], after["metrics"].get(name)) for name in judged]


def _change(label: str, name: str, before: dict[str, float], after: dict[str, float] | None) -> Change:
    errors = [metric["stderr"] or 0.0 for metric in (before, after) if metric]
    tolerance = max(2 * math.hypot(*errors), FLOOR * abs(before["value"]))
    value = after["value"] if after else None
    return Change(cell=label, metric=name, before=before["value"], after=value, tolerance=tolerance)


def read(folder: Path) -> list[Record]:
    """The records below `folder`.

    Raises:
        UserError: there is none, or one is damaged.
    """
    found = list(store.records(folder))
    if not found:
        raise UserError(f"There is no record of a cell below {folder}. Name a folder that run_all.py --out made.")
    return found


def finished(folder: Path) -> list[Record]:
    """The records of done cells below `folder`.

    Raises:
        UserError: there is none, or one is damaged.
    """
    found = [record for record in read(folder) if record["status"] == "done"]
    if not found:
        raise UserError(f"No cell below {folder} is finished, so nothing can be judged by it. Name another --baseline.")
    return found


def main(argv: Sequence[str]) -> int:
    """Print the comparison; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regress", description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="records to judge")
    parser.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="records to judge them by")
    arguments = parser.parse_args(argv)
    changes = compare(read(arguments.results), finished(arguments.baseline))
    rows = [(c.cell, c.metric, c.before, c.after, c.tolerance, c.verdict) for c in changes]
    print(tabulate(rows, ("cell", "metric", "baseline", "results", "tolerance", "verdict"), missingval="-"))
    return 1 if any(change.verdict in ("worse", "missing") for change in changes) else 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"regress: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
