"""What the head of a report says: what was run, with what, where; and what to be careful about."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from reports.accuracy import judged
from reports.comparison import metric_names
from reports.results import Result, brief, by_model, differing, settings_of
from reports.tables import percent


def facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    """`(what, values)` over all finished cells, in the order of the report."""
    records = [record for result in results for record in result.records]
    cells, origins = [record.cell for record in records], [record.provenance for record in records]
    found = {
        "Models": (cell["model"] for cell in cells),
        "Methods": (cell["method"] for cell in cells),
        "Ratios": (f"{percent(c['ratio']):g} % ({c['ratio_basis']} basis)" for c in cells if c["method"] != "dense"),
        "Seeds": (str(cell["seed"]) for cell in cells),
        "Calibration": (_calibration(cell["calibration"]) for cell in cells if cell["calibration"]),
        "Budget preset": (_name(cell["budget"]) for cell in cells),
        "Data type": (str(cell["dtype"]) for cell in cells),
        "Commit": (_commit(origin) for origin in origins),
        "Hardware": (str(origin.get("device")) for origin in origins),
        "Platform": (f"{origin.get('platform')}, Python {origin.get('python')}" for origin in origins),
        "Versions": (_versions(origin.get("versions") or {}) for origin in origins),
        "Started": _span(str(origin.get("started")) for origin in origins),
        "Command": (str(origin.get("command")) for origin in origins),
    }
    joined = ((what, "; ".join(dict.fromkeys(values))) for what, values in found.items())
    return [(what, values) for what, values in joined if values]


def _name(choice: Any) -> str:
    return str(choice["name"] if isinstance(choice, Mapping) and "name" in choice else choice)


def _calibration(source: Any) -> str:
    if not isinstance(source, Mapping):
        return str(source)
    return f"{source.get('name')}, {source.get('samples')} windows of {source.get('window')} tokens"


def _commit(origin: Mapping[str, Any]) -> str:
    return f"{origin.get('git_commit') or 'no commit'}{' with uncommitted changes' if origin.get('git_dirty') else ''}"


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _span(times: Iterable[str]) -> list[str]:
    ordered = sorted(times)
    return [" to ".join(dict.fromkeys((ordered[0], ordered[-1])))] if ordered else []


def cautions(results: Sequence[Result]) -> Iterator[str]:
    """Sentences on what stands in the way of comparing rows, or is measured but shown nowhere."""
    for group in by_model(results):
        yield from _unequal_settings(group)
    if hidden := _hidden(results):
        yield f"Measured but in none of the tables, see the records: {', '.join(hidden)}."


def _unequal_settings(results: Sequence[Result]) -> Iterator[str]:
    """Methods of one model that were not given the same calibration, budget, precision or basis."""
    runs = {
        (result.method, tuple(pair for pair in settings_of(record) if not pair[0].startswith("method_config.")))
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
    others = (name for name in metric_names(results) if name not in shown)
    return [str(name) for name in others if name.quantity != "token_ppl" and name.source != "speed"]
