"""What every ratio of a run can use: scores and statistics of one dense model on one calibration text, measured once.

They lie in `context.shared`, which whoever makes the context promises to keep to one model, dtype and device. Where
none is given nothing is shared. A killed process leaves nothing that misleads the next one: files are written whole.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.base import Calibration, Context

if TYPE_CHECKING:
    from torch import Tensor

REUSED = "{} were taken over from another cell of the same run, whose compression time includes them"


@contextmanager
def shared_folder(context: Context, calibration: Calibration, name: str, **settings: Any) -> Iterator[Path]:
    """A folder for what depends on nothing but the dense model, the text and some settings.

    Args:
        name: of what is in it.
        settings: everything that changes what is in it, as JSON.
    """
    if context.shared is None:
        context.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=context.scratch) as folder:
            yield Path(folder)
        return
    sample = [calibration.sha256, calibration.samples, calibration.window, context.batch_size, context.seed]
    key = hashlib.sha256(json.dumps([sample, settings], sort_keys=True).encode()).hexdigest()[:12]
    folder = context.shared / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def alone(folder: Path) -> AbstractContextManager[Any]:
    """While open, other processes wait that want the same."""
    from filelock import FileLock

    return FileLock(folder / "lock")


def remembered(
    context: Context, calibration: Calibration, name: str, compute: Callable[[], Any], **settings: Any
) -> Any:
    """The result of `compute`, as JSON (fp64 numbers to the last bit), from whoever computed it first.

    Args:
        name, settings: as for `shared_folder`.
    """
    with shared_folder(context, calibration, name, **settings) as folder, alone(folder):
        path = folder / "result.json"
        if path.exists():
            context.note(REUSED.format(name))
            return json.loads(path.read_text(encoding="utf-8"))
        result = compute()
        write_whole(path, result)
        return result


def remembered_tensors(
    context: Context, calibration: Calibration, name: str, compute: Callable[[], dict[str, Tensor]], **settings: Any
) -> dict[str, Tensor]:
    """The tensors that `compute` returns, contiguous and on the CPU, from whoever computed them first.

    Args:
        name, settings: as for `shared_folder`.
    """
    from safetensors.torch import load_file, save_file

    with shared_folder(context, calibration, name, **settings) as folder, alone(folder):
        path, temporary = folder / "result.safetensors", folder / "result.tmp"
        if path.exists():
            context.note(REUSED.format(name))
            return load_file(path)
        result = compute()
        if context.shared is not None:
            save_file(result, temporary)
            temporary.replace(path)
        return result


def write_whole(path: Path, content: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def read_or(path: Path, default: Any) -> Any:
    """The JSON of a file, or a default where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default
