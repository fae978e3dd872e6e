"""An lm-eval model that knows nothing but what another one once answered."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import handle_non_serializable, hash_string

from benchmarks.samples import Sample
from methods.errors import UserError


class StoredLM(LM):
    """Answers each request as the samples of its document say, in the order in which they were asked.

    Args:
        samples: by lm-eval's name of the task.
    """

    def __init__(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        super().__init__()
        self._samples: dict[Any, dict[Any, Sample]] = {
            task: {sample["id"]: sample for sample in found} for task, found in samples.items()
        }
        self._answers: dict[Any, Iterator[Any]] = {
            (task, sample["id"]): _answers(sample) for task, found in samples.items() for sample in found
        }

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood, is it the greedy choice) of each request."""
        return [self._next(request, tuple, "whether its choices are greedy") for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> Any:
        """The log-likelihood of each text."""
        return [self._next(request, float, "log-likelihoods of texts") for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What was written."""
        return [self._next(request, str, "texts") for request in requests]

    def _next(self, request: Instance, kind: type, what: str) -> Any:
        """The next answer to the document that a request is made of."""
        self._check(request)
        answer = next(self._answers[request.task_name, request.doc_id], None)
        if not isinstance(answer, kind):
            raise UserError(
                f"the samples of {request.task_name} do not say {what} for all requests of document {request.doc_id}: "
                "an older version wrote them, or another one of lm-eval. Measure the task again: --force"
            )
        return answer

    def _check(self, request: Instance) -> None:
        """The document is the one that was answered."""
        sample = self._samples[request.task_name].get(request.doc_id)
        content = json.dumps(request.doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
        stored, now = sample and sample["hash"], hash_string(content)
        if stored != now:
            raise UserError(
                f"document {request.doc_id} of {request.task_name} is another one than that which was answered: its "
                f"hash is {now}, that of the samples {stored}. Use the data that the record names."
            )


def _answers(sample: Sample) -> Iterator[Any]:
    """The answers of one document, of the kind that lm-eval expects."""
    if sample.get("texts") is not None:
        return iter(sample["texts"])
    if sample.get("greedy") is not None:
        # Where one list is longer an answer is missing, which the request that it belongs to finds out.
        return zip(sample.get("log_likelihoods") or [], sample["greedy"], strict=False)
    return iter(sample.get("log_likelihoods") or [])
