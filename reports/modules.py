"""What compressed models are made of, from `structure.json` beside each record; and the paper's Table 8."""

from collections.abc import Iterator, Mapping, Sequence

from reports.beside.structure import Structure, Width
from reports.comparison import IDENTITY, identity, remarks
from reports.families import RIVAL
from reports.published import read
from reports.results import Result, having
from reports.tables import Cell, Column, Table, legend, number

WIDTHS = {"heads": "Heads", "kv_heads": "Key heads", "qk": "Q and K per head", "vo": "V and O per head", "mlp": "MLP"}
MIXTURE = ("number", "width", "union")
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
    found = [(result, made) for result, _, made in having(results, lambda beside: beside.structure)]
    rows = tuple((*identity(result), *_cells(made)) for result, made in found)
    if not rows:
        return None
    return Table(
        name="modules",
        title="Module configuration",
        caption=CAPTION,
        columns=(
            *IDENTITY,
            Column("Blocks", text=True),
            *(Column(label, "Kept", text=True) for label in WIDTHS.values()),
            *(Column(label, "Experts", text=True) for label in MIXTURE),
            Column("Residual", text=True),
            Column("Weights, %", text=True),
            Column("Added", text=True),
        ),
        rows=rows,
        notes=(*legend(rows), *remarks([result for result, _ in found])),
    )


def _cells(made: Structure) -> tuple[Cell, ...]:
    layers, residual = made.layers, [made.residual] if made.residual else []
    mixtures = [layer.mixture for layer in layers if layer.mixture]
    added = (text for name, text in ADDED.items() if name in made.added)
    return (
        Cell(f"{len(layers)} of {len(layers) + made.removed}" if made.removed else ""),
        *(Cell(_kept([layer.widths[part] for layer in layers])) for part in WIDTHS),
        Cell(_span([len(mixture.cosine) for mixture in mixtures])),
        Cell(_span([mixture.width for mixture in mixtures])),
        Cell(_span([mixture.union for mixture in mixtures])),
        Cell(_span(residual)),
        Cell(_span([100 * share for layer in layers for share in layer.density])),
        Cell(", ".join(added)),
    )


def _kept(widths: Sequence[Width]) -> str:
    """As in `17 to 29 of 32`; empty where all is kept."""
    if all(width.kept == width.full for width in widths):
        return ""
    return f"{_span([width.kept for width in widths])} of {_span([width.full for width in widths])}"


def _span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(number(value) for value in (min(values), max(values)))) if values else ""


def published_modules_table(results: Sequence[Result]) -> Table | None:
    """Which parts of ToMoE the paper keeps after training; None without ToMoE."""
    if not any(result.name == RIVAL for result in results):
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
