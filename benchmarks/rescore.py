"""Compute every metric of finished cells again from the samples beside their records, without a model.

    python -m benchmarks.rescore --results results
    python -m benchmarks.rescore --results results --write

The first says what would change, for instance by another version of lm-eval; the second writes it into the records.
Only what was scored can be: speed is measured, and prompts that were cut are counted while a model answers. Exit
status: 0 everything was scored again, 1 something could not be, 2 the request is not possible.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import record, samples, store, tasks
from benchmarks.metric import Metric
from benchmarks.samples import Sample
from benchmarks.store import Record
from methods.errors import UserError


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
    content = store.read_record(path)
    assert content
    metrics, refused = recompute(content, path.parent / "samples")
    was = {name: content["metrics"].get(name) for name in metrics}
    changed = {name: metric for name, metric in metrics.items() if metric != was[name]}
    print(path)
    print("\n".join(_lines(was, metrics, refused)))
    if changed and command:
        content["metrics"] |= changed
        content["provenance"]["rescored"] = _origin(results, command)
        store.write_record(path, content)
    return bool(refused)


def _lines(was: dict[str, Any], now: dict[str, Any], refused: dict[str, str]) -> Iterator[str]:
    for name, metric in now.items():
        yield f"  {name}: " + ("equal" if metric == was[name] else f"was {was[name]}, now {metric}")
    for task, reason in refused.items():
        yield f"  not scored: {task}: {reason}"


def _origin(results: Path, command: str) -> dict[str, Any]:
    """Which code scored, as `provenance` says of the run that measured."""
    commit, dirty = record.git_state(record.ROOT, (str(results),))
    now = {"git_commit": commit, "git_dirty": dirty, "versions": record.versions()}
    return now | {"started": record.STARTED, "command": command}


def recompute(content: Record, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Metrics by name, as a record has them, and by task why it could not be scored.

    Args:
        folder: of the samples.
    """
    metrics: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name in _outermost([name for name in content["provenance"]["task_versions"] if name != "speed"]):
        if name not in content["skipped"]:
            try:
                found = (_perplexity if name.startswith("ppl-") else _lm_eval)(name, content, folder)
                metrics |= {metric: asdict(value) for metric, value in found.items()}
            except UserError as error:
                refused[name] = " ".join(str(error).split())
    return metrics, refused


def _outermost(names: Sequence[str]) -> list[str]:
    """The tasks that are no part of a group among them: a group is scored as a whole."""
    inside = {member for name in names for member in _members(name)}
    return [name for name in names if not {name, f"{name.rpartition('@')[0]}@mixedshot"} & inside]


def _members(name: str) -> set[str]:
    """The members of a group, with its number of solved examples; nothing where the group is not known any more."""
    source, _, shots = name.rpartition("@")
    with suppress(UserError):
        return {f"{member}@{shots}" for member in tasks.members(source)}
    return set()


def _perplexity(name: str, content: Record, folder: Path) -> dict[str, Metric]:
    from benchmarks import perplexity

    _check_versions({name: perplexity.VERSION}, content)
    label, _, window = name.removeprefix("ppl-").rpartition("@")
    return {f"{label}/token_ppl@{window}": perplexity.token_perplexity(_read(folder, name))}


def _lm_eval(name: str, content: Record, folder: Path) -> dict[str, Metric]:
    from benchmarks import harness
    from benchmarks.stored_lm import StoredLM

    task = tasks.lm_task(name.removesuffix("@mixedshot"))
    tasks.check(task, offline=True)
    loaded = harness.load(task)
    _check_versions(harness.versions(loaded), content)
    labels = harness.labels(loaded)
    held = {leaf: _read(folder, f"{leaf}@{labels[leaf]}") for leaf in loaded["tasks"]}
    metrics, answered = harness.score(loaded, StoredLM(held), content["cell"]["budget"]["documents"])
    for leaf, found in held.items():
        if len(found) != (now := len(answered[f"{leaf}@{labels[leaf]}"])):
            raise UserError(f"{leaf} has {now} documents now, and {len(found)} were answered. Use the data of the run.")
    return metrics


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
