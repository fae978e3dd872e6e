"""What was not measured and what could not be drawn: by model, what each command would add."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from reports.figures import Gap
from reports.tables import Table
from reports.unfinished import UNASKED

Missing = Mapping[str, Mapping[str, Sequence[str]]]
"""Per model and command, what is missing without it."""


def unmeasured(unfinished: Table | None, asked: bool) -> Missing:
    """The rows of the table of unfinished cells and tasks that somebody asked for, or the others."""
    rows = (list(map(str, row)) for row in (unfinished.rows if unfinished else ()))
    return _by_command(
        (model, command, f"{methods} at {ratios} %, seed {seeds}: {status}, {why}")
        for model, methods, ratios, seeds, status, why, command in rows
        if (status != UNASKED) == asked
    )


def undrawn(gaps: Iterable[Gap]) -> Missing:
    """The figures that could not be made."""
    return _by_command((gap.model, gap.command, f"{gap.title}: {gap.why}") for gap in gaps)


def _by_command(found: Iterable[tuple[str, str, str]]) -> Missing:
    missing: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for model, command, what in found:
        missing[model][command].append(what)
    return missing
