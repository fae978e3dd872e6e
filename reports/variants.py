"""Runs of one method against each other, like the paper's Tables 12 and 13: other settings, or parts changed."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain

from reports.comparison import IDENTITY, identity, plus_minus
from reports.families import RIVAL, mixed_cells, mixed_columns, mixed_measured, mixed_standings
from reports.footnotes import footnotes
from reports.results import FINE_TUNED, Absent, Result, Results
from reports.settings import apart
from reports.standings import Standings
from reports.tables import Cell, Column, Table

OWN = "method_config."
"""What the names of a method's own settings begin with."""
COMPETING = (
    "Bold: the best of the runs of a method that differ in nothing but these settings. Runs at another ratio, of "
    "another ratio basis or data type do not compete, nor do dense, off-budget and ‡ numbers."
)
CAPTION = (
    "A row's settings are those in which the runs of its method at its size differ, as far as its record names them. "
    "Token perplexity (lower is better) by text and window, right answers to tasks in per cent; ± is "
)


def settings_table(results: Results) -> Table | None:
    """Methods that were run under several settings that are not their own, as the calibration text."""
    groups, title = _settings(results), "Same method, other settings"
    absent = _like(groups, results.absent, _around)
    return _table(groups, absent, "settings", title, "Methods that were run in several ways. ")


def ablations_table(results: Results) -> Table | None:
    """Variants of ToMoE."""
    groups, title = _ablations(results), "Variants of ToMoE"
    absent = _like(groups, results.absent, _within)
    return _table(groups, absent, "ablations", title, "ToMoE with parts of it changed. ")


def settings_standings(results: Sequence[Result]) -> Standings:
    """Which settings are best."""
    return _standings(_settings(results))


def ablation_standings(results: Sequence[Result]) -> Standings:
    """Which variants of ToMoE are best."""
    return _standings(_ablations(results))


Group = list[tuple[Result, str]]
"""Results with what tells them apart."""
Varies = Callable[[str], bool]
"""Whether results of a group may differ in the setting of this name."""


def _around(name: str) -> bool:
    return not name.startswith((OWN, "recover."))


def _within(name: str) -> bool:
    return name.startswith(OWN)


def _settings(results: Sequence[Result]) -> list[Group]:
    return _groups(results, _around)


def _ablations(results: Sequence[Result]) -> list[Group]:
    rivals = [result for result in results if result.name == RIVAL]
    return _groups(rivals, _within)


def _standings(groups: Sequence[Group]) -> Standings:
    return mixed_standings([[result for result, _ in group] for group in groups])


def _groups(results: Sequence[Result], varies: Varies) -> list[Group]:
    """Results that differ in nothing but the settings that `varies` names, where there are several."""
    alike: dict[Hashable, list[Result]] = defaultdict(list)
    for result in results:
        alike[_shared(result, varies)].append(result)
    several = (group for group in alike.values() if len(group) > 1)
    told = ((group, apart([result.settings for result in group])) for group in several)
    return [list(zip(group, settings, strict=True)) for group, settings in told]


def _shared(one: Result | Absent, varies: Varies) -> Hashable:
    """What all results of its group have."""
    return one.model, one.ratio, one.name, tuple(pair for pair in one.settings if not varies(pair[0]))


def _like(groups: Sequence[Group], absent: Iterable[Absent], varies: Varies) -> list[Absent]:
    """What was tried in vain and belongs to one of the groups."""
    shared = {_shared(group[0][0], varies) for group in groups}
    return [one for one in absent if _shared(one, varies) in shared]


def _table(groups: Sequence[Group], absent: Sequence[Absent], name: str, title: str, caption: str) -> Table | None:
    shown = [result for group in groups for result, _ in group]
    if not shown:
        return None
    standing, measured = _standings(groups), mixed_measured(shown)
    rows = tuple(
        (*_identity(result), Cell(settings), *mixed_cells(result, *measured[result.model], standing))
        for group in groups
        for result, settings in group
    )
    return Table(
        name=name,
        title=title,
        caption=f"{caption}{CAPTION}{plus_minus(shown)}.",
        columns=(*IDENTITY, Column("Settings", text=True), *mixed_columns(shown)),
        rows=rows,
        notes=footnotes(
            rows,
            [metric for kinds in measured.values() for metric in chain(*kinds)],
            standing.notes(COMPETING),
            absent,
        ),
    )


def _identity(result: Result) -> tuple[Cell, ...]:
    """Without the settings, which have a column of their own."""
    method = result.name + FINE_TUNED * result.fine_tuned
    return *identity(result)[:-1], Cell(method)
