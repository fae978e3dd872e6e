"""The ToMoE paper's numbers, shown beside ours where model, method, ratio (or pattern) and metric are the same.

They stand in rows of their own that say "published"; no average, best or test of ours looks at them.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from reports.results import Result
from reports.tables import DOUBTED, Cell, percent

FOLDER = Path(__file__).parent / "published"
MODELS = {
    "LLaMA-2 7B": "llama2-7b",
    "LLaMA-2 13B": "llama2-13b",
    "LLaMA-3 8B": "llama3-8b",
    "Qwen-2.5 7B": "qwen2.5-7b",
    "Qwen-2.5 14B": "qwen2.5-14b",
    "Phi-2": "phi-2",
}
HUB = {
    "meta-llama--Llama-2-7b-hf": "llama2-7b",
    "meta-llama--Llama-2-13b-hf": "llama2-13b",
    "meta-llama--Meta-Llama-3-8B": "llama3-8b",
    "Qwen--Qwen2.5-7B": "qwen2.5-7b",
    "Qwen--Qwen2.5-14B": "qwen2.5-14b",
    "microsoft--phi-2": "phi-2",
}
"""What records call the same models where they were asked for by their place on the hub."""
TASKS = {
    "ARC-e": "arc_easy/acc_norm@0shot",
    "ARC-c": "arc_challenge/acc_norm@0shot",
    "PIQA": "piqa/acc_norm@0shot",
    "WinoGrande": "winogrande/acc@0shot",
    "HellaSwag": "hellaswag/acc_norm@0shot",
}
TEXTS = {"WikiText-2": "wikitext2/token_ppl@4096"}
"""Of 4096 tokens, because the paper's dense perplexities are those of such windows."""
AVERAGE = "Average"
METHODS = (
    *("dense", "tomoe", "disp-llm", "modegpt", "llm-surgeon", "llm-pruner", "slicegpt", "shortgpt", "sleb"),
    *("sparsegpt", "wanda", "pruner-zero"),
)
"""Our names, with which the paper's begin."""
FINE_TUNED = "+ fine-tuning"
OURS = r" \(ours\)| \[.*\]"
"""What the paper's names of methods end in, and which means nothing here."""

PATTERN = r"\((\d+:\d+)\)"
"""Of the weights that a method keeps, in its printed name."""

Who = tuple[str, str, bool]
"""Model, method, and whether it was fine-tuned."""
Share = float | str | None
"""Ratio of all parameters; or a pattern, which alone says how much is kept; None: the paper has nothing like it."""


@dataclass(frozen=True)
class Number:
    """One published number."""

    value: float
    """In per cent, or a perplexity."""
    table: str
    """Its table in the paper's second version."""
    source: str
    """What it was transcribed from."""
    doubt: str
    """Why it is to be read with care; empty for most."""


@dataclass(frozen=True)
class Line:
    """What the paper says of one method, model and ratio."""

    model: str
    """Our name of the model."""
    ratio: float
    """The asked ratio beside which it stands."""
    printed: str
    """The method as the paper names it."""
    numbers: Mapping[str, Number]
    """By our name of the metric, or `AVERAGE`."""

    @property
    def method(self) -> str:
        """What stands in the column of methods."""
        return f"{self.printed}, published"

    def cell(self, metric: str) -> Cell:
        """The number, marked where it is doubted."""
        found = self.numbers.get(metric)
        return Cell(found.value, marks=DOUBTED * bool(found.doubt)) if found else Cell(None)

    def identity(self) -> tuple[Cell, ...]:
        """What `comparison.IDENTITY` heads."""
        return Cell(self.model), Cell(percent(self.ratio)), Cell(None), Cell(self.method)


def beside(results: Sequence[Result], metrics: Iterable[str]) -> dict[Result, list[Line]]:
    """The lines that have one of the metrics, by the result they go below: the last run of the same method."""
    wanted = set(metrics)
    last = {(_who(result), _share_of(result)): result for result in results}
    found: dict[Result, list[Line]] = {result: [] for result in results}
    for (who, share), result in last.items():
        lines = _lines().get(who, {}).get(share, [])
        found[result] = [replace(line, model=result.model, ratio=result.ratio) for line in _having(wanted, lines)]
    return found


def _having(metrics: Collection[str], lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if not line.numbers.keys().isdisjoint(metrics)]


def average_of(metrics: Iterable[str]) -> str:
    """The name of the metrics' average, if the paper has it."""
    return AVERAGE if set(metrics) == set(TASKS.values()) else ""


