"""Compute every metric of finished cells again from the samples beside their records, without a model.

    python -m benchmarks.rescore --results results
    python -m benchmarks.rescore --results results --write

The first says what would change, for instance by another version of lm-eval; the second writes it into the records and
their samples, whose scores per document the reports compare. A record that a run is working on is left alone.
Only what was scored can be: speed is measured, and prompts that were cut are counted while a model answers. Exit
status: 0 everything was scored again, 1 something could not be, 2 the request is not possible.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks import record, samples, store, tasks
from benchmarks.job import lock_of
from benchmarks.metric import Metric
from benchmarks.samples import Sample
from benchmarks.store import Record
from methods.errors import UserError


@dataclass(frozen=True)
class Scored:
    """One record, scored again."""

    metrics: dict[str, dict[str, Any]]
    """By name, as a record has them."""
    samples: dict[str, list[Sample]]
    """By task: those of which a document has another score now."""
    refused: dict[str, str]
    """By task: why it could not be scored."""


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.rescore", description="Score samples again.")
    options.add_argument("--results", type=Path, required=True, metavar="DIR", help="records with their samples")
    options.add_argument("--write", action="store_true", help="replace the records in which a metric changes")
    arguments = options.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.rescore", *argv])
    # The data that were answered are on this machine; asking the hub for newer ones would only cost time.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        return run(arguments.results, command if arguments.write else None)
    except UserError as error:
        print(f"benchmarks.rescore: {error}", file=sys.stderr)
        return 2


def run(results: Path, command: str | None) -> int:
    """Score every record below `results` that has samples; the exit status.

    Args:
        command: written into the records that change; None: none is written.

    Raises:
        UserError: there is no record with samples, or a record is damaged.
    """
    paths = [path for path in sorted(results.rglob("record.json")) if (path.parent / "samples").is_dir()]
    if not paths:
        raise UserError(f"No record below {results} has samples. Give the folder that a run wrote to: --results DIR")
    return int(any([_rescore(path, results, command) for path in paths]))


def _rescore(path: Path, results: Path, command: str | None) -> bool:
    """One record, with its lines printed; whether something could not be scored."""
    print(path)
    try:
        with _lock(path) if command else nullcontext():
            content = store.read_record(path)
            assert content
            scored = recompute(content, path.parent / "samples")
            print("\n".join(_lines(content["metrics"], scored)))
            if command:
                _write(path, content, scored, _origin(results, command))
            return bool(scored.refused)
    except Timeout:
        print("  not scored: a run is working on it. Let it finish and repeat the command")
        return True


def _lock(path: Path) -> AbstractContextManager[Any]:
    """The lock of a cell, refused at once; a folder without locks is none that a run has written to."""
    lock = lock_of(path.resolve())
    return FileLock(lock, timeout=0) if lock.parent.is_dir() else nullcontext()


def _lines(was: dict[str, Any], now: Scored) -> Iterator[str]:
    for name, metric in now.metrics.items():
        yield f"  {name}: " + ("equal" if metric == was.get(name) else f"was {was.get(name)}, now {metric}")
    for task in now.samples:
        yield f"  {task}: documents with other scores than in its samples"
    for task, reason in now.refused.items():
        yield f"  not scored: {task}: {reason}"


def _write(path: Path, content: Record, scored: Scored, origin: dict[str, Any]) -> None:
    """Samples first: metrics rest on the answers in them, so after a kill in between the same command does the rest."""
    for task, found in scored.samples.items():
        samples.write(samples.path_of(path.parent / "samples", task), found)
    if scored.samples or any(metric != content["metrics"].get(name) for name, metric in scored.metrics.items()):
        content["metrics"] |= scored.metrics
        content["provenance"]["rescored"] = origin
        store.write_record(path, content)


def _origin(results: Path, command: str) -> dict[str, Any]:
    """Which code scored, as `provenance` says of the run that measured."""
    commit, dirty = record.git_state(record.ROOT, (str(results),))
    now = {"git_commit": commit, "git_dirty": dirty, "versions": record.versions()}
    return now | {"started": record.STARTED, "command": command}


def recompute(content: Record, folder: Path) -> Scored:
    """Everything that a record's samples say.

    Args:
        folder: of the samples.
    """
    scored = Scored({}, {}, {})
    for name in _outermost([name for name in content["provenance"]["task_versions"] if name != "speed"]):
        if name not in content["skipped"]:
            try:
                found, changed = (_perplexity if name.startswith("ppl-") else _lm_eval)(name, content, folder)
                scored.metrics.update({metric: asdict(value) for metric, value in found.items()})
                scored.samples.update(changed)
            except UserError as error:
                scored.refused[name] = " ".join(str(error).split())
    return scored


def _outermost(names: Sequence[str]) -> list[str]:
    """The tasks that are no part of a group among them: a group is scored as a whole."""
    inside = {part for name in names for part in _inside(name)}
    return [name for name in names if name not in inside]


def _inside(name: str) -> set[str]:
    """What is inside a group; nothing where the group is not known any more."""
    with suppress(UserError):
        return tasks.inside(name)
    return set()


def _perplexity(name: str, content: Record, folder: Path) -> tuple[dict[str, Metric], dict[str, list[Sample]]]:
    from benchmarks import perplexity

    _check_versions({name: perplexity.VERSION}, content)
    label, _, window = name.removeprefix("ppl-").rpartition("@")
    metric, windows = f"{label}/token_ppl@{window}", _read(folder, name)
    _check_windows(windows, content["metrics"][metric]["n"])
    return {metric: perplexity.token_perplexity(windows)}, {}


def _check_windows(windows: Sequence[Sample], measured: int) -> None:
    if [window["id"] for window in windows] != list(range(measured)):
        raise UserError(
            f"the record has {measured} windows, and the samples {len(windows)} or not the first ones in their order. "
            "Restore the samples from a backup or from git, or measure the task again: --force"
        )
    for window in windows:
        if not (isinstance(loss := window.get("nll"), float | int) and math.isfinite(loss)):
            raise UserError(f"window {window['id']} has the nll {loss}, which is no loss. Measure it again: --force")


def _lm_eval(name: str, content: Record, folder: Path) -> tuple[dict[str, Metric], dict[str, list[Sample]]]:
    from benchmarks import harness
    from benchmarks.stored_lm import StoredLM

    task = tasks.lm_task(name.removesuffix("@mixedshot"))
    tasks.check(task, offline=True)
    loaded = harness.load(task)
    _check_versions(harness.versions(loaded), content)
    labels = harness.labels(loaded)
    held = {leaf: _read(folder, f"{leaf}@{labels[leaf]}") for leaf in loaded["tasks"]}
    metrics, answered = harness.score(loaded, StoredLM(held), content["cell"]["budget"]["documents"])
    changed = {}
    for leaf, found in held.items():
        now = answered[task := f"{leaf}@{labels[leaf]}"]
        if len(found) != len(now):
            raise UserError(
                f"{leaf} has {len(now)} documents now, and {len(found)} were answered. Use the data of the run."
            )
        if samples.scores(found) != samples.scores(now):
            changed[task] = now
    return metrics, changed


def _check_versions(now: dict[str, str], content: Record) -> None:
    recorded = content["provenance"]["task_versions"]
    for name, version in now.items():
        if recorded.get(name) != version:
            raise UserError(
                f"{name} was measured in version {recorded.get(name)}, and here it has version {version}. Install what "
                "the record's provenance.versions names, or measure the task again: --force"
            )


def _read(folder: Path, name: str) -> list[Sample]:
    path = samples.path_of(folder, name)
    if not path.exists():
        raise UserError(f"there are no samples at {path}: an older version measured it, or they were deleted.")
    return samples.read(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
