"""Who is best in a column of a table, and who is not significantly worse.

Methods compete within one model and one asked ratio (of one basis, in one data type), fine-tuned ones among themselves.
The dense model does not compete, nor what missed its budget, nor numbers that cannot be. Each method is tested against
the best on the documents that both saw, and the p-values of a table are corrected together.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache

import numpy as np

from reports.comparison import Measured, parse
from reports.results import Result
from reports.samples import NO_SAMPLES, Samples, UnpairedError, check_paired, samples
from reports.statistics import ALPHA, RESAMPLES, Estimate, Stratum, bootstrap, holm, mcnemar, newcombe
from reports.tables import TIED, Cell, percent

Names = tuple[str, ...]
"""What a column shows: one metric, or the average of several."""
Reader = Callable[[Result, str], Samples]

COMPETING = (
    "Bold: the best of a model's methods at one asked ratio. Dense, off-budget and ‡ numbers do not compete, and "
    "fine-tuned methods only with each other."
)
TESTED = {
    True: f"paired bootstrap over windows ({RESAMPLES:,} resamples)",
    False: f"exact McNemar test, or paired bootstrap over documents ({RESAMPLES:,} resamples) for averages and seeds",
}
"""How perplexities are tested, and how tasks are."""
BEST_HAS = "the best has {}"


@dataclass(frozen=True, eq=False)
class Rival:
    """A method against the best."""

    result: Result
    """The method's result."""
    found: Estimate | None = None
    """Its scores minus those of the best; in nats per token for perplexity. None: not tested."""
    adjusted: float = math.nan
    """p after Holm's correction over the table."""
    why: str = ""
    """Why it was not tested."""

    @property
    def tied(self) -> bool:
        """Whether it was tested and is not significantly worse."""
        return self.found is not None and self.adjusted >= ALPHA


@dataclass(frozen=True, eq=False)
class Race:
    """One column among the methods of one model at one ratio."""

    names: Names
    """The column."""
    best: Result
    """The first of those with the best number."""
    winners: tuple[Result, ...]
    """All with that number."""
    rivals: tuple[Rival, ...]
    """All but `best`, from good to bad."""


@dataclass(frozen=True, eq=False)
class Standings:
    """The races of one table."""

    races: tuple[Race, ...]
    """Those in which at least two methods can be compared."""

    @cached_property
    def _best(self) -> set[tuple[Names, Result]]:
        return {(race.names, winner) for race in self.races for winner in race.winners}

    @cached_property
    def _tied(self) -> set[tuple[Names, Result]]:
        return {(race.names, rival.result) for race in self.races for rival in race.rivals if rival.tied}

    def cell(self, cell: Cell, result: Result, names: Names) -> Cell:
        """The cell of a result, marked where it is the best or tied with it."""
        best = (names, result) in self._best
        tied = not best and (names, result) in self._tied
        return replace(cell, best=best, marks=cell.marks + (TIED if tied else ""))

    def notes(self, competing: str = COMPETING) -> Iterator[str]:
        """What bold means, which tests were made and which could not be."""
        rivals = [rival for race in self.races for rival in race.rivals]
        if not rivals:
            return
        yield competing
        tested = sum(rival.found is not None for rival in rivals)
        if tested:
            how = "; ".join(dict.fromkeys(TESTED[lower_is_better(race.names)] for race in self.races))
            yield (
                f"Tested against the best on the same documents: {how}; Holm's correction over all {tested} "
                "comparisons of this table, level 5 %. The best was picked on these documents, which flatters it a bit."
            )
        yield from _untested(rivals)


def _untested(rivals: Sequence[Rival]) -> Iterator[str]:
    if {rival.why for rival in rivals} <= {NO_SAMPLES, BEST_HAS.format(NO_SAMPLES)}:
        yield "No method is called tied with the best: there are no scores per document to test it with."
        return
    untested = [rival for rival in rivals if rival.found is None]
    whole = _whole(rivals)
    for why in dict.fromkeys(rival.why for rival in untested):
        results = [rival.result for rival in untested if rival.why == why]
        named = (next((every for every in _all(one) if whole[every] == {why}), one.title) for one in results)
        yield f"Not tested, so not called tied: {'; '.join(dict.fromkeys(named))} ({why})."


def _whole(rivals: Iterable[Rival]) -> Mapping[str, set[str]]:
    """Why models, and those at one ratio, were not tested; nothing is the reason of what was."""
    whys: dict[str, set[str]] = defaultdict(set)
    for rival in rivals:
        for every in _all(rival.result):
            whys[every].add(rival.why)
    return whys


