"""The size table, with a sentence for every compressed model that is not smaller, and what tokens cost in money."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from reports.comparison import IDENTITY, identity, pooled_cell, remarks
from reports.results import Result, by_model
from reports.speed import PHASES, RATE, batches
from reports.tables import Cell, Column, Table, legend, number

MILLION = 1e6
WEIGHTS = "speed/weights_bytes"
COUNTS = {
    "active": "active_total",
    "active in blocks": "active_block",
    "distinct": "distinct_total",
    "stored": "stored_total",
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


def cost_table(results: Sequence[Result], usd_per_hour: float) -> Table | None:
    """What compressing and a million tokens cost at a stated price of the device; None where nothing was timed."""
    keys = [(result, batch) for group in by_model(results) for batch in batches(results) for result in group]
    keys = [(result, batch) for result, batch in keys if any(result.metric(rate) for rate in _rates(batch))]
    rows = tuple(_cost_row(result, batch, usd_per_hour / 3600) for result, batch in keys)
    if not rows:
        return None
    return Table(
        name="cost",
        title="Cost",
        caption=f"US dollars at {usd_per_hour:g} USD per hour of the device, a price that was given to the report: of "
        "compressing (with the fine-tuning, where there was one), and of a million tokens at the measured speed.",
        columns=(
            *IDENTITY,
            Column("Batch"),
            Column("Compressing, USD"),
            *(Column(phase, "USD per million tokens") for phase in PHASES),
        ),
        rows=rows,
        notes=(*legend(rows), *remarks(results)),
    )


def _rates(batch: str) -> list[str]:
    return [f"speed/{RATE.format(phase)}@{batch}" for phase in PHASES]


def _cost_row(result: Result, batch: str, usd_per_s: float) -> tuple[Cell, ...]:
    times = [record.time for record in result.records if record.time.get("compress_s") is not None]
    seconds = [time["compress_s"] + (time.get("recover_s") or 0) for time in times]
    rates = [result.metric(rate) for rate in _rates(batch)]
    return (
        *identity(result),
        Cell(int(batch[1:])),
        _usd(None if result.dense or not seconds else fmean(seconds) * usd_per_s),
        *(_usd(usd_per_s * MILLION / rate.value if rate and rate.value else None) for rate in rates),
    )


def _usd(amount: float | None) -> Cell:
    """Three digits, however small."""
    return Cell(None if amount is None else f"{amount:.3g}")
