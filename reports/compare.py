"""Two folders of results against each other: what got better, worse or stayed the same, by the paired tests.

python -m reports compare results out/results
python -m reports compare results out/results --out out/comparison
"""

import argparse
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reports.accuracy import judged
from reports.comparison import UNEVEN, MetricName, identity, pooled_cell, uncounted
from reports.formats import FORMATS
from reports.perplexity import texts
from reports.records import read_all
from reports.results import Result, pool
from reports.samples import UnpairedError, check_paired, samples
from reports.settings import Settings, brief, differing
from reports.significance import TESTED, tested_cells
from reports.standings import compared, lower_is_better
from reports.statistics import ALPHA, Estimate, holm
from reports.tables import Cell, Column, Table, legend
from reports.terminal import terminal
from reports.write import write

Key = tuple[str, str, float, Settings]
FOLDERS = ("A", "B")
COLUMNS = (
    Column("Model", text=True),
    Column("Asked, %"),
    *(Column(folder, "Counted, %") for folder in FOLDERS),
    Column("Method", text=True),
    Column("Measured", text=True),
    *map(Column, FOLDERS),
    Column("B against A"),
    *TESTED,
)
CAPTION = (
    "Every model, method, ratio and settings that both folders have. The difference is B minus A in points (per cent "
    "of right answers), or B divided by A for perplexity, with its 95 % interval on the documents that both saw; the "
    f"verdict says what B is, at a level of {100 * ALPHA:g} % after Holm's correction over all tests of this table. "
    f"Sizes more than {100 * UNEVEN:g} % of the dense model apart are not judged."
)


@dataclass(frozen=True, eq=False)
class Pair:
    """One metric in both folders."""

    results: tuple[Result, Result]
    """Of A and of B."""
    name: MetricName
    """The metric."""
    found: Estimate | None
    """B minus A; None: not tested."""
    why: str = ""
    """Why it was not tested."""
    adjusted: float = math.nan
    """p after Holm's correction."""

    @property
    def uneven(self) -> bool:
        """Whether part of the difference is one of size."""
        first, second = (result.size("active_total") / result.size("dense_params") for result in self.results)
        return abs(first - second) > UNEVEN

    @property
    def verdict(self) -> str:
        """What B is."""
        if not self.found:
            return f"not compared: {self.why}"
        if self.uneven:
            return "not compared: not of one size"
        if self.adjusted >= ALPHA:
            return "tied"
        return "better" if (self.found.value < 0) == lower_is_better((str(self.name),)) else "worse"


def comparison_table(first: Sequence[Result], second: Sequence[Result], remarks: Sequence[str] = ()) -> Table:
    """A row per metric of every cell that both have; the notes count the verdicts and name what only one has."""
    ours, theirs = _keyed(first), _keyed(second)
    pairs = _corrected([pair for key in ours if key in theirs for pair in _pairs(ours[key], theirs[key])])
    rows = tuple(_row(pair) for pair in pairs)
    return Table(
        name="comparison",
        title="Comparison of two folders",
        caption=CAPTION,
        columns=COLUMNS,
        rows=rows,
        notes=(
            *remarks,
            _counted(pairs),
            *_unmatched(ours, theirs),
            *uncounted(result for pair in pairs for result in pair.results),
            *legend(rows),
        ),
    )


def _keyed(results: Sequence[Result]) -> dict[Key, Result]:
    """The results by what must be the same in both folders."""
    cells = ((result, result.records[0]) for result in results)
    return {(r.model, record.cell["method"], r.ratio, record.settings): r for r, record in cells}


def _pairs(first: Result, second: Result) -> Iterator[Pair]:
    both = [first, second]
    for name in (*texts(both), *judged(both)):
        yield _pair(first, second, name)


def _pair(first: Result, second: Result, name: MetricName) -> Pair:
    results, metric = (first, second), str(name)
    for folder, result in zip(FOLDERS, results, strict=True):
        if result.metric(metric) is None:
            return Pair(results, name, None, f"{folder} has not measured it")
    try:
        old, new = samples(first, metric), samples(second, metric)
        check_paired(new, old)
    except UnpairedError as error:
        return Pair(results, name, None, f"{error}")
    return Pair(results, name, compared([new], [old]))


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    adjusted = iter(holm([pair.found.p for pair in pairs if pair.found]))
    return [replace(pair, adjusted=next(adjusted)) if pair.found else pair for pair in pairs]


def _row(pair: Pair) -> tuple[Cell, ...]:
    perplexity = lower_is_better((str(pair.name),))
    scale = 1 if perplexity else 100
    (*head, counted, method), (*_, in_b, _) = map(identity, pair.results)
    return (
        *(*head, counted, in_b, method),
        Cell(str(pair.name)),
        *(pooled_cell(result.metric(str(pair.name)), scale) for result in pair.results),
        *tested_cells(pair.found, pair.adjusted, perplexity),
        Cell(pair.verdict),
    )


def _counted(pairs: Sequence[Pair]) -> str:
    counts = Counter(pair.verdict.partition(":")[0] for pair in pairs)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("better", "worse", "tied", "not compared"))
    return f"B is: {told}." if pairs else "There is no cell that both folders have measured with the same settings."


def _unmatched(ours: Mapping[Key, Result], theirs: Mapping[Key, Result]) -> Iterator[str]:
    """What only one folder has, and what both have but measured with other settings."""
    only = [key for key in ours if key not in theirs], [key for key in theirs if key not in ours]
    unlike = {key: other for key in only[0] if (other := _nearest(key, only[1]))}
    reasons: dict[str, list[str]] = defaultdict(list)
    for key, other in unlike.items():
        names = differing([key[-1], other[-1]])
        first, second = (brief(settings, names) or "none" for settings in (key[-1], other[-1]))
        reasons[f"Other settings in A ({first}) than in B ({second})"].append(ours[key].title)
    for folder, keys, results in zip(FOLDERS, only, (ours, theirs), strict=True):
        reasons[f"Only in {folder}"] = [results[key].title for key in keys if key not in {*unlike, *unlike.values()}]
    yield from (f"{why}: {'; '.join(dict.fromkeys(titles))}." for why, titles in reasons.items() if titles)


def _nearest(key: Key, others: Iterable[Key]) -> Key | None:
    """The same model, method and ratio with the fewest other settings."""
    same = (other for other in others if other[:-1] == key[:-1])
    return min(same, key=lambda other: len(differing([key[-1], other[-1]])), default=None)


def main(arguments: Sequence[str]) -> int:
    """Compare, print, write.

    Raises:
        ReportError: a folder is not there, or nothing can be written.
    """
    parser = argparse.ArgumentParser(prog="python -m reports compare", description=__doc__)
    for name in FOLDERS:
        parser.add_argument(name, type=Path, help="folder that run_all.py --out wrote to")
    parser.add_argument("--out", type=Path, help="folder for the table as markdown, LaTeX, CSV and HTML")
    options = parser.parse_args(arguments)
    folders = [(name, getattr(options, name)) for name in FOLDERS]
    records = [read_all(folder) for _, folder in folders]
    problems = (
        f"{name}: {problem}" for (name, _), read in zip(folders, records, strict=True) for problem in read.problems
    )
    remarks = [*(f"{name} is {folder}." for name, folder in folders), *problems]
    first, second = map(pool, records)
    table = comparison_table(first, second, remarks)
    print(terminal(table, shutil.get_terminal_size().columns), end="")
    if options.out:
        write({f"{table.name}.{suffix}": render(table) for suffix, render in FORMATS.items()}, options.out)
    return 0
