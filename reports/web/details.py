"""Where the numbers of a row come from: everything its records say but the numbers, as text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from reports.records import Record
from reports.tables import plain


def details(rows: Iterable[Sequence[Record]]) -> dict[str, Any]:
    """Per row and record the numbers of its lines among all `lines`, `[what, text]`: most of them are shared."""
    numbers: dict[tuple[str, str], int] = {}
    cells = [
        [[numbers.setdefault(line, len(numbers)) for line in _lines(record)] for record in records] for records in rows
    ]
    return {"lines": list(numbers), "rows": cells}


def _lines(record: Record) -> Iterator[tuple[str, str]]:
    yield "status", record.status
    if record.error:
        yield "error", plain(record.error)
    yield from (("note", plain(note)) for note in record.notes)
    other_runs = record.provenance.get("tasks") or {}
    own = {name: value for name, value in record.provenance.items() if name != "tasks"}
    for part in (own, other_runs, record.cell, record.time, record.memory):
        yield from ((plain(name.replace("_", " ")), text) for name, value in part.items() if (text := _text(value)))


def _text(value: Any) -> str:
    """A value as a person writes it; empty where there is none."""
    if isinstance(value, Mapping):
        inner = ((plain(str(name)), _text(item)) for name, item in value.items())
        return "; ".join(f"{name}: {text}" for name, text in inner if text)
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else plain(str(value))
