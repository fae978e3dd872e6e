"""Runs of one method against each other, like the paper's Tables 12 and 13: other settings, or parts changed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

from reports.accuracy import judged, task_cells, task_columns
from reports.comparison import IDENTITY, Measured, identity, metric_names, plus_minus, remarks
from reports.families import RIVAL
from reports.results import FINE_TUNED, Result, brief, differing, settings_of
from reports.tables import Cell, Column, Table, legend

OWN = "method_config."
"""What the names of a method's own settings begin with."""
COMMON = "as most"
CAPTION = (
    "A row's settings are those in which it differs from most runs of its method at its size. Token perplexity (lower "
    "is better) by text and window, right answers to tasks in per cent; ± is "
)


def settings_table(results: Sequence[Result]) -> Table | None:
    """Methods that were run under several settings that are not their own, as the calibration text."""
    found = _groups(results, lambda name: not name.startswith((OWN, "recover.")))
    return _table(found, "settings", "Same method, other settings", "Methods that were run in several ways. ")


def ablations_table(results: Sequence[Result]) -> Table | None:
    """Variants of ToMoE."""
    rivals = [result for result in results if result.records[0].cell["method"] == RIVAL]
    found = _groups(rivals, lambda name: name.startswith(OWN))
    return _table(found, "ablations", "Variants of ToMoE", "ToMoE with parts of it changed. ")


Group = list[tuple[Result, str]]
"""Results with what tells them apart."""


def _groups(results: Sequence[Result], varies: Callable[[str], bool]) -> list[Group]:
    """Results that differ in nothing but the settings that `varies` names, where there are several."""
    alike: dict[Hashable, list[Result]] = defaultdict(list)
    for result in results:
        rest = tuple(pair for pair in settings_of(result.records[0]) if not varies(pair[0]))
        alike[result.model, result.ratio, result.records[0].cell["method"], rest].append(result)
    return [list(_told_apart(group, varies)) for group in alike.values() if len(group) > 1]


def _told_apart(group: Sequence[Result], varies: Callable[[str], bool]) -> Iterator[tuple[Result, str]]:
    settings = [settings_of(result.records[0]) for result in group]
    names = [name for name in differing(settings) if varies(name)]
    usual = {name: Counter(dict(own).get(name) for own in settings).most_common(1)[0][0] for name in names}
    for result, own in zip(group, settings, strict=True):
        unusual = {name for name in names if dict(own).get(name) != usual[name]}
        yield result, brief(own, unusual) or (f"without {', '.join(sorted(unusual))}" if unusual else COMMON)


def _table(groups: Sequence[Group], name: str, title: str, caption: str) -> Table | None:
    shown = [result for group in groups for result, _ in group]
    if not shown:
        return None
    texts = [Measured(str(n), shown) for n in metric_names(shown) if n.quantity == "token_ppl"]
    tasks = [Measured(str(n), shown) for n in judged(shown)]
    rows = tuple(
        (*_identity(result), Cell(apart), *(text.cell(result) for text in texts), *task_cells(result, tasks))
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
            *(Column(f"@{n.protocol}", n.source) for n in metric_names(shown) if n.quantity == "token_ppl"),
            *task_columns(judged(shown)),
        ),
        rows=rows,
        notes=(*legend(rows), *(text for each in (*texts, *tasks) for text in each.differences()), *remarks(shown)),
    )


def _identity(result: Result) -> tuple[Cell, ...]:
    """Without the settings, which have a column of their own."""
    method = result.records[0].cell["method"] + FINE_TUNED * result.fine_tuned
    return *identity(result)[:-1], Cell(method)
