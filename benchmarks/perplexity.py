"""Token perplexity by the protocol the field compares with, stated in the metric's name (`wikitext2/token_ppl@2048`).

The text is tokenised once (a tokenizer that begins with a BOS token puts it at the start of the stream only), cut into
non-overlapping windows of L tokens, the tail dropped; each window predicts its last L - 1 tokens; the result is
exp(mean negative log-likelihood), in fp32.
"""

import math
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.metric import Metric
from benchmarks.samples import Sample
from methods.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.base import Progress

# T tokens of a window, V vocabulary.
VERSION = "1"
"""Of the protocol above; goes into the record."""
CHUNK = 512
"""Tokens whose logits are held in fp32 at a time."""


class TooShort(UserError):
    """A text has not one window."""


def token_losses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    window: int,
    max_windows: int | None,
    progress: "Progress",
) -> list[Sample]:
    """What the model loses on each window of a text, as `benchmarks.samples` describes it.

    Args:
        window: tokens per window, at least 2 and at most the model's limit.
        max_windows: use only the first ones; None: all.

    Raises:
        TooShort: the text is shorter than one window.
    """
    encoded: Any = tokenizer(text, verbose=False)
    stream = torch.tensor(encoded["input_ids"])
    windows = stream[: len(stream) // window * window].view(-1, window)[:max_windows]
    if not len(windows):
        raise TooShort(
            f"the text has {len(stream)} tokens, less than one perplexity window of {window}. "
            "Name a longer text, or type a smaller window: --tasks ppl:SOURCE@WINDOW"
        )
    losses = (window_loss(model, ids.to(model.device)) for ids in progress.track(windows, "perplexity", len(windows)))
    hashes = [sha256(ids.numpy().astype("<i8").tobytes()).hexdigest() for ids in windows]
    return [
        {"id": number, "hash": digest, "nll": loss, "tokens": window - 1}
        for number, (digest, loss) in enumerate(zip(hashes, losses, strict=True))
    ]


def token_perplexity(windows: Sequence[Sample]) -> Metric:
    """Perplexity per token from the losses on windows of one length, with its standard error by the delta method.

    Returns:
        `n` is the number of windows; a single one has no standard error.
    """
    losses = torch.tensor([window["nll"] for window in windows], dtype=torch.float64)
    value = math.exp(float(losses.mean()))
    stderr = value * float(losses.std()) / len(losses) ** 0.5 if len(losses) > 1 else None
    return Metric(value, stderr, len(losses))


@torch.inference_mode()
def window_loss(model: "PreTrainedModel", ids: Tensor) -> float:
    """Mean negative log-likelihood (nats) of the tokens of one window [T], each given those before it."""
    logits_TV = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    chunks = zip(logits_TV.split(CHUNK), ids[1:].split(CHUNK), strict=True)
    # Halves and sums of log-likelihoods do not mix: fp32 per token, fp64 for the sum.
    total = sum(cross_entropy(logits.float(), target, reduction="none").double().sum() for logits, target in chunks)
    return float(total) / (len(ids) - 1)
