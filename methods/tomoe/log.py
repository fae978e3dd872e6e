"""training.csv, one row per step, and TensorBoard events on request."""

import csv
import resource
import sys
import time
from pathlib import Path
from typing import Any, Self

import torch

from methods.errors import UserError

NAME = "training.csv"


class StepLog:
    """Writes rows to FOLDER/training.csv; no folder, no log. A resumed run drops the rows of steps it repeats."""

    def __init__(self, folder: Path | None, start: int, tensorboard: bool) -> None:
        self._folder, self._start = folder, start
        self._board = _board(folder) if folder and tensorboard else None
        self._file: Any = None
        self._last = time.perf_counter()

    def __enter__(self) -> Self:
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            kept = _rows_before(self._folder / NAME, self._start)
            self._file = (self._folder / NAME).open("w", newline="")
            self._writer = csv.writer(self._file)
            self._writer.writerows(kept)
            self._has_header = bool(kept)
        return self

    def __exit__(self, *_: object) -> None:
        for target in (self._file, self._board):
            if target:
                target.close()

    def write(self, row: dict[str, float]) -> None:
        """One step. Adds the memory used at most so far, and the seconds since the last step."""
        now = time.perf_counter()
        row = row | {"peak_bytes": _peak_bytes(), "seconds": now - self._last}
        self._last = now
        if self._file:
            if not self._has_header:
                self._writer.writerow(row)
                self._has_header = True
            self._writer.writerow(f"{value:.6g}" for value in row.values())
            self._file.flush()
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, int(row["step"]))


def _peak_bytes() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _rows_before(path: Path, start: int) -> list[list[str]]:
    """The header and the rows of steps before `start`, of an earlier run."""
    if start == 0 or not path.exists():
        return []
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return [header, *(row for row in rows if len(row) == len(header) and int(row[0]) < start)]


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tomoe.tensorboard needs the package tensorboard. Type pip install tensorboard, or leave it out: "
            "training.csv has the same numbers."
        ) from None
    return SummaryWriter(str(folder))
