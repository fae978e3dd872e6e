"""Tokens in the colours of their experts, on terminals.

python -m reports tokens results/tiny-llama/tomoe/0.5 --layers 0 4 9
"""

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text as Line

from reports.beside import read_routes
from reports.beside.routes import Layer, Routes
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
RICH = ("256", "truecolor")
"""Terminals that show every one of the colours; with 16 some are the same."""
MAKE_ONE = "python run_all.py --models tiny-llama --methods tomoe --ratios 0.5 --budget demo --out {}"
"""The command that makes the first texts of a folder."""


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
    alike = console.no_color or console.color_system not in RICH
    for text in routes.texts:
        for layer in text.layers:
            if layer.number in layers:
                numbered = alike or layer.of > len(COLOURS)
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


def chosen(record: Path, routes: Routes, layers: Sequence[int] | None) -> Sequence[int]:
    """The layers asked for, by default the first, the middle one and the last.

    Raises:
        ReportError: one of them has no experts in what lies beside the record.
    """
    there = routes.layers
    if layers is None:
        return [there[0], there[len(there) // 2], there[-1]]
    if wrong := sorted({*layers} - {*there}):
        numbers = [", ".join(map(str, some)) for some in (wrong, there)]
        place = plain(str(record.parent))
        raise ReportError(
            f"--layers {numbers[0]}: no such layer has experts in {place}. Those that have: {numbers[1]}."
        )
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
    if not results.exists():
        raise ReportError(f"There is no {results}. Give the folder a run wrote to, or make one: {_make_one(results)}")
    records = [results] if results.is_file() else sorted(results.rglob("record.json"))
    read = [(record, *read_routes(record)) for record in records]
    for record, _, problem in read:
        if problem:
            print(f"{record.parent.as_posix()}/{problem}", file=sys.stderr)
    found = [(record, routes) for record, routes, _ in read if routes]
    if not found:
        place = results if results.is_file() else f"a record below {results}"
        raise ReportError(
            f"There is no routes.json that can be read beside {place}: only models with experts have one. "
            f"Make one: {_make_one(results)}"
        )
    for record, routes, numbers in [(record, routes, chosen(record, routes, layers)) for record, routes in found]:
        console.rule(Line(plain(str(record.parent))))
        show(routes, numbers, console)


def _make_one(results: Path) -> str:
    folder = results.parent if results.name == "record.json" else results
    return MAKE_ONE.format(shlex.quote(str(folder)))
