"""The throughput table, like the paper's Table 15: tokens per second, a column per batch size."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

from reports.comparison import IDENTITY, identity, plus_minus, pooled_cell, remarks
from reports.footnotes import in_vain
from reports.results import Result, Results
from reports.speed import PHASES, RATE, batches, timed_on
from reports.standings import fields
from reports.tables import Cell, Column, Table, legend

BOLD = (
    " Bold: the fastest of a model's methods at one asked ratio, timed on one device; nothing was tested, so one well "
    "within ± of another is no faster. Dense and off-budget rows do not compete, and fine-tuned methods only with each "
    "other."
)


def throughput_table(results: Results) -> Table | None:
    """Tokens per second by batch size; None where fewer than two sizes were timed."""
    slots = [(phase, batch) for phase in PHASES for batch in batches(results)]
    shown = [result for result in results if any(result.metric(_rate(*slot)) for slot in slots)]
    if not shown or len(batches(results)) < 2:
        return None
    absent = [one for one in results.absent if any(one.model == result.model for result in shown)]
    first = {slot: _fastest(shown, _rate(*slot)) for slot in slots}
    rows = tuple((*identity(result), *(_cell(result, slot, first[slot]) for slot in slots)) for result in shown)
    return Table(
        name="throughput",
        title="Throughput",
        caption="Tokens per second (median of the repeats) by batch size, while reading the prompt (prefill) and while "
        f"generating (decode); ± is {plus_minus(shown)}.{BOLD if any(first.values()) else ''}",
        columns=(*IDENTITY, *(Column(f"batch {batch[1:]}", f"{phase.capitalize()}") for phase, batch in slots)),
        rows=rows,
        notes=(*legend(rows), *remarks(shown), *in_vain(absent)),
    )


def _cell(result: Result, slot: tuple[str, str], first: Collection[Result]) -> Cell:
    return replace(pooled_cell(result.metric(_rate(*slot))), best=result in first)


def _fastest(results: Sequence[Result], metric: str) -> set[Result]:
    """Those with the highest rate among those they can be compared with."""
    rates: dict[tuple[object, ...], dict[Result, float]] = defaultdict(dict)
    for number, field in enumerate(fields(results)):
        for result in field:
            if (rate := result.metric(metric)) and result.possible([metric]):
                rates[number, timed_on(result)][result] = rate.value
    raced = [found for found in rates.values() if len(found) > 1]
    return {result for found in raced for result, rate in found.items() if rate == max(found.values())}


def _rate(phase: str, batch: str) -> str:
    return f"speed/{RATE.format(phase)}@{batch}"
