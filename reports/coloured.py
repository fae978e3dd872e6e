"""Tokens in the colours of their experts: what `routes.json` beside a record says, and a view of it for terminals.

python -m reports tokens results/tiny-llama/tomoe/0.5 --layers 0 4 9
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text as Line

from reports.records import ReportError
from reports.tables import plain

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#bbbbbb")
"""Of Okabe and Ito, told apart by colour-blind readers too, with grey in place of black."""
INKS = ("#000000",) * 4 + ("#ffffff",) + ("#000000",) * 3
"""What is readable on each."""
PART = "◌"
"""Stands for a token that begins a character which a later token completes."""
MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "␣"}
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True)
class Layer:
    """Where the tokens of a text go in one block."""

    number: int
    """The block, counted from 0."""
    of: int
    """How many experts it has."""
    experts: tuple[tuple[int, ...], ...]
    """Of each token, the best first."""
    probabilities: tuple[tuple[float, ...], ...]
    """The router's, of each of them."""

    @property
    def numbered(self) -> bool:
        """Whether there are more experts than colours."""
        return self.of > len(COLOURS)


@dataclass(frozen=True)
class Text:
    """An example text."""

    name: str
    """In a word."""
    tokens: tuple[str, ...]
    """What each adds to the text."""
    layers: tuple[Layer, ...]
    """The blocks that have experts."""


@dataclass(frozen=True)
class Routes:
    """Where the tokens of some texts go in one model."""

    probability: str
    """What the probabilities are."""
    texts: tuple[Text, ...]
    """At least one, each with the same layers, at least one."""

    @property
    def layers(self) -> list[int]:
        """The blocks that have experts."""
        return [layer.number for layer in self.texts[0].layers]


def read(record: Path) -> Routes | None:
    """The routes beside a record; None where there are none, as the model has no experts.

    Raises:
        ReportError: the file is damaged.
    """
    path = record.with_name("routes.json")
    try:
        return _routes(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it, and repeat its run_all.py command with "
            "--force to make it again."
        ) from error


def _routes(content: Mapping[str, Any]) -> Routes:
    routes = Routes(str(content["probability"]), tuple(_text(text) for text in content["texts"]))
    if not routes.texts or not routes.layers:
        raise ValueError("it has no text, or no layer")
    if any([layer.number for layer in text.layers] != routes.layers for text in routes.texts):
        raise ValueError("its texts have different layers")
    return routes


def _text(content: Mapping[str, Any]) -> Text:
    tokens = tuple(map(str, content["tokens"]))
    return Text(plain(str(content["name"])), tokens, tuple(_layer(layer, len(tokens)) for layer in content["layers"]))


def _layer(content: Mapping[str, Any], tokens: int) -> Layer:
    experts = tuple(tuple(map(int, row)) for row in content["experts"])
    shares = tuple(tuple(map(float, row)) for row in content["probabilities"])
    layer = Layer(int(content["layer"]), int(content["of"]), experts, shares)
    if [len(row) for row in experts] != [len(row) for row in shares] or len(experts) != tokens or not all(experts):
        raise ValueError(f"layer {layer.number} does not have an expert and a probability for each token")
    if not all(0 <= expert < layer.of for row in experts for expert in row):
        raise ValueError(f"layer {layer.number} names an expert that it does not have")
    if not all(0 <= share <= 1 for row in shares for share in row):
        raise ValueError(f"layer {layer.number} has a probability that is none")
    return layer


def visible(token: str) -> tuple[str, str]:
    """A token with white space marked that is not between words, without control characters, and its line breaks.

    >>> visible(" river"), visible("    "), visible(""), visible(":" + chr(10)), visible("x" + chr(27))
    ((' river', ''), ('␣␣␣␣', ''), ('◌', ''), (':⏎', '\\n'), ('x�', ''))
    """
    shown = token if token.strip(" ") else token.replace(" ", MARKS[" "])
    return "".join(map(_marked, shown)) or PART, "\n" * token.count("\n")


def _marked(char: str) -> str:
    return char if char == " " else MARKS.get(char) or (char if char.isprintable() else "\N{REPLACEMENT CHARACTER}")


def show(routes: Routes, layers: Sequence[int], console: Console) -> None:
    """Print every text once per layer; experts are numbered where colours do not tell them apart."""
    for text in routes.texts:
        for layer in text.layers:
            if layer.number in layers:
                numbered = layer.numbered or console.color_system is None
                console.print(Line(f"{text.name}, layer {layer.number}", style="bold"), _legend(layer))
                console.print(
                    _line(zip(text.tokens, (row[0] for row in layer.experts), strict=True), numbered), end="\n\n"
                )


def _line(parts: Iterable[tuple[str, int]], numbered: bool) -> Line:
    line = Line()
    for token, expert in parts:
        shown, breaks = visible(token)
        number = str(expert).translate(SUBSCRIPTS) if numbered else ""
        line.append(shown + number, _style(expert)).append(breaks)
    return line


def _legend(layer: Layer) -> Line:
    line = Line("experts")
    for expert in range(layer.of):
        line.append(" ").append(f" {expert} ", _style(expert))
    return line


def _style(expert: int) -> str:
    colour = expert % len(COLOURS)
    return f"{INKS[colour]} on {COLOURS[colour]}"


def chosen(routes: Routes, layers: Sequence[int] | None) -> Sequence[int]:
    """The layers asked for, by default the first, the middle one and the last.

    Raises:
        ReportError: one of them has no experts.
    """
    there = routes.layers
    if layers is None:
        return [there[0], there[len(there) // 2], there[-1]]
    if wrong := sorted({*layers} - {*there}):
        numbers = [", ".join(map(str, some)) for some in (wrong, there)]
        raise ReportError(f"--layers {numbers[0]}: no such layer has experts. Those that have: {numbers[1]}.")
    return layers


def main(arguments: Sequence[str]) -> int:
    """Print the tokens of every cell below a folder; the exit status is 2 where there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m reports tokens", description="Tokens in their experts' colours.")
    parser.add_argument("results", type=Path, help="a record.json, or a folder with records below it")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="default: the first, the middle, the last")
    parsed = parser.parse_args(arguments)
    try:
        _print(parsed.results, parsed.layers, Console(highlight=False, soft_wrap=False))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _print(results: Path, layers: Sequence[int] | None, console: Console) -> None:
    records = [results] if results.is_file() else sorted(results.rglob("record.json"))
    found = [(record, routes) for record in records if (routes := read(record))]
    if not found:
        raise ReportError(
            f"There is no routes.json beside a record below {results}: only models with experts have one. Make one: "
            f"python run_all.py --models tiny-llama --methods tomoe --ratios 0.5 --budget demo --out {results}"
        )
    for record, routes in found:
        console.rule(Line(plain(str(record.parent))))
        show(routes, chosen(routes, layers), console)
