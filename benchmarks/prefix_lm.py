"""lm-evaluation-harness's model class with one thing done better: what prompts begin with alike is evaluated once.

    lm = PrefixLM(model, tokenizer, batch_size=8, progress=Silent(), label="arc_challenge@25shot")

Same requests, same tokens, same scores as lm-eval's `HFLM`, to which it leaves what is to be generated. What is shared
`benchmarks.prefix_trees` says: a prefix is read once, and rows, trees of what follows, are read after its key/value
cache with a mask that lets every token see its own past only; rows are padded to batches of like length. The head sees
only the positions that are scored. Log-probabilities are taken in fp32 (lm-eval takes them in the model's dtype). Two
requests that divide the same tokens at different places are told apart (lm-eval 0.4.13 looks the shorter continuation
up at the wrong positions).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from benchmarks.prefix_trees import Group, Prompt, Row, Tokens, groups
from methods.errors import UserError

if TYPE_CHECKING:
    from methods.base import Progress

# R rows of a batch, S nodes of the largest, P tokens of its longest prefix, N scored nodes, V vocabulary.
Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as text, as lm-eval hands them on, and each as tokens."""
Answer = tuple[float, bool]
"""The log-likelihood of a continuation, and whether it is the greedy choice."""
T = TypeVar("T")
_Base: Any = HFLM  # its registering decorator hides its type
TOKENS_PER_SEQUENCE = 256
"""Tokens of a forward pass for each sequence of the batch size."""
CACHED_PER_READ = 4
"""Tokens of key/value cache per token of a forward pass, at most, but for a single row."""
ALIKE = 0.9
"""Rows are padded by a tenth at most where there are enough of them."""
FILLED = 4
"""Enough are what fills the room for one chunk to this part."""
CHUNK = 512
"""Scored positions whose logits are held in fp32 at a time."""


