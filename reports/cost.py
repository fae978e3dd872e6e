"""The size and speed tables, with a sentence for every compressed model that is not smaller or not faster."""

from collections.abc import Iterator, Sequence

from reports.comparison import IDENTITY, identity, metric_names, plus_minus, pooled_cell, remarks
from reports.results import Result, by_model
from reports.tables import Cell, Column, Table, legend, number

MILLION = 1e6
WEIGHTS = "speed/weights_bytes"
COUNTS = {
    "active": "active_total",
    "active in blocks": "active_block",
    "distinct": "distinct_total",
    "stored": "stored_total",
}
SPEEDS = {
    "prefill": ("prefill_tokens_per_s", "prefill_tokens_per_s_vs_dense"),
    "decode": ("decode_tokens_per_s", "decode_tokens_per_s_vs_dense"),
}


def size_table(results: Sequence[Result]) -> Table | None:
    """Counted parameters and bytes of every result; None without results."""
    rows = tuple(_size_row(result) for result in results)
    if not rows:
        return None
    return Table(
        name="size",
        title="Size",
        caption="Parameters, counted from the tensors (active: what a token's forward pass uses), and weights in MB.",
        columns=(
            *IDENTITY,
            *(Column(label, "Parameters, millions") for label in COUNTS),
            Column("On disk, MB"),
            Column("In memory, MB"),
        ),
        rows=rows,
        notes=(*legend(rows), *remarks(results), *_not_smaller(results)),
    )


def _size_row(result: Result) -> tuple[Cell, ...]:
    return (
        *identity(result),
        *(Cell(result.size(key) / MILLION) for key in COUNTS.values()),
        Cell(result.size("stored_bytes") / MILLION),
        pooled_cell(result.metric(WEIGHTS), 1 / MILLION),
    )


def _not_smaller(results: Sequence[Result]) -> Iterator[str]:
    dense = {result.model: result.size("stored_bytes") / MILLION for result in results if result.dense}
    for result in results:
        own, reference = result.size("stored_bytes") / MILLION, dense.get(result.model)
        if not result.dense and reference is not None and own >= reference:
            yield f"{result.title} is not smaller on disk than dense: {number(own)} against {number(reference)} MB."


def speed_table(results: Sequence[Result]) -> Table | None:
    """Tokens per second and peak memory at every batch size; None where none was measured."""
    names = [name for name in metric_names(results) if name.source == "speed" and name.protocol.startswith("b")]
    batches = sorted({name.protocol for name in names}, key=lambda batch: int(batch.removeprefix("b")))
    measured = [result for result in results if any(_timed(result, batch) for batch in batches)]
    keys = [(result, batch) for group in by_model(measured) for batch in batches for result in group]
    rows = tuple(_speed_row(result, batch) for result, batch in keys if _timed(result, batch))
    if not rows:
        return None
    return Table(
        name="speed",
        title="Speed",
        caption="Tokens per second (median of the repeats) while reading the prompt (prefill) and while generating "
        f"(decode), their ratio to the dense model measured beside it, and peak memory; ± is {plus_minus(measured)}.",
        columns=_speed_columns(),
        rows=rows,
        notes=(*legend(rows), *remarks(measured), *_not_faster(measured, batches), *_hardware(measured)),
    )


def _speed_columns() -> tuple[Column, ...]:
    return (
        *IDENTITY,
        Column("Batch"),
        *(Column(label, phase.capitalize()) for phase in SPEEDS for label in ("tokens/s", "vs dense")),
        Column("Peak, MB"),
    )


def _timed(result: Result, batch: str) -> bool:
    return any(result.metric(f"speed/{speed}@{batch}") for speeds in SPEEDS.values() for speed in speeds)


def _speed_row(result: Result, batch: str) -> tuple[Cell, ...]:
    speeds = (f"speed/{speed}@{batch}" for pair in SPEEDS.values() for speed in pair)
    return (
        *identity(result),
        Cell(int(batch.removeprefix("b"))),
        *(pooled_cell(result.metric(speed)) for speed in speeds),
        pooled_cell(result.metric(f"speed/peak_bytes@{batch}"), 1 / MILLION),
    )


def _not_faster(results: Sequence[Result], batches: Sequence[str]) -> Iterator[str]:
    """A sentence per compressed model whose speed is somewhere not two standard errors above the dense one."""
    for result in results:
        slow = [text for batch in batches for text in _slow_phases(result, batch)]
        if slow and not result.dense:
            yield f"{result.title} is not measurably faster than dense in {', '.join(slow)}."


def _slow_phases(result: Result, batch: str) -> Iterator[str]:
    for phase, (_, versus_dense) in SPEEDS.items():
        ratio = result.metric(f"speed/{versus_dense}@{batch}")
        if ratio is not None and ratio.value - 2 * (ratio.error or 0) <= 1:
            yield f"{phase} at batch {batch.removeprefix('b')} ({number(ratio.value, ratio.error)} of its speed)"


def _hardware(results: Sequence[Result]) -> Iterator[str]:
    origins = [record.provenance for result in results for record in result.records]
    devices = sorted({str(((origin.get("tasks") or {}).get("speed") or origin).get("device")) for origin in origins})
    if len(devices) > 1:
        yield f"Timed on different devices, so compare only 'vs dense' between rows: {'; '.join(devices)}."
