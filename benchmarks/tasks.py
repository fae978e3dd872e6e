"""What is measured on a model: perplexity, lm-evaluation-harness tasks, speed. Names, plans and the one dispatch.

    python run_all.py --list tasks
    python run_all.py --models tiny-llama --tasks ppl:moby-dick@256 wikileads_mc arc_easy@5shot speed

`NAME@Nshot` puts N solved examples before each question; without it there are as many as lm-eval's definition says,
mostly none, and in a group each member has its own. Naming and planning need no torch.
"""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import data, hub, samples
from benchmarks.metric import Evaluation
from benchmarks.models import Model
from benchmarks.suites import EXTENTS, SUITES, WITHOUT_HUB
from methods.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from benchmarks.presets import Preset
    from methods.base import Progress

OWN_TASKS = Path(__file__).parent / "task_definitions"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One evaluation of one model: the unit that is resumed."""

    name: str
    """Unique among a model's tasks and safe as a file name: `ppl-wikitext2@2048`, `arc_easy@0shot`, `speed`."""
    kind: Literal["ppl", "lm_eval", "speed"]
    source: str = ""
    """Text (ppl) or lm-eval name (lm_eval)."""
    window: int = 0
    """Tokens per perplexity window."""
    shots: int = 0
    """Solved examples before each question; of a group the most that a member has."""
    forced: bool = False
    """Whether `shots` was asked for and holds for every member, whatever the definitions say."""


def names() -> list[str]:
    """The single tasks of the suites; every other task or group of lm-eval and `ppl:SOURCE@WINDOW` work as well."""
    texts = [name for name in data.names() if "test" in data.SPLITS[name]]
    return [*EXTENTS, "speed", *(f"ppl:{name}" for name in texts)]


def expand(requested: Iterable[str], model: Model, settings: "Preset") -> list[Task]:
    """The tasks that suites and single names stand for on one model, each once, in the order asked.

    Args:
        settings: its `ppl_lengths` are the perplexity windows; those beyond the model's limit are cut to it.

    Raises:
        UserError: an unknown name or a window beyond the model's limit.
    """
    tasks: dict[str, Task] = {}
    for request in requested:
        for task in _expand(request, model, settings.ppl_lengths):
            tasks.setdefault(task.name, task)
    return list(tasks.values())


def _expand(request: str, model: Model, lengths: Sequence[int]) -> Iterator[Task]:
    suites = {**SUITES, "ppl": tuple(f"ppl:{source}" for source in model.texts)}
    if model.kind in ("embedded", "asset"):
        suites |= WITHOUT_HUB
    if request == "speed" or request not in suites:
        yield from _single(request, model, lengths)
    else:
        for part in suites[request]:
            yield from _expand(part, model, lengths)


def _single(request: str, model: Model, lengths: Sequence[int]) -> Iterator[Task]:
    if request == "speed":
        yield Task(name="speed", kind="speed")
    elif request.startswith("ppl:"):
        yield from _ppl(request.removeprefix("ppl:"), model, lengths)
    else:
        yield lm_task(request)


def lm_task(request: str) -> Task:
    """The lm-eval task or group that `NAME` or `NAME@Nshot` stands for.

    Raises:
        UserError: an unknown name.
    """
    name, asked = _split_at(request, r"@(\d+)shot")
    shots = _shots(definition(name)) if asked is None else {asked}
    label = f"{name}@{shots_label(shots)}"
    return Task(name=label, kind="lm_eval", source=name, shots=max(shots, default=0), forced=asked is not None)


def shots_label(shots: set[int]) -> str:
    """How many solved examples, as in `5shot`; `mixedshot` for a group whose members differ."""
    return f"{next(iter(shots))}shot" if len(shots) == 1 else "mixedshot"


def _ppl(request: str, model: Model, lengths: Sequence[int]) -> Iterator[Task]:
    source, window = _split_at(request, r"@(\d+)")
    limit = (model.config or {}).get("max_position_embeddings") or max(lengths)
    if window is not None and not 2 <= window <= limit:
        raise UserError(
            f"ppl:{request} is not possible on {model.name}: a window has 2 to {limit} tokens. "
            f"Type ppl:{source}@{limit}, or ppl:{source} for the usual windows."
        )
    for length in sorted({min(length, limit) for length in lengths} if window is None else {window}):
        yield Task(name=f"ppl-{data.label(source)}@{length}", kind="ppl", source=source, window=length)


