"""The size table, with a sentence for every compressed model that is not smaller, and what tokens cost in money."""

from collections.abc import Iterator, Sequence

from reports.comparison import IDENTITY, identity, pooled_cell, remarks
from reports.limits import is_amount
from reports.results import Result, by_model, mean
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
    spent = None if result.dense else seconds(result)
    return (
        *identity(result),
        Cell(int(batch[1:])),
        _usd(None if spent is None else spent * usd_per_s),
        *(_usd(rate and usd_per_s * MILLION / rate) for rate in (_rate(result, name) for name in _rates(batch))),
    )


def seconds(result: Result) -> float | None:
    """What compressing and fine-tuning took, the mean over the seeds in which it is known and can be."""
    times = ((record.time.get("compress_s"), record.time.get("recover_s") or 0) for record in result.records)
    known = [first + then for first, then in times if first is not None and is_amount(first) and is_amount(then)]
    return mean(known) if known else None


def _rate(result: Result, name: str) -> float | None:
    """Tokens per second, if they are known, can be and are any."""
    found = result.metric(name)
    return (found.value or None) if found and result.possible([name]) else None


def _usd(amount: float | None) -> Cell:
    """Three digits, however small; no price where a number behind it cannot be."""
    return Cell(amount, digits=f"{amount:.3g}") if amount is not None and is_amount(amount) else Cell(None)
