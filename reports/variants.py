"""Runs of one method against each other, like the paper's Tables 12 and 13: other settings, or parts changed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

from reports.accuracy import judged, task_columns
from reports.comparison import IDENTITY, Measured, identity, plus_minus, remarks
from reports.families import RIVAL, mixed_cells, mixed_standings
from reports.perplexity import texts
from reports.results import FINE_TUNED, Result
from reports.settings import brief, differing
from reports.standings import Standings
from reports.tables import Cell, Column, Table, legend

OWN = "method_config."
"""What the names of a method's own settings begin with."""
COMMON = "as most"
COMPETING = (
    "Bold: the best of the runs of a method that differ in nothing but these settings. Runs at another ratio, of "
    "another ratio basis or data type do not compete, nor do dense, off-budget and ‡ numbers."
)
CAPTION = (
    "A row's settings are those in which it differs from most runs of its method at its size. Token perplexity (lower "
    "is better) by text and window, right answers to tasks in per cent; ± is "
)


def settings_table(results: Sequence[Result]) -> Table | None:
    """Methods that were run under several settings that are not their own, as the calibration text."""
    title = "Same method, other settings"
    return _table(_settings(results), "settings", title, "Methods that were run in several ways. ")


def ablations_table(results: Sequence[Result]) -> Table | None:
    """Variants of ToMoE."""
    return _table(_ablations(results), "ablations", "Variants of ToMoE", "ToMoE with parts of it changed. ")


def settings_standings(results: Sequence[Result]) -> Standings:
    """Which settings are best."""
    return _standings(_settings(results))


def ablation_standings(results: Sequence[Result]) -> Standings:
    """Which variants of ToMoE are best."""
    return _standings(_ablations(results))


Group = list[tuple[Result, str]]
"""Results with what tells them apart."""


def _settings(results: Sequence[Result]) -> list[Group]:
    return _groups(results, lambda name: not name.startswith((OWN, "recover.")))


def _ablations(results: Sequence[Result]) -> list[Group]:
    rivals = [result for result in results if result.name == RIVAL]
    return _groups(rivals, lambda name: name.startswith(OWN))


def _standings(groups: Sequence[Group]) -> Standings:
    return mixed_standings([[result for result, _ in group] for group in groups])


def _groups(results: Sequence[Result], varies: Callable[[str], bool]) -> list[Group]:
    """Results that differ in nothing but the settings that `varies` names, where there are several."""
    alike: dict[Hashable, list[Result]] = defaultdict(list)
    for result in results:
        rest = tuple(pair for pair in result.settings if not varies(pair[0]))
        alike[result.model, result.ratio, result.name, rest].append(result)
    return [list(_told_apart(group, varies)) for group in alike.values() if len(group) > 1]


def _told_apart(group: Sequence[Result], varies: Callable[[str], bool]) -> Iterator[tuple[Result, str]]:
    settings = [result.settings for result in group]
    names = [name for name in differing(settings) if varies(name)]
    usual = {name: Counter(dict(own).get(name) for own in settings).most_common(1)[0][0] for name in names}
    for result, own in zip(group, settings, strict=True):
        unusual = {name for name in names if dict(own).get(name) != usual[name]}
        lacking = [f"without {name}" for name in sorted(unusual - dict(own).keys())]
        yield result, ", ".join(filter(None, [brief(own, unusual), *lacking])) or COMMON


def _table(groups: Sequence[Group], name: str, title: str, caption: str) -> Table | None:
    shown = [result for group in groups for result, _ in group]
    if not shown:
        return None
    words, tasks = ([Measured(str(name), shown) for name in names] for names in (texts(shown), judged(shown)))
    standing = _standings(groups)
    rows = tuple(
        (*_identity(result), Cell(apart), *mixed_cells(result, words, tasks, standing))
        for group in groups
        for result, apart in group
    )
    return Table(
        name=name,
        title=title,
        caption=f"{caption}{CAPTION}{plus_minus(shown)}.",
        columns=(
            *IDENTITY,
            Column("Settings", text=True),
            *(Column(f"@{text.protocol}", text.source) for text in texts(shown)),
            *task_columns(judged(shown)),
        ),
        rows=rows,
        notes=(
            *legend(rows),
            *(text for each in (*words, *tasks) for text in each.differences()),
            *standing.notes(COMPETING),
            *remarks(shown),
        ),
    )


def _identity(result: Result) -> tuple[Cell, ...]:
    """Without the settings, which have a column of their own."""
    method = result.name + FINE_TUNED * result.fine_tuned
    return *identity(result)[:-1], Cell(method)
