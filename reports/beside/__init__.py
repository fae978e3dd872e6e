"""What lies beside a record, read and checked once; whoever shows it need not doubt it.

structure, training, routes   a file each: what is in it, and what must be
node                          a value of a JSON file and its place
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from reports.beside.routes import Routes
from reports.beside.routes import parse as parse_routes
from reports.beside.structure import Structure
from reports.beside.structure import parse as parse_structure
from reports.beside.training import Curves
from reports.beside.training import parse as parse_training

__all__ = ["Beside", "read", "read_routes"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The files beside a record; None where there is none, or a damaged one."""

    structure: Structure | None = None
    """What the compressed model is made of."""
    training: Curves | None = None
    """The parts of the loss; None also where a method has others."""
    routes: Routes | None = None
    """Where the tokens of some texts go."""
    problems: tuple[str, ...] = ()
    """Of each damaged file its name, what is wrong with it, and what to do."""


def read(record: Path) -> Beside:
    """What lies beside the record at this path."""
    structure, unstructured = _read(record.with_name("structure.json"), parse_structure)
    training, untrained = _read(record.with_name("training.csv"), parse_training)
    routes, unrouted = read_routes(record)
    problems = tuple(filter(None, (unstructured, untrained, unrouted)))
    return Beside(structure=structure, training=training, routes=routes, problems=problems)


def read_routes(record: Path) -> tuple[Routes | None, str]:
    """The routes alone, and as in `Beside.problems` why they cannot be read; empty where they can, or are not there."""
    return _read(record.with_name("routes.json"), parse_routes)


def _read(path: Path, parse: Callable[[str], T]) -> tuple[T | None, str]:
    try:
        return parse(path.read_text(encoding="utf-8")), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        return None, (
            f"{path.name} is damaged and left out: {error}. Restore it from a backup or from git, or repeat the "
            "run_all.py command of its cell with --force, which makes it again."
        )
