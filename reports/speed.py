"""The tables of the speed task: rates beside the dense model's, latencies, and the work and memory of a token."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from reports.comparison import IDENTITY, identity, metric_names, plus_minus, pooled_cell, remarks
from reports.results import Pooled, Result, by_model
from reports.tables import Cell, Column, Table, legend, number

PHASES = ("prefill", "decode")
RATE = "{}_tokens_per_s"
BATCH = re.compile(r"b\d+")


@dataclass(frozen=True)
class Figure:
    """A column of numbers."""

    column: Column
    """Its header."""
    metric: str
    """The metric's name without `speed/`; `@` at its end stands for the row's batch size."""
    scale: float = 1
    """From the metric's unit to the column's."""
    optional: bool = False
    """Whether the column is left out where no row has it."""

    def of(self, batch: str) -> str:
        """The metric at a batch size, as in `b4`."""
        return f"speed/{self.metric}{batch if self.metric.endswith('@') else ''}"

    def cell(self, result: Result, batch: str) -> Cell:
        """The row's number."""
        return pooled_cell(result.metric(self.of(batch)), self.scale)


Notes = Callable[[Sequence[Result]], Iterable[str]]
"""From the results of a table to the sentences below it."""


def _rates(phase: str) -> tuple[Figure, ...]:
    rate, group = RATE.format(phase), phase.capitalize()
    return (
        Figure(Column("tokens/s", group), f"{rate}@"),
        Figure(Column("quartiles apart", group), f"{rate}_iqr@", optional=True),
        Figure(Column("vs dense", group), f"{rate}_vs_dense@"),
    )


SPEED = (
    *(figure for phase in PHASES for figure in _rates(phase)),
    Figure(Column("Peak, MB"), "peak_bytes@", 1e-6),
    Figure(Column("Peak of host, MB"), "peak_host_bytes@", 1e-6, optional=True),
)
LATENCY = tuple(
    Figure(Column(f"p{percent}", f"{which.capitalize()} token, ms"), f"{which}_token_s_p{percent}@", 1e3)
    for which in ("first", "next")
    for percent in (50, 90, 99)
)
WORK = (
    Figure(Column("Cache, kB per token"), "cache_bytes_per_token", 1e-3),
    *(Figure(Column(phase, "MFLOP per token"), f"{phase}_flops_per_token", 1e-6) for phase in PHASES),
    *(Figure(Column(phase, "Time over bound"), f"{phase}_time_over_bound@") for phase in PHASES),
    *(Figure(Column(phase, "mJ per token"), f"{phase}_joules_per_token@", 1e3, optional=True) for phase in PHASES),
)


def speed_table(results: Sequence[Result]) -> Table | None:
    """Tokens per second and peak memory at every batch size; None where none was measured."""
    return _table(
        "speed",
        "Speed",
        "Tokens per second (median of the repeats) while reading the prompt (prefill) and while generating "
        "(decode), their ratio to the dense model measured beside it, and peak memory; "
        f"± is {plus_minus(timed(results))}.",
        SPEED,
        results,
        lambda measured: (*_not_faster(measured), *_last_batches(measured), *_hardware(measured)),
    )


def latency_table(results: Sequence[Result]) -> Table | None:
    """Percentiles of the time to a token at every batch size; None where none was measured."""
    return _table(
        "latency",
        "Latency",
        "Time to the first token after the prompt was given, over repeats, and from one token to the next, over all "
        "tokens of all repeats: median, and what nine in ten and 99 in a hundred stay below.",
        LATENCY,
        results,
        lambda measured: (),
    )


def work_table(results: Sequence[Result]) -> Table | None:
    """Cache, FLOPs, energy and the distance from the roofline at every batch size; None where none was counted."""
    return _table(
        "work",
        "Work of a token",
        "Bytes of the KV cache, measured; floating point operations, counted from the tensors that a token uses; and "
        "the time taken over the least time in which the device, as measured in the same run, reads the bytes and does "
        "the operations (below 1 where the weights fit into a processor's caches).",
        WORK,
        results,
        lambda measured: (*_ceilings(measured), *_energy(measured)),
    )


