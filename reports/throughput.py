"""The throughput table, like the paper's Table 15: tokens per second, a column per batch size."""

from collections.abc import Sequence

from reports.comparison import IDENTITY, identity, plus_minus, pooled_cell, remarks
from reports.results import Result
from reports.speed import PHASES, RATE, batches
from reports.tables import Column, Table, legend


def throughput_table(results: Sequence[Result]) -> Table | None:
    """Tokens per second by batch size; None where fewer than two sizes were timed."""
    slots = [(phase, batch) for phase in PHASES for batch in batches(results)]
    shown = [result for result in results if any(result.metric(_rate(*slot)) for slot in slots)]
    if not shown or len(batches(results)) < 2:
        return None
    rows = tuple((*identity(r), *(pooled_cell(r.metric(_rate(*slot))) for slot in slots)) for r in shown)
    return Table(
        name="throughput",
        title="Throughput",
        caption="Tokens per second (median of the repeats) by batch size, while reading the prompt (prefill) and while "
        f"generating (decode); ± is {plus_minus(shown)}.",
        columns=(*IDENTITY, *(Column(f"batch {batch[1:]}", f"{phase.capitalize()}") for phase, batch in slots)),
        rows=rows,
        notes=(*legend(rows), *remarks(shown)),
    )


def _rate(phase: str, batch: str) -> str:
    return f"speed/{RATE.format(phase)}@{batch}"
