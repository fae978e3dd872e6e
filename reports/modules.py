"""What compressed models are made of, from `structure.json` beside each record; and the paper's Table 8."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reports.comparison import IDENTITY, identity, remarks
from reports.families import RIVAL
from reports.published import read
from reports.records import Record
from reports.results import Result
from reports.tables import Cell, Column, Table, legend, number

WIDTHS = {"heads": "Heads", "kv_heads": "Key heads", "qk": "Q and K per head", "vo": "V and O per head", "mlp": "MLP"}
MIXTURE = {"experts": "number", "width": "width", "union": "union"}
ADDED = {
    "moe_mlp": "routers",
    "topk_values": "scores of values",
    "rotated_residual": "shortcuts",
}
"""What a structure adds to the dense model, by its name in a checkpoint."""
CAPTION = (
    "What is left of each block, over all blocks: dimensions and neurons that a token uses, of those the dense model "
    "has; experts of a block, neurons of one, and of their union; the width of the residual stream; the share of "
    "weights that sparse projections keep; and what was added. Empty: as in the dense model."
)


def modules_table(results: Sequence[Result]) -> Table | None:
    """A row per compressed model whose structure is known; of several seeds the first."""
    found = [(result, _structure(result.records[0])) for result in results if not result.dense]
    rows = tuple((*identity(result), *cells) for result, cells in found if isinstance(cells, tuple))
    if not rows:
        return None
    shown = [result for result, cells in found if isinstance(cells, tuple)]
    damaged = (f"{result.title}: structure.json is damaged: {why}." for result, why in found if isinstance(why, str))
    return Table(
        name="modules",
        title="Module configuration",
        caption=CAPTION,
        columns=(
            *IDENTITY,
            Column("Blocks", text=True),
            *(Column(label, "Kept", text=True) for label in WIDTHS.values()),
            *(Column(label, "Experts", text=True) for label in MIXTURE.values()),
            Column("Residual", text=True),
            Column("Weights, %", text=True),
            Column("Added", text=True),
        ),
        rows=rows,
        notes=(*legend(rows), *remarks(shown), *damaged),
    )


def _structure(record: Record) -> tuple[Cell, ...] | str | None:
    """What is beside the record; a text that says why it cannot be read; None where it is not there."""
    path = record.path.parent / "structure.json"
    if not path.exists():
        return None
    try:
        return _cells(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{type(error).__name__} {error}"


def _cells(made: Mapping[str, Any]) -> tuple[Cell, ...]:
    layers, removed = made["layers"], len(made["removed_layers"])
    mixtures = [layer["mixture"] for layer in layers if layer.get("mixture")]
    added = (text for name, text in ADDED.items() if name in made["compression"]["structures"])
    return (
        Cell(f"{len(layers)} of {len(layers) + removed}" if removed else ""),
        *(Cell(_kept([layer[name] for layer in layers])) for name in WIDTHS),
        *(Cell(_span([mixture[name] for mixture in mixtures])) for name in MIXTURE),
        Cell(_span([made[key] for key in ("rotated_width", "narrow_width") if made.get(key)])),
        Cell(_span([100 * share for layer in layers for share in (layer.get("density") or {}).values()])),
        Cell(", ".join(added)),
    )


def _kept(widths: Sequence[Mapping[str, int]]) -> str:
    """As in `17 to 29 of 32`; empty where all is kept."""
    if all(width["kept"] == width["full"] for width in widths):
        return ""
    return f"{_span([w['kept'] for w in widths])} of {_span([w['full'] for w in widths])}"


def _span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(number(value) for value in (min(values), max(values)))) if values else ""


def published_modules_table(results: Sequence[Result]) -> Table | None:
    """Which parts of ToMoE the paper keeps after training; None without ToMoE."""
    if not any(result.records[0].cell["method"] == RIVAL for result in results):
        return None
    labels = {"module": "Module", "kept_or_removed": "After training", "structure": "Structure"}
    found = read("table08_modules.csv")
    return Table(
        name="modules-published",
        title="Parts of ToMoE, published",
        caption="Table 8 of the ToMoE paper: d is the hidden size, H the number of heads, N the number of experts.",
        columns=tuple(Column(label, text=True) for label in labels.values()),
        rows=tuple(tuple(Cell(row[key]) for key in labels) for row in found),
        notes=(*_sources(found),),
    )


def _sources(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for row in rows:
        yield f"{row['module']}: {row['source']}."