def _all(result: Result) -> tuple[str, str]:
    """How a sentence names all that compete on the result's model, and at its ratio."""
    return f"all of {result.model}", f"all of {result.model} at {percent(result.ratio):g} %"


def lower_is_better(names: Names) -> bool:
    """Whether a column holds perplexities."""
    return parse(names[0]).quantity == "token_ppl"


@lru_cache(maxsize=16)  # a table and the list of its tests ask for the same
def standings(groups: tuple[tuple[Result, ...], ...], columns: tuple[Names, ...]) -> Standings:
    """The races of a table over its columns, each among results of one group, tested and corrected."""
    read = cache(samples)
    competing = [field for group in groups for field in fields(group)]
    # Column by column, because the races of a column can share the draws of a bootstrap.
    drafts = [race for names in columns for field in competing for race in _race(field, names)]
    return Standings(_corrected([_tested(race, read) for race in drafts]))


def fields(results: Iterable[Result]) -> list[list[Result]]:
    """The results that compete, those together that do so with each other."""
    found: dict[tuple[object, ...], list[Result]] = defaultdict(list)
    for result in results:
        if not result.dense and result.on_budget:
            cell = result.records[0].cell
            found[result.model, result.ratio, cell["ratio_basis"], cell["dtype"], result.fine_tuned].append(result)
    return list(found.values())


def _race(group: Sequence[Result], names: Names) -> Iterator[Race]:
    """The race, untested, if there is one: what was measured otherwise than most cannot be best."""
    pooled = {result: result.average(names) for result in group if result.possible(names)}
    values = {result: found.value for result, found in pooled.items() if found and math.isfinite(found.value)}
    measured = [Measured(name, list(values)) for name in names]
    alike = [result for result in values if not any(metric.unlike(result) for metric in measured)]
    if len(alike) < 2:
        return
    sign = 1 if lower_is_better(names) else -1
    ranked = sorted(values, key=lambda result: (result not in alike, sign * values[result]))
    winners = tuple(result for result in alike if values[result] == values[ranked[0]])
    yield Race(names, ranked[0], winners, tuple(Rival(result) for result in ranked[1:]))


def _tested(race: Race, read: Reader) -> Race:
    try:
        best = [read(race.best, name) for name in race.names]
    except UnpairedError as error:
        return replace(race, rivals=tuple(replace(rival, why=BEST_HAS.format(error)) for rival in race.rivals))
    return replace(race, rivals=tuple(_against(best, rival, race.names, read) for rival in race.rivals))


def _against(best: Sequence[Samples], rival: Rival, names: Names, read: Reader) -> Rival:
    try:
        own = [read(rival.result, name) for name in names]
        for first, second in zip(own, best, strict=True):
            check_paired(first, second)
    except UnpairedError as error:
        return replace(rival, why=str(error))
    return replace(rival, found=compared(own, best))


def compared(own: Sequence[Samples], other: Sequence[Samples]) -> Estimate:
    """One run minus another on the same documents, one `Samples` of each per task, averaged over tasks.

    Right or wrong answers of one task get the exact test; all else is resampled.
    """
    if len(own) == 1 and _right_or_wrong(own[0], other[0]):
        return _exact(own[0].scores == 1, other[0].scores == 1)
    return bootstrap([Stratum(a.scores - b.scores, a.weights) for a, b in zip(own, other, strict=True)])


def _right_or_wrong(*runs: Samples) -> bool:
    return all(bool(np.isin(run.scores, (0, 1)).all()) and bool((run.weights == 1).all()) for run in runs)


def _exact(own: "np.ndarray", other: "np.ndarray") -> Estimate:
    both, neither = int((own & other).sum()), int((~own & ~other).sum())
    only_own, only_other = int((own & ~other).sum()), int((~own & other).sum())
    low, high = newcombe(both, only_own, only_other, neither)
    return Estimate((only_own - only_other) / len(own), low, high, mcnemar(only_own, only_other))


def _corrected(races: Iterable[Race]) -> tuple[Race, ...]:
    """The races with p-values adjusted over all of them."""
    races = tuple(races)
    adjusted = iter(holm([rival.found.p for race in races for rival in race.rivals if rival.found]))
    return tuple(
        replace(race, rivals=tuple(replace(r, adjusted=next(adjusted)) if r.found else r for r in race.rivals))
        for race in races
    )
