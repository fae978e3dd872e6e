"""How much faster the shared-prefix evaluator is than stock lm-eval, task by task, on the same requests of one model.

    python -m benchmarks.selfcheck evaluator --times 3

The bound is what evaluating every token once would give: the tokens that stock lm-eval reads (padding left out, and
choices of one token read together, as it does) over those that the evaluator reads. The head sees fewer positions still
and rows are padded less, so that the bound can be passed. Stock runs at each of some batch sizes, and its best counts.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from lm_eval.models import huggingface
from tabulate import tabulate
from transformers import AutoModelForCausalLM

from benchmarks import harness, models
from benchmarks.prefix_lm import Answer, PrefixLM, prompts_of
from benchmarks.prefix_trees import groups
from benchmarks.presets import PRESETS
from benchmarks.selfcheck import interleaved
from benchmarks.tasks import check, expand
from methods.base import Silent
from methods.errors import UserError

HFLM: Any = huggingface.HFLM  # its registering decorator hides its type
MODEL = "smollm2-135m-q4"
TASKS = {
    "arc_challenge@25shot": 4,
    "mmlu_anatomy@5shot": 100,
    "hellaswag": 64,
    "arc_easy": 48,
    "arc_challenge": 48,
    "piqa": 64,
    "winogrande": 96,
    "boolq": 24,
    "truthfulqa_mc2": 10,
    "wikileads_mc": 20,
}
"""Documents per task: enough to fill the batches, and minutes on two cores. A whole MMLU subject has 100 or more."""
BATCH_SIZES = (1, 4, 8)
HEADERS = ("task", "documents", "requests", "tokens", "unique", "bound", "stock s (batch)", "ours s", "times as fast")
CHECKED = ("largest difference", "other answers")


def report(repeats: int) -> None:
    """Print the table; a task whose data cannot be had is named below it."""
    path = models.resolve(MODEL).prepare()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = models.load_tokenizer(path)
    rows, without = [], []
    for name, documents in TASKS.items():
        try:
            asked = requests(name, documents)
        except UserError as error:
            without.append(f"{name}: {error}")
            continue
        rows.append((name, documents, *measured(model, tokenizer, asked, repeats)))
        print(tabulate(rows[-1:], tablefmt="plain"), flush=True)
    print(tabulate(rows, (*HEADERS, *CHECKED), disable_numparse=True))
    print("\n".join(without))


def requests(name: str, documents: int) -> list[Any]:
    """What lm-eval asks a model about the first documents of a task."""
    (task,) = expand([name], models.resolve("smollm2-135m"), PRESETS["paper"])
    check(task, offline=False)
    loaded = harness.load(task)
    for leaf in loaded["tasks"].values():
        leaf.build_all_requests(limit=documents, rank=0, world_size=1)
    return [request for leaf in loaded["tasks"].values() for request in leaf.instances]


def measured(model: Any, tokenizer: Any, asked: list[Any], repeats: int) -> tuple[str, ...]:
    """The columns from the number of requests on."""
    stock = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in BATCH_SIZES}
    ours = PrefixLM(model, tokenizer, PRESETS["paper"].batch_size, Silent(), "task")
    runs: dict[str, Callable[[], object]] = {"ours": lambda: ours.loglikelihood(asked)}
    runs |= {str(size): _run(lm, asked) for size, lm in stock.items()}
    ours.loglikelihood(asked[:8])  # a warm-up; whole runs are long
    seconds = {name: median(times) for name, times in interleaved(runs, repeats, warm_up=0).items()}
    own = seconds.pop("ours")
    best = min(seconds, key=lambda size: seconds[size])
    tokens, unique = _tokens(model, tokenizer, asked)
    speeds = (f"{seconds[best]:.1f} ({best})", f"{own:.1f}", f"{seconds[best] / own:.2f}")
    exact = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=int(best), softmax_dtype="float64")
    checked = _compared(asked, ours.loglikelihood(asked), _run(exact, asked)())
    return str(len(asked)), str(tokens), str(unique), f"{tokens / unique:.2f}", *speeds, *checked


def _run(lm: Any, asked: list[Any]) -> Callable[[], list[Answer]]:
    return lambda: lm.loglikelihood(asked, disable_tqdm=True)


def _tokens(model: Any, tokenizer: Any, asked: list[Any]) -> tuple[int, int]:
    """How many tokens stock lm-eval reads, padding left out, and how many the evaluator."""
    taken: list[Any] = []

    class Listener(PrefixLM):
        """Takes down what would be read."""

        def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[Answer]:
            taken.extend(prompts_of(requests, self.max_length)[0])
            return [(0.0, False)] * len(requests)

    Listener(model, tokenizer, 1, Silent(), "task").loglikelihood(asked)
    found = groups(taken)
    unique = sum(len(group.prefix) + sum(row.size for row in group.rows) for group in found)
    return sum(len(prompt.tokens) for prompt in taken), unique


def _compared(asked: list[Any], own: list[Answer], stock: list[Answer]) -> tuple[str, str]:
    """The largest difference of log-likelihoods, and how many documents get another answer, by sum or by length."""
    largest = max(abs(one - other) for (one, _), (other, _) in zip(own, stock, strict=True))
    pairs = list(zip(_chosen(asked, own).items(), _chosen(asked, stock).items(), strict=True))
    return f"{largest:.1e}", f"{sum(one != other for one, other in pairs)} of {len(pairs)}"


def _chosen(asked: list[Any], answers: list[Answer]) -> dict[Any, tuple[int, ...]]:
    """By document: the likeliest choice, and the likeliest for its length in characters."""
    scores: dict[Any, list[tuple[float, float]]] = {}
    for request, (score, _) in zip(asked, answers, strict=True):
        per_letter = score / max(1, len(request.args[1]))
        scores.setdefault((request.task_name, request.doc_id), []).append((score, per_letter))
    return {
        document: tuple(way.index(max(way)) for way in zip(*rows, strict=True)) for document, rows in scores.items()
    }
