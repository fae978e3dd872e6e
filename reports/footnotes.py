"""The sentences below every table of measured numbers: marks, tests, failures, versions, and what numbers rest on."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from reports.comparison import Measured, MetricName, parse, remarks
from reports.results import Absent, Result
from reports.standings import lower_is_better
from reports.tables import Cell, legend


def footnotes(
    rows: Iterable[Iterable[Cell]],
    metrics: Sequence[Measured],
    competing: Iterable[str],
    absent: Iterable[Absent],
    published: Iterable[str] = (),
) -> tuple[str, ...]:
    """What a reader must know of a table's numbers.

    Args:
        metrics: its columns, once for each model where only numbers of one model can be compared.
        competing: what `Standings.notes` says.
        absent: what was tried in vain.
        published: what `published.provenance` says.
    """
    results = list(dict.fromkeys(result for metric in metrics for result in metric.results))
    names = dict.fromkeys(metric.name for metric in metrics)
    return (
        *legend(rows),
        *(text for metric in metrics for text in metric.differences()),
        *competing,
        *remarks(results),
        *in_vain(absent),
        *published,
        *_versions(results, map(parse, names)),
        *_windows([metric for metric in metrics if lower_is_better((metric.name,))]),
        *_documents([Measured(name, results) for name in names if not lower_is_better((name,))]),
    )


def in_vain(absent: Iterable[Absent]) -> Iterator[str]:
    """A sentence per reason for which nothing was measured."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in absent:
        reasons[one.status, one.why].append(one.title)
    for (status, why), titles in reasons.items():
        yield f"{status.capitalize()}: {'; '.join(titles)}, because of this: {why}"


def _versions(results: Sequence[Result], names: Iterable[MetricName]) -> Iterator[str]:
    """The programs that measured, and the versions of the tasks."""
    origins = [record.provenance for result in results for record in result.records]
    programs = _found((origin.get("versions") or {} for origin in origins), ("lm_eval", "transformers"))
    wanted = {key for name in names for key in (f"{name.source}@{name.protocol}", f"ppl-{name.source}@{name.protocol}")}
    tasks = _found((origin.get("task_versions") or {} for origin in origins), sorted(wanted))
    if told := [*programs, *tasks]:
        yield f"Versions: {', '.join(told)}."


def _found(each: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> list[str]:
    """`key value`, or `key value or other` where there are several."""
    every = list(each)
    values = ((key, sorted({str(versions[key]) for versions in every if key in versions})) for key in keys)
    return [f"{key} {' or '.join(found)}" for key, found in values if found]


def _windows(texts: Iterable[Measured]) -> Iterator[str]:
    """How many windows each model's perplexities rest on."""
    counts = [(text.results[0].model, parse(text.name), text.count()) for text in texts]
    if found := [f"{model} {name.source} @{name.protocol}: {count}" for model, name, count in counts if count]:
        yield f"Windows of {'; '.join(found)}."


def _documents(tasks: Sequence[Measured]) -> Iterator[str]:
    """How many documents the answers rest on."""
    if tasks:
        yield f"Documents: {'; '.join(f'{task.name} {task.count()}' for task in tasks)}."