class PrefixLM(_Base):
    """A model in memory whose log-likelihood requests share their beginnings and show their progress.

    lm-eval cuts the beginning off a prompt that the model has no room for; how often is counted.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: "Progress", label: str) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._progress, self._label = progress, label
        self.requests, self.truncated = 0, 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """The answer to each request; lm-eval's own bars stay off."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Request], *arguments: Any, **options: Any) -> list[Answer]:
        check_parts(requests, self._label)
        check_room(max((len(request[2]) for request in requests), default=0), self.max_length, self._label)
        # The last token is predicted, never fed, so one more fits.
        self._count([len(context) + len(continuation) - 1 for _, context, continuation in requests], self.max_length)
        if not shares(self.model):
            return super()._loglikelihood_tokens(requests, *arguments, **options)
        prompts, asks = prompts_of(requests, self.max_length)
        todo, answers = list(batches(groups(prompts), self.batch_size)), Answers(asks)
        for batch in self._progress.track(todo, self._label):
            read(self.model, batch, answers)
        return answers.in_order()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each prompt."""
        longest = max((request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests), default=0)
        check_room(longest + 1, self.max_length, self._label)  # a token to go on from
        return super().generate_until(requests, disable_tqdm=True)

    def tok_batch_encode(self, strings: list[str], *arguments: Any, left_truncate_len: int, **options: Any) -> Any:
        """The prompts of one batch to generate from, cut to their last `left_truncate_len` tokens."""
        self._count([len(self.tok_encode(text)) for text in strings], left_truncate_len)
        return super().tok_batch_encode(strings, *arguments, left_truncate_len=left_truncate_len, **options)

    def _count(self, lengths: list[int], limit: int) -> None:
        self.requests += len(lengths)
        self.truncated += sum(length > limit for length in lengths)


def shares(model: Any) -> bool:
    """Whether a model can read trees after a cache.

    Its attention must take any mask, its cache keep every token, and its keys depend on nothing but where a token
    stands (with longrope they depend on the length of the prompt).
    """
    config = model.config
    turns = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    usual = config._attn_implementation in ("sdpa", "eager") and not config.is_encoder_decoder and turns != "longrope"
    return usual and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def check_parts(requests: Sequence[Request], task: str) -> None:
    """Every prompt and every answer has tokens.

    Raises:
        UserError: an answer, which would otherwise be certain, or a prompt has none.
    """
    for (_, continuation), before, answer in ((request[0] or ("", ""), *request[1:]) for request in requests):
        if not before or not answer:
            what = f"the answer {continuation!r}" if before else f"what stands before the answer {continuation!r}"
            raise UserError(
                f"{task}: {what} has no token of its own with this model's tokenizer, so that it has no probability. "
                "Leave the task out for this model."
            )


def check_room(tokens: int, limit: int, task: str) -> None:
    """A prompt too long for the model loses its beginning, but every answer must fit as a whole.

    Args:
        tokens: of the longest answer.
        limit: tokens that the model reads.

    Raises:
        UserError: it does not fit.
    """
    if tokens > limit:
        raise UserError(
            f"{task} has an answer of {tokens} tokens, and the model's window of {limit} has no room for it. "
            "Leave the task out for this model, or name a model with a longer window."
        )


class Ask(NamedTuple):
    """What one request asks for."""

    prompt: int
    """The number of the prompt that it reads."""
    targets: list[int]
    """The tokens whose probability it asks for, at the last positions of the prompt."""


def prompts_of(requests: Sequence[Request], limit: int) -> tuple[list[Prompt], list[Ask]]:
    """The different prompts behind some requests, and what each request asks of which.

    Args:
        limit: tokens that the model reads; longer prompts lose their beginning.
    """
    numbers: dict[bytes, int] = {}
    tokens: list[Tokens] = []
    scored: list[int] = []
    asks = []
    for _, context, continuation in requests:
        fed = np.array([*context, *continuation][-(limit + 1) : -1], np.int64)
        number = numbers.setdefault(fed.tobytes(), len(numbers))
        first = len(fed) - len(continuation)
        if number == len(tokens):
            tokens.append(fed)
            scored.append(first)
        scored[number] = min(scored[number], first)
        asks.append(Ask(number, continuation))
    return [Prompt(*pair) for pair in zip(tokens, scored, strict=True)], asks


@dataclass(frozen=True, eq=False)
class Batch:
    """Prefixes to read together, and what follows them."""

    prefixes: list[Tokens]
    """None, where the rows follow nothing."""
    steps: list[list[tuple[int, Row]]]
    """Rows to read together, each with the number of its prefix."""


def batches(found: Sequence[Group], batch_size: int) -> Iterator[Batch]:
    """All rows of some groups, such that little is padded and memory is bounded."""
    budget = batch_size * TOKENS_PER_SEQUENCE
    alone = [(0, row) for group in found if not len(group.prefix) for row in group.rows]
    yield from (Batch([], [step]) for step in _chunks(alone, lambda item: item[1].size, budget))
    led = [group for group in found if len(group.prefix)]
    for chunk in _chunks(led, lambda group: len(group.prefix), budget):
        rows = [(number, row) for number, group in enumerate(chunk) for row in group.rows]
        least = len(chunk[0].prefix) // CACHED_PER_READ
        yield Batch([group.prefix for group in chunk], list(_chunks(rows, lambda item: item[1].size, budget, least)))


def _chunks(items: Sequence[T], size: Callable[[T], int], budget: int, least: int = 0) -> Iterator[list[T]]:
    """Items of falling size, as many at a time as the budget has room for if all are as large as the first.

    What is much smaller than the first waits for the next chunk, unless this one would be nearly empty.
    """
    items = sorted(items, key=size, reverse=True)
    while items:
        largest = size(items[0])
        room = max(1, budget // max(least, largest))
        alike = sum(size(item) > ALIKE * largest for item in items)
        count = min(room, max(alike, -(-room // FILLED)))
        yield items[:count]
        items = items[count:]


@torch.inference_mode()
def read(model: Any, batch: Batch, answers: "Answers") -> None:
    """Put a batch through the model and take down what is asked of it."""
    cache = _cached(model, batch.prefixes) if batch.prefixes else None
    lengths = np.array([len(prefix) for prefix in batch.prefixes] or [0])
    for step in batch.steps:
        numbers, rows = [number for number, _ in step], [row for _, row in step]
        inputs = _inputs(rows, lengths[numbers], int(lengths.max()), model.dtype)
        past = None if cache is None else _selected(cache, torch.tensor(numbers, device=model.device))
        scored = [np.unique(np.concatenate(list(row.paths.values()))) for row in rows]
        with _head_sees(model, np.arange(len(rows)).repeat([len(nodes) for nodes in scored]), np.concatenate(scored)):
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            logits_NV = model(**inputs, past_key_values=past, use_cache=past is not None).logits[0]
        answers.take(rows, scored, logits_NV)


def _cached(model: Any, prefixes: Sequence[Tokens]) -> Cache:
    """The key/value cache of some prefixes, padded at their ends."""
    nothing = np.empty(0, np.int64)
    with _head_sees(model, nothing, nothing):
        return model(input_ids=_padded(prefixes).to(model.device), use_cache=True).past_key_values


def _selected(cache: Cache, numbers: Tensor) -> Cache:
    """A cache with an entry per number; what is added to it does not reach the given one."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(numbers)
    return chosen