def provenance(published: Mapping[Result, Sequence[Line]], metrics: Sequence[str]) -> Iterator[str]:
    """Where the numbers are from, and what is to be doubted."""
    yield from _elsewhere(published, metrics)
    lines = [line for below in published.values() for line in below]
    shown = [(line, name, line.numbers[name]) for line in lines for name in metrics if name in line.numbers]
    if not shown:
        return
    tables, sources = (sorted({getattr(number, key) for *_, number in shown}) for key in ("table", "source"))
    yield (
        f"Rows that say published are from Table {', '.join(tables)} of the ToMoE paper ({'; '.join(sources)}), "
        "measured with other programs than ours. They count in no average, best or test."
    )
    for line, name, number in shown:
        if number.doubt:
            where = f"{line.model} {line.printed} at {percent(line.ratio):g} %"
            yield f"{DOUBTED} {where}, {name} {number.value:g}: {number.doubt}."


def _elsewhere(published: Mapping[Result, Sequence[Line]], metrics: Sequence[str]) -> Iterator[str]:
    """What the paper has of a method of which no result has its setting."""
    matched = {_who(result) for result, lines in published.items() if lines}
    told = {}
    for result in published:
        shares = [share for share, lines in _lines().get(_who(result), {}).items() if _having(metrics, lines)]
        if shares and _who(result) not in matched:
            cell = result.records[0].cell
            told[f"{result.model} {cell['method']} ({', '.join(map(_told, shares))})"] = None
    if told:
        yield f"Published at other settings only, of all parameters, so not shown: {'; '.join(told)}."


def _told(share: Share) -> str:
    return f"{percent(share):g} %" if isinstance(share, float) else f"{share}"


def _who(result: Result) -> Who:
    return HUB.get(result.model, result.model), result.name, result.fine_tuned


def _share_of(result: Result) -> Share:
    """The paper counts all parameters; its 2:4 are not quite the half of them that it says."""
    cell = result.records[0].cell
    if pattern := cell["method_config"].get("pattern"):
        return pattern
    return result.ratio if result.dense or cell["ratio_basis"] == "total" else None


@cache
def _lines() -> Mapping[Who, Mapping[Share, list[Line]]]:
    numbers: dict[tuple[Who, float, str], dict[str, Number]] = defaultdict(dict)
    for path in sorted(FOLDER.glob("table*_ppl_*.csv")) + sorted(FOLDER.glob("table*_zeroshot_*.csv")):
        for row in read(path.name):
            number = Number(float(row["value"]), row["table_v2"], row["source"], _doubt(row))
            numbers[_key(row), _ratio(row), _printed(row)][_metric(row)] = number
    lines: defaultdict[Who, defaultdict[Share, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for (who, ratio, printed), found in numbers.items():
        pattern = re.search(PATTERN, printed)
        lines[who][pattern[1] if pattern else ratio].append(Line(who[0], ratio, printed, found))
    return lines


def read(name: str) -> list[dict[str, str]]:
    """The rows of a published file."""
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _key(row: Mapping[str, Any]) -> Who:
    printed = row["method"].lower().replace(" ", "-")
    (method,) = (name for name in METHODS if printed.startswith(name))
    return MODELS[row["model"]], method, FINE_TUNED in row["method"]


def _ratio(row: Mapping[str, str]) -> float:
    return float(row["active_ratio"].removesuffix("%")) / 100


def _printed(row: Mapping[str, str]) -> str:
    return re.sub(OURS, "", row["method"], flags=re.IGNORECASE)


def _metric(row: Mapping[str, str]) -> str:
    return AVERAGE if row["task"] == AVERAGE else (TEXTS | TASKS)[row["task"]]


def _doubt(row: Mapping[str, str]) -> str:
    """What the list of suspect entries says of a number; an entry there may be about several, or name another."""
    entry = "ppl" if row["task"] in TEXTS else row["task"].lower()
    about = (doubt for doubt in _doubts() if _same_row(doubt, row))
    named = f"{row['task']} {row['value']}"
    found = (d["remark"] for d in about if entry in d["entry"].lower().split(" / ") or named in d["remark"])
    return "; ".join(found)


@cache
def _doubts() -> list[dict[str, str]]:
    return read("suspect_entries.csv")


def _same_row(doubt: Mapping[str, str], row: Mapping[str, str]) -> bool:
    family, _, sizes = doubt["model"].rpartition(" ")
    models = {f"{family} {size}".strip() for size in sizes.split("/")}
    alike = all(doubt[key] == row[key] for key in ("table_v2", "active_ratio"))
    return alike and row["model"] in models and _printed(doubt) == _printed(row)
