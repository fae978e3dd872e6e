"""Records on disk: `OUT/<model>/<method>/<ratio>/<cell-id>/record.json`, one per cell, whole or absent.

A record is written under a temporary name, flushed to the disk and renamed, so a process killed at any moment leaves
either the old record or the new one.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from methods.errors import UserError

SCHEMA = 1
KEYS = ("schema", "status", "cell", "size", "metrics", "time", "memory", "provenance", "notes", "skipped", "error")
CELL_KEYS = (
    "id",
    "model",
    "method",
    "ratio",
    "ratio_basis",
    "seed",
    "method_config",
    "calibration",
    "budget",
    "dtype",
    "recover",
)
LATER = ("cell.recover",)
"""What records written by earlier versions lack; read as None."""
PARTS: dict[str, tuple[str, ...]] = {
    "cell": CELL_KEYS,
    "size": (),
    "metrics": (),
    "time": ("load_s", "compress_s", "save_s", "evaluate_s"),
    "memory": ("peak_host_bytes", "peak_device_bytes"),
    "provenance": ("dataset_revisions", "task_versions"),
}
"""What each object of a record must hold for a run to build on it."""
STATUSES = ("done", "failed", "skipped")

Record = dict[str, Any]
EMPTY: Record = {
    "size": {},
    "metrics": {},
    "time": dict.fromkeys(PARTS["time"], 0.0),
    "memory": dict.fromkeys(PARTS["memory"]),
    "provenance": {key: {} for key in PARTS["provenance"]},
    "notes": [],
    "skipped": {},
}
"""What a cell that was never run has measured so far."""


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash, sees the old content or the new and nothing between.

    The temporary name is always the same, so the next writer overwrites what a killed one left. One writer at a time.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` atomically, keys in the order given; NaN and infinity are refused, as JSON has none."""
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_record(path: Path, record: Record) -> None:
    """Write a record atomically, its keys in the documented order."""
    write_json(path, {key: record[key] for key in KEYS})


def read_record(path: Path) -> Record | None:
    """The record at `path`, or None where there is none.

    Raises:
        UserError: the file is not a record, or of a newer schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if isinstance(record, dict):
        for key in ("notes", "skipped"):  # the first records had none
            record.setdefault(key, EMPTY[key].copy())
    _check(path, record)
    record["cell"].setdefault("recover", None)
    return record


def records(root: Path) -> Iterator[Record]:
    """Every record below `root`, in the order of their paths; a damaged one raises as `read_record` does."""
    for path in sorted(root.rglob("record.json")):
        record = read_record(path)
        assert record is not None
        yield record


def _check(path: Path, record: Any) -> None:
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise _damaged(path, "it has no schema number")
    if record["schema"] > SCHEMA:
        raise UserError(
            f"The record {path} has schema {record['schema']}, this version reads up to {SCHEMA}. "
            "Update the program, or give another --out."
        )
    if missing := [*_missing(record)]:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    if record["status"] not in STATUSES:
        raise _damaged(path, f"its status is {record['status']!r}, not one of {', '.join(STATUSES)}")


def _missing(record: Record) -> Iterator[str]:
    yield from (key for key in KEYS if key not in record)
    for part, keys in PARTS.items():
        held = record.get(part)
        if not isinstance(held, dict):
            yield f"an object {part}"
        else:
            absent = (f"{part}.{key}" for key in keys if key not in held)
            yield from (name for name in absent if name not in LATER)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"The record {path} is damaged: {reason}. Restore it from a backup or from git, "
        f"or delete it to have its cell run again: rm '{path}'"
    )
