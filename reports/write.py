"""Puts the files of a report into a folder."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from reports.records import ReportError


def write(contents: Mapping[str, str | bytes], out: Path, stale: Callable[[str], bool] = lambda name: False) -> None:
    """Write each file under a temporary name and rename it, so that none is ever half there.

    Args:
        stale: tells names, relative to `out`, of files to be removed unless they are among the contents.

    Raises:
        ReportError: `out` cannot be written to.
    """
    try:
        for name, content in contents.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            _replace(out / name, content)
        for path in [path for path in out.rglob("*.*") if path.is_file()]:
            name = path.relative_to(out).as_posix()
            if name not in contents and stale(name):
                path.unlink()
    except OSError as error:
        raise ReportError(f"The report cannot be written to {out}: {error}. Give --out another folder.") from error


def _replace(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
