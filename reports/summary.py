"""What the head of a report says: what was run, with what, where; and what to be careful about."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from reports.accuracy import judged
from reports.comparison import Measured, metric_names, uneven
from reports.records import Record
from reports.results import Result, by_model
from reports.settings import brief, differing
from reports.tables import percent

COMMANDS = 3
"""That a report lists."""


def facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    """`(what, values)` over all measured cells, in the order of the report."""
    records = [record for result in results for record in result.records]
    cells, origins = [record.cell for record in records], [record.provenance for record in records]
    runs = [run for origin in origins for run in (origin, *_later(origin).values())]
    found = {
        "Models": (cell["model"] for cell in cells),
        "Methods": (cell["method"] for cell in cells),
        "Ratios": (f"{percent(c['ratio']):g} % ({c['ratio_basis']} basis)" for c in cells if c["method"] != "dense"),
        "Seeds": (str(cell["seed"]) for cell in cells),
        "Fine-tuning": _recoveries(records),
        "Calibration": (_calibration(cell["calibration"]) for cell in cells if cell["calibration"]),
        "Budget preset": (_name(cell["budget"]) for cell in cells),
        "Data type": (str(cell["dtype"]) for cell in cells),
        "Commit": (_commit(run) for run in runs),
        "Hardware": (str(run.get("device")) for run in runs),
        "Platform": (f"{origin.get('platform')}, Python {origin.get('python')}" for origin in origins),
        "Versions": (_versions(origin.get("versions") or {}) for origin in origins),
        "Started": _span(str(run.get("started")) for run in runs),
        "Command": _first(str(run.get("command")) for run in runs),
    }
    joined = ((what, "; ".join(dict.fromkeys(values))) for what, values in found.items())
    return [(what, values) for what, values in joined if values]


def _name(choice: Any) -> str:
    return str(choice["name"] if isinstance(choice, Mapping) and "name" in choice else choice)


def _calibration(source: Any) -> str:
    if not isinstance(source, Mapping):
        return str(source)
    return f"{source.get('name')}, {source.get('samples')} windows of {source.get('window')} tokens"


def _recoveries(records: Iterable[Record]) -> Iterator[str]:
    """How fine-tuned cells were trained, and on how many tokens."""
    for record in records:
        if recover := record.cell.get("recover"):
            settings = ", ".join(f"{name} {value}" for name, value in recover.items() if name != "kind")
            tokens = (record.provenance.get("recovery") or {}).get("tokens")
            yield f"{recover.get('kind')} on {'?' if tokens is None else f'{tokens:,}'} tokens: {settings}"


def _later(origin: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The tasks of a cell that another run measured than the one it names, with that run's commit, device and so on."""
    return origin.get("tasks") or {}


def _commit(origin: Mapping[str, Any]) -> str:
    return f"{origin.get('git_commit') or 'no commit'}{' with uncommitted changes' if origin.get('git_dirty') else ''}"


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _first(commands: Iterable[str]) -> list[str]:
    """A few of many commands, which are long, and where the others are."""
    every = list(dict.fromkeys(commands))
    more = len(every) - COMMANDS
    return [*every[:COMMANDS], *([f"and {more} more, each in the records of its cells"] if more > 0 else [])]


def _span(times: Iterable[str]) -> list[str]:
    ordered = sorted(times)
    return [" to ".join(dict.fromkeys((ordered[0], ordered[-1])))] if ordered else []


def cautions(results: Sequence[Result]) -> Iterator[str]:
    """Sentences on what stands in the way of comparing rows, or is measured but shown nowhere."""
    yield from _several_commits(record.provenance for result in results for record in result.records)
    yield from uneven(results)
    for group in by_model(results):
        for fine_tuned in (False, True):
            yield from _unequal_settings([result for result in group if result.fine_tuned == fine_tuned])
    if hidden := _hidden(results):
        yield f"Measured but in none of the tables, see the records: {', '.join(hidden)}."


def _several_commits(origins: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What was measured at which commit, where there is more than one."""
    found: dict[str, set[str]] = defaultdict(set)
    for origin in origins:
        found[_commit(origin)].add("whole cells")
        for task, run in _later(origin).items():
            found[_commit(run)].add(task)
    if len(found) > 1:
        parts = "; ".join(f"{commit}: {', '.join(sorted(what))}" for commit, what in found.items())
        yield f"Measured at several commits, so numbers may differ because the program does. {parts}."


def _unequal_settings(results: Sequence[Result]) -> Iterator[str]:
    """Methods of one model that were not given the same calibration, budget, precision or basis."""
    runs = {
        (result.method, tuple(pair for pair in record.settings if not pair[0].startswith("method_config.")))
        for result in results
        if not result.dense
        for record in result.records
    }
    names = differing(settings for _, settings in runs)
    if names:
        given = sorted(f"{method}: {brief(settings, names)}" for method, settings in runs)
        yield f"The methods on {results[0].model} were not run with equal settings: {'; '.join(given)}."


def _hidden(results: Sequence[Result]) -> list[str]:
    """The metrics that no table shows, like the parts of a group or a task's second metric."""
    shown = set(judged(results))
    noted = {str(name) for name in shown} | {Measured(str(name), results).cut for name in shown}
    others = (name for name in metric_names(results) if name.quantity != "token_ppl" and name.source != "speed")
    return [str(name) for name in others if str(name) not in noted]
