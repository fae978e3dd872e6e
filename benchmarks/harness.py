"""lm-evaluation-harness: stock task definitions under their stock names, run on a model that is already in memory."""

import gzip
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.tasks import TaskManager

from benchmarks import hub
from benchmarks.metric import Metric
from benchmarks.prefix_lm import PrefixLM
from benchmarks.tasks import Task, definition, shots_label, task_folder
from methods.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from benchmarks.presets import Preset
    from methods.base import Progress

FEWSHOT_SEED = 1234
"""lm-eval's own default for drawing solved examples."""


def evaluate(
    task: Task,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: "Preset",
    samples_dir: Path,
    progress: "Progress",
) -> tuple[dict[str, Metric], dict[str, dict[str, str]]]:
    """Run one task or group; see `benchmarks.tasks.evaluate`."""
    loaded = load(task)
    labels = _labels(loaded)
    lm = PrefixLM(model, tokenizer, settings.batch_size, progress, task.name)
    results: Any = lm_evaluate(lm, loaded, limit=settings.documents)
    for name, samples in results["samples"].items():
        write_samples(samples, samples_dir / f"{name}@{labels[name]}.jsonl.gz")
    metrics = _metrics(results, labels)
    if lm.truncated:
        shots = task.name.rpartition("@")[2]
        metrics[f"{task.source}/truncated_requests@{shots}"] = Metric(float(lm.truncated), None, lm.requests)
    versions = {f"{name}@{labels[name]}": str(version) for name, version in results["versions"].items()}
    revisions = {name: _revision(leaf.dataset) for name, leaf in loaded["tasks"].items()}
    return metrics, {"dataset_revisions": revisions, "task_versions": versions}


def load(task: Task) -> Any:
    """lm-eval's task objects, set to the asked number of solved examples, else each to its own."""
    folder = task_folder(definition(task.source))
    # Indexing everything takes ten seconds, one folder milliseconds; only `benchmarks` refers to other folders.
    everything = folder.name == "benchmarks"
    manager = TaskManager(include_path=None if everything else str(folder), include_defaults=everything)
    loaded: Any = manager.load([task.source])
    for leaf in loaded["tasks"].values():
        own = leaf.get_config("num_fewshot")
        if task.forced and task.shots and own == 0:
            raise UserError(f"lm-eval fixes {leaf.task_name} at zero shots. Type: --tasks {task.source}@0shot")
        leaf.set_config(key="num_fewshot", value=task.shots if task.forced else own or 0)
        leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _labels(loaded: Any) -> dict[str, str]:
    """How many solved examples each task and group has, as in `5shot`."""
    members = {name: group.get_all_tasks() for name, group in loaded["groups"].items()}
    members |= {name: [leaf] for name, leaf in loaded["tasks"].items()}
    return {name: shots_label({leaf.get_config("num_fewshot") for leaf in members[name]}) for name in members}


def _revision(splits: Any) -> str:
    """The commit of a task's data; tasks of this repository read an asset package instead."""
    return next((hub.prepared_commit(rows) for rows in splits.values()), "unknown")


def _metrics(results: dict[str, Any], labels: dict[str, str]) -> dict[str, Metric]:
    """Every number of every task and group: `arc_easy/acc_norm@0shot`."""
    metrics = {}
    for name, row in results["results"].items():
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, float | int):
                error = row.get(f"{metric}_stderr,{kind}")
                stderr = float(error) if isinstance(error, float | int) and math.isfinite(error) else None
                label = metric if kind == "none" else f"{metric}[{kind}]"
                metrics[f"{name}/{label}@{labels[name]}"] = Metric(float(value), stderr, row["sample_len"])
    return metrics


def write_samples(samples: list[dict[str, Any]], path: Path) -> None:
    """One line per document: its id and hash, each metric's score, the log-likelihood of each choice.

    The same samples always give the same bytes, and the file appears whole or not at all.
    """
    lines = "".join(json.dumps(_sample(sample)) + "\n" for sample in samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(gzip.compress(lines.encode(), mtime=0))
    partial.rename(path)


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    answers = sample["filtered_resps"]
    scored = all(isinstance(answer, tuple | list) for answer in answers)
    return {
        "id": sample["doc_id"],
        "hash": sample["doc_hash"],
        "correct": {metric: sample[metric] for metric in sample["metrics"]},
        "log_likelihoods": [answer[0] for answer in answers] if scored else None,
    }
