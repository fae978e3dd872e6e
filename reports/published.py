"""The ToMoE paper's numbers, shown beside ours where model, ratio, method and metric are the same.

They stand in rows of their own that say "published"; no average, best or test of ours looks at them.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

Key = tuple[str, float, str, bool]
"""Model, ratio, method, and whether it was fine-tuned."""


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
    """Why it can hardly be right; empty for most."""


@dataclass(frozen=True)
class Line:
    """What the paper says of one method, model and ratio."""

    key: Key
    """What it is to be compared with."""
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
        model, ratio, *_ = self.key
        return Cell(model), Cell(percent(ratio)), Cell(None), Cell(self.method)


def beside(results: Sequence[Result], metrics: Iterable[str]) -> dict[Result, list[Line]]:
    """The lines that have one of the metrics, by the result they go below: the last run of the same method."""
    wanted = set(metrics)
    below = {key: result for result in results for key in _keys(result)}
    return {r: [line for line in _lines()[key] if wanted & set(line.numbers)] for key, r in below.items()}


def average_of(metrics: Iterable[str]) -> str:
    """The name of the metrics' average, if the paper has it."""
    return AVERAGE if set(metrics) == set(TASKS.values()) else ""


def provenance(published: Mapping[Result, Sequence[Line]], metrics: Sequence[str]) -> Iterator[str]:
    """Where the numbers are from, and what is to be doubted."""
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
            model, ratio, *_ = line.key
            yield f"{DOUBTED} {model} {line.printed} at {percent(ratio):g} %, {name} {number.value:g}: {number.doubt}."


def _keys(result: Result) -> Iterator[Key]:
    """The paper counts all parameters."""
    cell = result.records[0].cell
    if result.dense or cell["ratio_basis"] == "total":
        yield result.model, result.ratio, cell["method"], result.fine_tuned


@cache
def _lines() -> Mapping[Key, list[Line]]:
    numbers: dict[tuple[Key, str], dict[str, Number]] = defaultdict(dict)
    for path in sorted(FOLDER.glob("table*_ppl_*.csv")) + sorted(FOLDER.glob("table*_zeroshot_*.csv")):
        for row in read(path.name):
            number = Number(float(row["value"]), row["table_v2"], row["source"], _doubt(row))
            numbers[_key(row), _printed(row)][_metric(row)] = number
    lines: defaultdict[Key, list[Line]] = defaultdict(list)
    for (key, printed), found in numbers.items():
        lines[key].append(Line(key, printed, found))
    return lines


def read(name: str) -> list[dict[str, str]]:
    """The rows of a published file."""
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _key(row: Mapping[str, Any]) -> Key:
    printed = row["method"].lower().replace(" ", "-")
    (method,) = (name for name in METHODS if printed.startswith(name))
    return MODELS[row["model"]], _share(row), method, FINE_TUNED in row["method"]


def _share(row: Mapping[str, str]) -> float:
    return float(row["active_ratio"].removesuffix("%")) / 100


def _printed(row: Mapping[str, str]) -> str:
    return re.sub(OURS, "", row["method"], flags=re.IGNORECASE)


def _metric(row: Mapping[str, str]) -> str:
    return AVERAGE if row["task"] == AVERAGE else (TEXTS | TASKS)[row["task"]]


def _doubt(row: Mapping[str, str]) -> str:
    """What the list of suspect entries says of a number; an entry there may be about several."""
    entry = "ppl" if row["task"] in TEXTS else row["task"].lower()
    remarks = (d["remark"] for d in _doubts() if _same_row(d, row) and entry in d["entry"].lower().split(" / "))
    return "; ".join(remarks)


@cache
def _doubts() -> list[dict[str, str]]:
    return read("suspect_entries.csv")


def _same_row(doubt: Mapping[str, str], row: Mapping[str, str]) -> bool:
    family, _, sizes = doubt["model"].rpartition(" ")
    models = {f"{family} {size}".strip() for size in sizes.split("/")}
    alike = all(doubt[key] == row[key] for key in ("table_v2", "active_ratio"))
    return alike and row["model"] in models and _printed(doubt) == _printed(row)
