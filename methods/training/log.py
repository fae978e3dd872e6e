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
    """Writes rows to FOLDER/training.csv; no folder, no log. A resumed run drops the rows of steps it repeats.

    Counts are written whole, other numbers with nine digits, which give a float32 back.
    """

    def __init__(self, folder: Path | None, start: int, tensorboard: bool) -> None:
        self._folder, self._start = folder, start
        self._board = _board(folder, start) if folder and tensorboard else None
        self._file: Any = None
        self._last = time.perf_counter()

    def __enter__(self) -> Self:
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            path, partial = self._folder / NAME, self._folder / f".{NAME}.partial"
            kept = _rows_before(path, self._start)
            with partial.open("w", newline="") as file:
                csv.writer(file).writerows(kept)
            partial.replace(path)
            self._file = path.open("a", newline="")
            self._writer = csv.writer(self._file)
            self._has_header = bool(kept)
        return self

    def __exit__(self, *_: object) -> None:
        for target in (self._file, self._board):
            if target:
                target.close()

    def write(self, row: dict[str, float]) -> None:
        """One step: its number, its tokens in all processes, and more. Adds the memory used at most so far, the seconds
        since the last step, and tokens per second."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        row = row | {"peak_bytes": _peak_bytes(), "seconds": seconds}
        row["tokens_per_second"] = row["batch_tokens"] / seconds
        if self._file:
            if not self._has_header:
                self._writer.writerow(row)
                self._has_header = True
            self._writer.writerow(value if isinstance(value, int) else f"{value:.9g}" for value in row.values())
            self._file.flush()
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, int(row["step"]))


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _rows_before(path: Path, start: int) -> list[list[str]]:
    """The header and the rows of steps before `start`, of an earlier run."""
    if start == 0 or not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    return [*rows[:1], *(row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) < start)]


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "the setting tensorboard=true needs the package tensorboard. Type pip install tensorboard, or leave it "
            "out: training.csv has the same numbers."
        ) from None
    return SummaryWriter(str(folder), purge_step=start)