def _split_at(request: str, suffix: str) -> tuple[str, int | None]:
    """`name@5shot` as (`name`, 5); the number is None where there is none."""
    match = re.fullmatch(f"(.*){suffix}", request)
    return (match[1], int(match[2])) if match else (request, None)


def check(task: Task, offline: bool) -> None:
    """Make sure that a task's data can be had, before any work starts. May ask the hub unless `offline`.

    Raises:
        UserError: they cannot; the message says what to type.
    """
    if task.kind == "ppl":
        data.check(task.source, "test", offline)
    elif task.source == "wikileads_mc":
        data.check("wikileads", "test", offline)
    elif task.kind == "lm_eval":
        for repository, config in sorted(_datasets(definition(task.source))):
            hub.check_dataset(repository, config, offline)


def definition(name: str) -> Path:
    """The YAML file that defines an lm-eval task or group, found without importing lm-eval.

    Raises:
        UserError: there is none; the message has the nearest names.
    """
    tasks = _stock_folder()
    likely = [folder for folder in tasks.iterdir() if name.startswith(folder.name)]
    for folder in (OWN_TASKS, *likely, tasks):
        if name in (found := _definitions(folder)):
            return found[name]
    near = difflib.get_close_matches(name, _definitions(tasks), n=3)
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    hint = f"Any task or group of lm-eval works too, but none of its tags{nearest}."
    raise unknown("task", name, {*names(), *SUITES}, hint)


def task_folder(path: Path) -> Path:
    """The folder, directly under lm-eval's or ours, that a definition and what it includes lie in."""
    stock = _stock_folder()
    return stock / path.relative_to(stock).parts[0] if path.is_relative_to(stock) else OWN_TASKS


def _stock_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.origin
    return Path(spec.origin).parent / "tasks"


