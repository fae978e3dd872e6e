"""The table of what compressing itself took, with what the methods had to say."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from reports.comparison import IDENTITY, identity, remarks
from reports.records import Record
from reports.results import Result, mean
from reports.tables import Cell, Column, Table, legend

MB = 1e6


def compression_table(results: Sequence[Result]) -> Table | None:
    """Time and peak memory of every compression; None without compressed models."""
    made = [result for result in results if not result.dense]
    times = {"Time, s": "compress_s"} | ({"Fine-tuning, s": "recover_s"} if any(r.fine_tuned for r in made) else {})
    rows = tuple(_row(result, times.values()) for result in made)
    if not rows:
        return None
    return Table(
        name="compression",
        title="Compression",
        caption="Time and peak memory of compressing (loading and calibration included in the memory, evaluation in "
        "neither); means over seeds.",
        columns=(*IDENTITY, *map(Column, (*times, "Peak host, MB", "Peak device, MB"))),
        rows=rows,
        notes=(*legend(rows), *remarks(made), *_told(made)),
    )


def _row(result: Result, times: Iterable[str]) -> tuple[Cell, ...]:
    return (
        *identity(result),
        *(Cell(_mean(result, lambda record: record.time, key)) for key in times),
        *(
            Cell(_mean(result, lambda record: record.memory, f"compress_peak_{where}_bytes", 1 / MB))
            for where in ("host", "device")
        ),
    )


def _mean(
    result: Result, part: Callable[[Record], Mapping[str, float | None]], key: str, scale: float = 1
) -> float | None:
    """The mean over the seeds that have the figure."""
    found = [value for record in result.records if (value := part(record).get(key)) is not None]
    return mean(found) * scale if found else None


def _told(results: Sequence[Result]) -> Iterator[str]:
    """Each note once, with the rows it is about."""
    rows: dict[str, dict[str, None]] = {}
    for result in results:
        for note in (note for record in result.records for note in record.notes):
            rows.setdefault(note, {})[result.title] = None
    for note, titles in rows.items():
        yield f"{note[:1].upper()}{note[1:]}: {'; '.join(titles)}."