def _inputs(rows: Sequence[Row], lengths: Tokens, before: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Token ids [R, S] and, where they are not the usual ones, positions [R, S] and additive mask [R, 1, S, P + S].

    Args:
        lengths: tokens before each row.
        before: P, with those that pad the cache.
    """
    ids = _padded([row.tokens for row in rows])
    if not before and not any(row.branches for row in rows):
        return {"input_ids": ids}
    seen = np.zeros((len(rows), 1, ids.shape[1], before + ids.shape[1]), bool)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        seen[number, 0, :, :length] = True
        seen[number, 0, : row.size, before : before + row.size] = row.ancestors()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(torch.from_numpy(~seen), torch.finfo(dtype).min)
    positions = _padded([length + row.depths for row, length in zip(rows, lengths, strict=True)])
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def _padded(rows: Sequence[Tokens]) -> Tensor:
    """Rows of whole numbers with zeros behind the shorter ones."""
    longest = max(map(len, rows))
    return torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]))


@contextmanager
def _head_sees(model: Any, rows: Tokens, positions: Tokens) -> Iterator[None]:
    """Logits [1, N, V] of some positions alone, in place of [R, S, V]."""

    def pick(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][torch.from_numpy(rows), torch.from_numpy(positions)][None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()


class Answers:
    """What is asked of prompts, and the answers as they come."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._asks = asks
        self._of: dict[int, list[int]] = {}
        for number, ask in enumerate(asks):
            self._of.setdefault(ask.prompt, []).append(number)
        self._found: dict[int, Answer] = {}

    def take(self, rows: Sequence[Row], scored: Sequence[Tokens], logits_NV: Tensor) -> None:
        """Answer what is asked of the prompts of some rows.

        Args:
            scored: the nodes of each row that the logits belong to, in rising order.
        """
        ends = np.cumsum([len(nodes) for nodes in scored])
        places: dict[int, Tokens] = {}
        for row, nodes, end in zip(rows, scored, ends, strict=True):
            for prompt, path in row.paths.items():
                where = end - len(nodes) + np.searchsorted(nodes, path)
                places |= {number: where[-len(self._asks[number].targets) :] for number in self._of[prompt]}
        self._note(places, logits_NV)

    def _note(self, places: dict[int, Tokens], logits_NV: Tensor) -> None:
        # places: by request, the logits that its targets are looked up in
        at = torch.from_numpy(np.concatenate(list(places.values())))
        targets = torch.tensor([token for number in places for token in self._asks[number].targets])
        chunks = logits_NV.split(CHUNK)
        normaliser = torch.cat([chunk.float().logsumexp(-1) for chunk in chunks])
        greedy = torch.cat([chunk.argmax(-1) for chunk in chunks])[at].cpu() == targets
        found = (logits_NV[at, targets].float() - normaliser[at]).double().cpu()
        counts = [len(place) for place in places.values()]
        for number, parts, best in zip(places, found.split(counts), greedy.split(counts), strict=True):
            self._found[number] = float(parts.sum()), bool(best.all())

    def in_order(self) -> list[Answer]:
        """The answer to each request."""
        return [self._found[number] for number in range(len(self._asks))]
