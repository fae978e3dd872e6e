"""What a model answered, document by document, in `samples/<task>.jsonl.gz` beside its record.

One line per document of an lm-eval task: `id`, `hash`, `correct` (each metric's score), and all that lm-eval needs to
score it again: `log_likelihoods` and `greedy` (is that answer the likeliest?) of its requests, or the `texts` that
were written. One line per perplexity window: `id`, `hash`, `nll` (mean nats per token), `tokens` (predicted ones).
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from methods.errors import UserError

Sample = dict[str, Any]


def path_of(folder: Path, task: str) -> Path:
    """The samples of a task, named as in `arc_easy@0shot` or `ppl-wikitext2@2048`."""
    return folder / f"{task}.jsonl.gz"


def write(path: Path, samples: Iterable[Sample]) -> None:
    """The same samples always give the same bytes, and the file appears whole or not at all."""
    lines = "".join(json.dumps(sample, default=_plain) + "\n" for sample in samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(gzip.compress(lines.encode(), mtime=0))
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    """A number or an array of numpy's."""
    return value.tolist()


def read(path: Path) -> list[Sample]:
    """The samples of one file.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        if not found:
            raise ValueError("there are none in it")
        if not all(map(_is_sample, found)):
            raise ValueError("a line has no id or no hash")
        return found
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"The samples {path} are damaged: {error}. Restore them from a backup or from git, or measure the task "
            "again: repeat the run with --force."
        ) from None


def scores(samples: Iterable[Sample]) -> dict[int, str]:
    """By document what it scored, as the text that is written, so that old and new ones can be compared."""
    return {sample["id"]: json.dumps(sample.get("correct"), default=_plain, sort_keys=True) for sample in samples}


def _is_sample(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("id"), int) and isinstance(line.get("hash"), str)


def of_documents(logged: Iterable[dict[str, Any]]) -> list[Sample]:
    """lm-eval's own samples, of which a document has one for each filter, as one per document."""
    found: dict[int, Sample] = {}
    for sample in logged:
        new = {"id": sample["doc_id"], "hash": sample["doc_hash"], "correct": {}, **_answers(sample["resps"])}
        correct = found.setdefault(sample["doc_id"], new)["correct"]
        correct |= {label(metric, sample["filter"]): sample[metric] for metric in sample["metrics"]}
    return list(found.values())


def label(metric: str, kind: str) -> str:
    """A metric's name; with the filter that was applied to the answers if it has a name of its own."""
    return metric if kind == "none" else f"{metric}[{kind}]"


def _answers(responses: list[list[Any]]) -> dict[str, list[Any] | None]:
    """The answers to all requests of a document: scored choices, a scored text or written texts."""
    answers = [answer for repeats in responses for answer in repeats]
    if all(isinstance(answer, str) for answer in answers):
        return {"log_likelihoods": None, "greedy": None, "texts": answers}
    if all(isinstance(answer, float) for answer in answers):
        return {"log_likelihoods": answers, "greedy": None, "texts": None}
    return {
        "log_likelihoods": [answer[0] for answer in answers],
        "greedy": [answer[1] for answer in answers],
        "texts": None,
    }
