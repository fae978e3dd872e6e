"""`structure.json`: what is left of each block of a compressed model, and what its experts are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reports.beside.node import Node
from reports.beside.node import parse as parse_json

PARTS = ("heads", "kv_heads", "qk", "vo", "mlp")
LARGEST = 10**9
"""No width or count of a model is larger."""
ROUNDED = 1 + 1e-6
"""What a cosine of float32 is at most."""
MET = 1 - 1e-6
"""What loads sum to at least, as every token meets an expert."""


@dataclass(frozen=True)
class Width:
    """Of one part of a block."""

    kept: int
    """What a token uses."""
    full: int
    """What the dense block has: at least one."""

    @property
    def share(self) -> float:
        """What a token uses of it."""
        return self.kept / self.full


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The N experts of a block."""

    width: int
    """Neurons of the largest."""
    union: int
    """Neurons in any."""
    union_share: float
    """The share of the dense neurons that are in any."""
    raw_widths: Sequence[float]
    """[N], neurons before they were made equal; empty where they are not recorded."""
    cosine: Sequence[Sequence[float]]
    """[N, N], similarities as sets of neurons."""
    loads: Sequence[float]
    """[N], the share of calibration tokens that each meets, some tokens in all; empty where they were not counted."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What is left of a block."""

    number: int
    """In the dense model."""
    widths: Mapping[str, Width]
    """By name, as in `PARTS`."""
    density: Sequence[float]
    """The shares of weights that its sparse projections keep."""
    mixture: Mixture | None
    """None: it has no experts."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The make of a compressed model."""

    layers: Sequence[Layer]
    """The blocks that are left, in their order."""
    removed: int
    """Blocks that are not."""
    residual: int | None
    """The width of the residual stream; None: as in the dense model."""
    added: frozenset[str]
    """The names of its structures in a checkpoint."""


def parse(text: str) -> Structure:
    """What the file says.

    Raises:
        ValueError: it is damaged; the message says where.
    """
    content = parse_json(text)
    layers, removed = content["layers"], len(content["removed_layers"].items())
    layers.need(bool(layers.items()))
    counted = _loads(content["loads"], layers)
    widths = [content.get(key) for key in ("rotated_width", "narrow_width")]
    return Structure(
        # As many blocks as are removed may be missing below one.
        layers=[_layer(*pair, (i, i + removed)) for i, pair in enumerate(zip(layers.items(), counted, strict=True))],
        removed=removed,
        residual=next((width.whole(1, LARGEST) for width in widths if width), None),
        added=frozenset(content["compression"]["structures"].entries()),
    )


def _loads(content: Node, layers: Node) -> Sequence[Node | None]:
    """Of each block; None where they were not counted."""
    found, count = content.get("calibration"), len(layers.items())
    return found.items(count) if found else [None] * count


def _layer(content: Node, loads: Node | None, numbers: tuple[int, int]) -> Layer:
    mixture, density = content.get("mixture"), content.get("density")
    return Layer(
        number=content["layer"].whole(*numbers),
        widths={part: _width(content[part]) for part in PARTS},
        density=[share.number(0, 1) for share in density.entries().values()] if density else [],
        mixture=_mixture(mixture, loads) if mixture else None,
    )


def _width(content: Node) -> Width:
    full = content["full"].whole(1, LARGEST)
    return Width(content["kept"].whole(0, full), full)


def _mixture(content: Node, loads: Node | None) -> Mixture:
    count, widths = content["experts"].whole(1, LARGEST), content.get("raw_widths")
    made = Mixture(
        width=content["width"].whole(0, LARGEST),
        union=content["union"].whole(0, LARGEST),
        union_share=content["union_share"].number(0, 1),
        raw_widths=widths.numbers(0, LARGEST, count) if widths else [],
        cosine=[row.numbers(0, ROUNDED, count) for row in content["cosine"].items(count)],
        loads=loads.numbers(0, 1, count) if loads else [],
    )
    if loads and sum(made.loads) < MET:
        raise ValueError(f"its {loads.where} sums to {sum(made.loads):g}, and every token meets an expert")
    return made