@cache
def _definitions(folder: Path) -> dict[str, Path]:
    """Every task and group defined under a folder. A regular expression reads 14,000 files in half a second."""
    pattern = re.compile(rb"^\"?(?:task|group)\"?:[ \t]*[\"']?([^\s\"'#\[{]+)", re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml")):
        for name in pattern.findall(path.read_bytes()):
            found.setdefault(name.decode(), path)
    return found


def _shots(path: Path, above: int | None = None) -> set[int]:
    """How many solved examples a task, or each member of a group, has where none are asked for.

    Args:
        above: what the group around it says.
    """
    if not isinstance(_yaml(path).get("task"), list):
        return {_own_shots(path, above) or 0}
    return {shots for file, said in _parts(path, above) for shots in _shots(file, said)}


def _own_shots(path: Path, above: int | None) -> int | None:
    return _yaml(path).get("num_fewshot") if above is None else above


def _parts(path: Path, above: int | None = None) -> Iterator[tuple[Path, int | None]]:
    """The files of a group's members, and how many solved examples it says each has; nothing for a task."""
    members = _yaml(path).get("task")
    own = _own_shots(path, above)
    for member in members if isinstance(members, list) else []:
        said = own if isinstance(member, str) else member.get("num_fewshot", own)
        yield from ((file, said) for file in _members(member, path))


def _datasets(path: Path) -> set[tuple[str, str]]:
    """(repository, config) of every data set that a task or group reads."""
    content = _yaml(path)
    if isinstance(content.get("task"), list):
        return {pair for file, _ in _parts(path) for pair in _datasets(file)}
    return {(content["dataset_path"], content.get("dataset_name") or "default")} if "dataset_path" in content else set()


def inside(label: str) -> set[str]:
    """Every task and group inside a group, at any depth, by name and shots; nothing for a task.

    Args:
        label: name and shots, as in `mmlu@5shot`: all members have so many; `mixedshot`: as many as is defined.

    Raises:
        UserError: an unknown name.
    """
    name, shots = _split_at(label, r"@(\d+)shot")
    found = _inside(definition(name.removesuffix("@mixedshot")))
    return {f"{part}@{shots_label(own if shots is None else {shots})}" for part, own in found}


def _inside(path: Path, above: int | None = None) -> Iterator[tuple[str, set[int]]]:
    for file, said in _parts(path, above):
        yield _yaml(file).get("group") or _yaml(file)["task"], _shots(file, said)
        yield from _inside(file, said)


def _members(member: str | dict[str, Any], group: Path) -> list[Path]:
    """The files that one entry of a group stands for: a task's, a group's, or those of every task with that tag."""
    name = member if isinstance(member, str) else member.get("task") or member.get("group")
    for folder in (task_folder(group), _stock_folder()):
        known = _definitions(folder)
        if found := [known[name]] if name in known else [path for path in known.values() if name in _tags(path)]:
            return found
    return []


def _tags(path: Path) -> list[str]:
    tags = _yaml(path).get("tag") or []
    return tags if isinstance(tags, list) else [tags]


@cache
def _yaml(path: Path) -> dict[str, Any]:
    """A task file with what it includes; its functions stay unread."""
    import yaml

    class Loader(yaml.CSafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    content = yaml.load(path.read_bytes(), Loader)
    includes = content.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        merged |= _yaml(path.parent / include)
    return merged | content


LOWER_IS_BETTER = re.compile(
    r"(token_|word_|byte_)?(perplexity|ppl)|bits_per_byte|brier(_score)?|ter|wer|likelihood_diff|\w*bias\w*"
    r"|truncated_requests|(weights|peak|peak_host)_bytes|cache_bytes_per_token|\w+_(flops|joules)_per_token"
    r"|(first|next)_token_s_p\d+|\w+_time_over_bound|\w+_per_s_iqr"
)
"""Quantities of which less is better: ours, and those of lm-eval's own metrics and of its task definitions."""


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric, named as in `wikitext2/token_ppl@2048`, is the better one."""
    quantity = re.split(r"[@\[]", metric.rpartition("/")[2])[0]
    return LOWER_IS_BETTER.fullmatch(quantity) is not None


def evaluate(
    task: Task,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dense: "PreTrainedModel | None",
    settings: "Preset",
    samples_dir: Path,
    progress: "Progress",
) -> Evaluation:
    """Run one task.

    Args:
        dense: the dense model, for the comparison of speeds; None when `model` is the dense one.
        samples_dir: receives `<task>.jsonl.gz`, one line per document or window; see `benchmarks.samples`.

    Raises:
        UserError: a data set is out of reach, or the task cannot be run as asked.
    """
    if task.kind == "speed":
        from benchmarks import speed

        metrics = speed.measure(model, dense, settings, progress)
        return Evaluation(metrics=metrics, dataset_revisions={}, task_versions={task.name: speed.VERSION})
    if task.kind == "ppl":
        return _evaluate_ppl(task, model, tokenizer, settings, samples_dir, progress)
    from benchmarks import harness

    return harness.evaluate(task, model, tokenizer, settings, samples_dir, progress)


def _evaluate_ppl(
    task: Task,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: "Preset",
    samples_dir: Path,
    progress: "Progress",
) -> Evaluation:
    from benchmarks import perplexity

    text, asked = data.load(task.source, "test"), settings.ppl_windows
    label = data.label(task.source)
    known: Any = {"dataset_revisions": {label: text.revision}, "task_versions": {task.name: perplexity.VERSION}}
    try:
        windows = perplexity.token_losses(model, tokenizer, text.content, task.window, asked, progress)
    except perplexity.TooShort as error:
        return Evaluation(metrics={}, **known, skipped=str(error))
    samples.write(samples.path_of(samples_dir, task.name), windows)
    few = asked is not None and len(windows) < asked
    note = f"{task.name}: asked for {asked} windows, there are {len(windows)}"
    metric = perplexity.token_perplexity(windows)
    return Evaluation(metrics={f"{label}/token_ppl@{task.window}": metric}, **known, notes=(note,) if few else ())
