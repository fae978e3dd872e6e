"""`routes.json`: which experts the tokens of some example texts meet."""

from collections.abc import Sequence
from dataclasses import dataclass

from reports.beside.node import Node
from reports.beside.node import parse as parse_json
from reports.tables import plain

MOST = 4096
"""Experts of a block, and blocks of a model: more are neither made nor shown."""


@dataclass(frozen=True)
class Layer:
    """Where the tokens of a text go in one block."""

    number: int
    """The block, counted from 0."""
    of: int
    """How many experts it has."""
    experts: Sequence[Sequence[int]]
    """Of each token, the best first."""
    probabilities: Sequence[Sequence[float]]
    """The router's, of each of them."""


@dataclass(frozen=True)
class Text:
    """An example text."""

    name: str
    """In a word."""
    tokens: Sequence[str]
    """What each adds to the text."""
    layers: Sequence[Layer]
    """The blocks that have experts."""


@dataclass(frozen=True)
class Routes:
    """Where the tokens of some texts go in one model."""

    probability: str
    """What the probabilities are."""
    texts: Sequence[Text]
    """At least one, each with the same layers, at least one."""

    @property
    def layers(self) -> list[int]:
        """The blocks that have experts."""
        return [layer.number for layer in self.texts[0].layers]


def parse(text: str) -> Routes:
    """What the file says.

    Raises:
        ValueError: it is damaged; the message says where.
    """
    content = parse_json(text)
    texts = [_text(each) for each in content["texts"].items()]
    layers = {tuple((layer.number, layer.of) for layer in each.layers) for each in texts}
    if len(layers) != 1 or () in layers:
        raise ValueError("its texts have different layers, or none")
    return Routes(plain(content["probability"].text()), texts)


def _text(content: Node) -> Text:
    tokens = [token.text() for token in content["tokens"].items()]
    layers = [_layer(layer, len(tokens)) for layer in content["layers"].items()]
    return Text(plain(content["name"].text()), tokens, layers)


def _layer(content: Node, tokens: int) -> Layer:
    of = content["of"].whole(1, MOST)
    experts = [row.wholes(0, of - 1) for row in content["experts"].items(tokens)]
    rows = zip(content["probabilities"].items(tokens), experts, strict=True)
    shares = [row.numbers(0, 1, len(chosen)) for row, chosen in rows]
    return Layer(content["layer"].whole(0, MOST), of, experts, shares)
