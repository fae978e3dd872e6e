"""One timed generation: a forward pass over the prompt, then greedy decoding with a KV cache, a token at a time.

Every token is waited for, as whoever shows it would, so that each has a latency: the first one that of the prompt.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.speed.clock import now
from benchmarks.speed.energy import Counter
from benchmarks.speed.memory import cache_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from benchmarks.presets import Preset


class Generation(NamedTuple):
    """What one generation took. Rates and energies are over all sequences of the batch."""

    batch: int
    prompt: int
    """Tokens of it, per sequence."""
    first_s: float
    """Seconds to the first token of every sequence."""
    next_s: tuple[float, ...]
    """Seconds to each of the others."""
    cache_bytes: float = 0
    """Of the KV cache, per token and sequence."""
    prefill_j: float | None = None
    """Joules of the prompt; None without a counter."""
    decode_j: float | None = None
    """Joules of the other tokens."""

    @property
    def seconds(self) -> float:
        """Altogether."""
        return self.first_s + sum(self.next_s)

    @property
    def prefill(self) -> float:
        """Tokens of the prompt per second."""
        return self.batch * self.prompt / self.first_s

    @property
    def decode(self) -> float:
        """Tokens per second after the first."""
        return self.batch * len(self.next_s) / sum(self.next_s)


def make_prompt(model: "PreTrainedModel", batch: int, settings: "Preset") -> "Tensor":
    """Random token ids [batch, tokens], short enough to leave room for the new tokens."""
    limit = getattr(model.config, "max_position_embeddings", None) or settings.speed_prompt + settings.speed_new_tokens
    tokens = min(settings.speed_prompt, limit - settings.speed_new_tokens)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


@torch.inference_mode()
def run(model: "PreTrainedModel", prompt: "Tensor", new_tokens: int, counter: Counter | None = None) -> Generation:
    """Read `prompt` [B, T] and go on for `new_tokens` steps after the first token."""
    batch, length = prompt.shape
    reading = _Phase(model.device, counter)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = reading.next_token(output.logits)
    spent, writing = reading.joules(), _Phase(model.device, counter)
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = writing.next_token(output.logits)
    return Generation(
        batch=batch,
        prompt=length,
        first_s=reading.seconds[0],
        next_s=tuple(writing.seconds),
        cache_bytes=cache_bytes(output.past_key_values) / (batch * (length + new_tokens)),
        prefill_j=spent,
        decode_j=writing.joules(),
    )


class _Phase:
    """The clock and the energy counter while tokens are made."""

    def __init__(self, device: torch.device, counter: Counter | None) -> None:
        self.device, self.counter = device, counter
        self.start = counter.read() if counter else ()
        self.seconds: list[float] = []
        self.last = now(device)

    def next_token(self, logits: "Tensor") -> "Tensor":
        """The token that follows, [B, 1], from logits [B, 1, V], and how long it took."""
        token = logits.argmax(-1)
        done = now(self.device)
        self.seconds.append(done - self.last)
        self.last = done
        return token

    def joules(self) -> float | None:
        """What was drawn since the start."""
        return self.counter.between(self.start, self.counter.read()) if self.counter else None