def _table(
    name: str, title: str, caption: str, figures: Sequence[Figure], results: Sequence[Result], notes: Notes
) -> Table | None:
    """A row per result and batch size at which there is one of the figures; None where there is none."""
    keys = [
        (result, batch)
        for group in by_model(results)
        for batch in batches(results)
        for result in group
        if any(result.metric(figure.of(batch)) for figure in figures if figure.metric.endswith("@"))
    ]
    if not keys:
        return None
    shown = [f for f in figures if not f.optional or any(result.metric(f.of(batch)) for result, batch in keys)]
    rows = tuple(
        (*identity(result), Cell(int(batch[1:])), *(figure.cell(result, batch) for figure in shown))
        for result, batch in keys
    )
    with_rows = {result for result, _ in keys}
    measured = [result for result in results if result in with_rows]
    return Table(
        name=name,
        title=title,
        caption=caption,
        columns=(*IDENTITY, Column("Batch"), *(figure.column for figure in shown)),
        rows=rows,
        notes=(*legend(rows), *remarks(measured), *notes(measured)),
    )


def batches(results: Sequence[Result]) -> list[str]:
    """The batch sizes that any result was timed at, as in `b4`, ascending."""
    names = [name for name in metric_names(results) if name.source == "speed" and BATCH.fullmatch(name.protocol)]
    return sorted({name.protocol for name in names}, key=lambda batch: int(batch[1:]))


def timed(results: Sequence[Result]) -> list[Result]:
    """The results that have a speed."""
    return [result for result in results if any(name.source == "speed" for name in metric_names([result]))]


def _not_faster(results: Sequence[Result]) -> Iterator[str]:
    """A sentence per compressed model whose speed is somewhere not two standard errors above the dense one."""
    sizes = batches(results)
    for result in results:
        slow = [text for batch in sizes for text in _slow_phases(result, batch)]
        if slow and not result.dense:
            yield f"{result.title} is not measurably faster than dense in {', '.join(slow)}."


def _slow_phases(result: Result, batch: str) -> Iterator[str]:
    for phase in PHASES:
        ratio = result.metric(f"speed/{RATE.format(phase)}_vs_dense@{batch}")
        if ratio is not None and ratio.value - 2 * (ratio.error or 0) <= 1:
            yield f"{phase} at batch {batch[1:]} ({number(ratio.value, ratio.error)} of its speed)"


def _last_batches(results: Sequence[Result]) -> Iterator[str]:
    """Where memory ended the sweep, and that elsewhere it was the preset's list."""
    yield from _without_room(results)
    tried = [result.metric("speed/largest_batch") for result in results if not _refused(result)]
    if lasts := sorted({last.value for last in tried if last}):
        batches = " or ".join(f"{last:g}" for last in lasts)
        yield f"Where memory did not end the sweep, the preset's last batch did ({batches}): larger ones may fit."


def _refused(result: Result) -> Pooled | None:
    return result.metric("speed/batch_without_room")


def _without_room(results: Sequence[Result]) -> Iterator[str]:
    """A sentence per model whose sweep memory ended. A compressed model has the dense one beside it there."""
    for result in results:
        last, refused = result.metric("speed/largest_batch"), _refused(result)
        if last and refused:
            beside = "" if result.dense else " beside the dense model"
            yield f"{result.title}: memory holds a batch of {last.value:g}{beside}, not of {refused.value:g}."


def _ceilings(results: Sequence[Result]) -> Iterator[str]:
    """What the device was seen to do, beside one model or another."""
    found = [[result.metric(f"speed/{name}_per_s") for result in results] for name in ("read_bytes", "peak_flops")]
    read, did = ([number(metric.value / 1e9) for metric in metrics if metric] for metrics in found)
    if read and did:
        yield f"The device read {_from_to(read)} GB/s and did {_from_to(did)} GFLOP/s."


def _from_to(numbers: Sequence[str]) -> str:
    ends = dict.fromkeys((min(numbers, key=float), max(numbers, key=float)))
    return " to ".join(ends)


def _energy(results: Sequence[Result]) -> Iterator[str]:
    if not any(name.quantity.endswith("_joules_per_token") for name in metric_names(results)):
        yield "Energy: not measured, as no counter could be read."


def devices(result: Result, task: str = "") -> frozenset[str]:
    """Those that compressed it, or those that measured one of its tasks."""
    origins = [record.provenance for record in result.records]
    return frozenset(str(((origin.get("tasks") or {}).get(task) or origin).get("device")) for origin in origins)


def timed_on(result: Result) -> tuple[frozenset[str], float | None]:
    """The devices that timed it, and the number of processor threads."""
    threads = result.metric("speed/threads")
    return devices(result, "speed"), threads and threads.value


def _hardware(results: Sequence[Result]) -> Iterator[str]:
    found = [timed_on(result) for result in results]
    names = sorted({name for each, _ in found for name in each})
    counts = sorted({count for _, count in found if count})
    if counts:
        yield f"Timed with {' or '.join(f'{count:g}' for count in counts)} processor threads."
    if len(names) > 1:
        yield f"Timed on different devices, so compare only 'vs dense' between rows: {'; '.join(names)}."
