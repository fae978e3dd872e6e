"""lm-evaluation-harness: stock task definitions under their stock names, run on a model that is already in memory."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.tasks import TaskManager

from benchmarks import hub, samples
from benchmarks.metric import Evaluation, Metric
from benchmarks.prefix_lm import PrefixLM
from benchmarks.samples import Sample
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
) -> Evaluation:
    """Run one task or group; see `benchmarks.tasks.evaluate`."""
    loaded = load(task)
    lm = PrefixLM(model, tokenizer, settings.batch_size, progress, task.name)
    metrics, answers = score(loaded, lm, settings.documents)
    for name, found in answers.items():
        samples.write(samples.path_of(samples_dir, name), found)
    if lm.truncated:
        shots = task.name.rpartition("@")[2]
        metrics[f"{task.source}/truncated_requests@{shots}"] = Metric(float(lm.truncated), None, lm.requests)
    return Evaluation(
        metrics=metrics,
        dataset_revisions={name: _revision(leaf.dataset) for name, leaf in loaded["tasks"].items()},
        task_versions=versions(loaded),
        notes=_shortage(task, [len(leaf.task_docs) for leaf in loaded["tasks"].values()], settings.documents),
    )


def score(loaded: Any, lm: Any, documents: int | None) -> tuple[dict[str, Metric], dict[str, list[Sample]]]:
    """Metrics of every task and group by name, and the samples of every task by name and shots (`arc_easy@0shot`).

    Args:
        loaded: what `load` gives.
        lm: an lm-eval model that answers the requests.
        documents: only the first ones of each task; None: all.
    """
    shots = labels(loaded)
    results: Any = lm_evaluate(lm, loaded, limit=documents)
    answers = {f"{name}@{shots[name]}": samples.of_documents(found) for name, found in results["samples"].items()}
    return _metrics(results, shots), answers


def load(task: Task) -> Any:
    """lm-eval's task objects, set to the asked number of solved examples, else each to its own.

    Raises:
        UserError: a task takes no solved examples, or has not so many.
    """
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
    _check_pools(task, loaded["tasks"])
    return loaded


def _check_pools(task: Task, leaves: Mapping[str, Any]) -> None:
    """lm-eval would fail in the middle, and with an assertion."""
    pools = {name: _pool(leaf) for name, leaf in leaves.items() if leaf.get_config("num_fewshot") > _pool(leaf)}
    if pools:
        name, size = min(pools.items(), key=lambda item: item[1])
        raise UserError(
            f"{leaves[name].get_config('num_fewshot')} solved examples are asked for before each question, and {name} "
            f"has {size} to draw from. Type: --tasks {task.source}@{size}shot"
        )


def _pool(leaf: Any) -> int:
    """How many examples can be drawn: lm-eval keeps one in reserve where a question may be its own example."""
    reserve = leaf.fewshot_cfg.split == leaf.get_config("test_split")
    return max(0, len(leaf.sampler.df) - reserve)


def versions(loaded: Any) -> dict[str, str]:
    """The version of every task and group, by name and shots."""
    found = {name: leaf.VERSION for name, leaf in loaded["tasks"].items()}
    found |= {name: group.version for name, group in loaded["groups"].items()}
    shots = labels(loaded)
    return {f"{name}@{shots[name]}": str(found[name]) for name in sorted(found)}


def labels(loaded: Any) -> dict[str, str]:
    """How many solved examples each task and group has, as in `5shot`."""
    members = {name: group.get_all_tasks() for name, group in loaded["groups"].items()}
    members |= {name: [leaf] for name, leaf in loaded["tasks"].items()}
    return {name: shots_label({leaf.get_config("num_fewshot") for leaf in members[name]}) for name in members}


def _revision(splits: Any) -> str:
    """The commit of a task's data; tasks of this repository read an asset package instead."""
    return next((hub.prepared_commit(rows) for rows in splits.values()), "unknown")


def _shortage(task: Task, available: Sequence[int], documents: int | None) -> tuple[str, ...]:
    """A note where there are fewer documents than were asked for."""
    fewer = sorted({count for count in available if documents and count < documents})
    if not fewer:
        return ()
    range_ = " to ".join(map(str, dict.fromkeys((fewer[0], fewer[-1]))))
    which = "" if len(available) == 1 else f" in {sum(count in fewer for count in available)} of {len(available)} tasks"
    return (f"{task.name}: asked for {documents} documents, there are {range_}{which}",)


def _metrics(results: dict[str, Any], shots: dict[str, str]) -> dict[str, Metric]:
    """Every number of every task and group: `arc_easy/acc_norm@0shot`."""
    metrics = {}
    for name, row in results["results"].items():
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, float | int):
                error = row.get(f"{metric}_stderr,{kind}")
                stderr = float(error) if isinstance(error, float | int) and math.isfinite(error) else None
                full = f"{name}/{samples.label(metric, kind)}@{shots[name]}"
                metrics[full] = Metric(float(value), stderr, row["sample_len"])
    return metrics
