"""Token perplexity by the protocol the field compares with, stated in the metric's name (`wikitext2/token_ppl@2048`).

The text is tokenised once (a tokenizer that begins with a BOS token puts it at the start of the stream only), cut into
non-overlapping windows of L tokens, the tail dropped; each window predicts its last L - 1 tokens; the result is
exp(mean negative log-likelihood), in fp32.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.metric import Metric
from methods.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.base import Progress

# T tokens of a window, V vocabulary.
VERSION = "1"
"""Of the protocol above; goes into the record."""
CHUNK = 512
"""Tokens whose logits are held in fp32 at a time."""


def token_perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    window: int,
    max_windows: int | None,
    progress: "Progress",
) -> Metric:
    """Perplexity per token, with its standard error over windows by the delta method.

    Args:
        window: tokens per window, at least 2 and at most the model's limit.
        max_windows: use only the first ones; None: all.

    Returns:
        `n` is the number of windows; a single one has no standard error.

    Raises:
        UserError: the text is shorter than one window.
    """
    encoded: Any = tokenizer(text, verbose=False)
    stream = torch.tensor(encoded["input_ids"])
    windows = stream[: len(stream) // window * window].view(-1, window)[:max_windows]
    if not len(windows):
        raise UserError(
            f"the text has {len(stream)} tokens, less than one perplexity window of {window}. "
            "Name a longer text, or type a smaller window: --tasks ppl:SOURCE@WINDOW"
        )
    losses = [window_loss(model, ids.to(model.device)) for ids in progress.track(windows, "perplexity", len(windows))]
    mean, stderr = _mean_and_stderr(losses)
    value = math.exp(mean)
    return Metric(value, None if stderr is None else value * stderr, len(losses))


@torch.inference_mode()
def window_loss(model: "PreTrainedModel", ids: Tensor) -> float:
    """Mean negative log-likelihood (nats) of the tokens of one window [T], each given those before it."""
    logits_TV = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    chunks = zip(logits_TV.split(CHUNK), ids[1:].split(CHUNK), strict=True)
    # Halves and sums of log-likelihoods do not mix: fp32 per token, fp64 for the sum.
    total = sum(cross_entropy(logits.float(), target, reduction="none").double().sum() for logits, target in chunks)
    return float(total) / (len(ids) - 1)


def _mean_and_stderr(values: list[float]) -> tuple[float, float | None]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return float(tensor.mean()), float(tensor.std() / len(values) ** 0.5) if len(values) > 1 else None
