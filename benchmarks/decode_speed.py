"""Time of a token decoded by a sparse model beside the dense one, and what the bytes they read would allow.

    python -m benchmarks.selfcheck decode

Models of random weights in the shape of known ones, fp32, one sequence, greedy, with a KV cache. The sparse one has
half of everything: eight experts of half the width, half of the query and key dimensions, half of the values per token.
The two take turns, one token each. A token reads the weights that it uses and, where the head is not tied to it, one
row of the embedding table; so the bytes allow a speed-up of (bytes of the dense model) / (bytes of the sparse one).
"""

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.record import device
from methods import modeling
from methods.modeling.decoder import Decoder
from methods.modeling.footprint import count, footprint
from methods.modeling.structures.moe_stores import STORES

EXPERTS = 8
PROMPT = 64


class Shape(NamedTuple):
    """A Llama, by the numbers that its speed depends on."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int
    tied: bool

    def config(self) -> LlamaConfig:
        """As transformers has it."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.width,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 9, 3, 1536, 49152, tied=True),
    Shape("TinyLlama-1.1B, 8 of its 22 layers", 8, 2048, 32, 4, 5632, 32000, tied=False),
)


def halved(dense: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with half of everything, chosen at random."""
    model, generator = copy.deepcopy(dense), torch.Generator().manual_seed(0)
    decoder = Decoder(model)
    shape = decoder.shape

    def half(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)[: count // 2]

    for layer in decoder.layers:
        experts = torch.stack([half(shape.mlp_width) for _ in range(EXPERTS)])
        modeling.convert_mlp(layer, torch.randn(EXPERTS, shape.hidden, generator=generator), experts)
        modeling.narrow_qk(layer, shape, [dim for g in half(len(shape.rope_groups)) for dim in shape.rope_groups[g]])
        selector = modeling.ValueSelector(shape.hidden, max(16, min(128, shape.hidden // 32)), shape.head_dim)
        modeling.convert_values(layer, selector, shape.head_dim // 2, modeling.ValueRule())
    return model.eval()


def bytes_read(model: PreTrainedModel) -> int:
    """Of weights, per token."""
    unread = 0 if model.config.tie_word_embeddings else count(model.get_input_embeddings())
    return (footprint(model).active_total - unread) * model.dtype.itemsize


class Decoding:
    """One sequence in the making."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor) -> None:
        self.model, self.seconds = model, []
        self.output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    def token(self) -> None:
        """Make one more token, and note how long it took."""
        began = time.perf_counter()
        token, cache = self.output.logits[:, -1:].argmax(-1), self.output.past_key_values
        self.output = self.model(input_ids=token, past_key_values=cache, use_cache=True)
        self.seconds.append(time.perf_counter() - began)


@torch.inference_mode()
def milliseconds(models: Sequence[PreTrainedModel], tokens: int, warm_up: int = 3) -> list[float]:
    """Of one token of each model: medians of `tokens` turns."""
    prompt = torch.randint(1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    turns = [Decoding(model, prompt) for model in models]
    for _ in range(warm_up + tokens):
        for turn in turns:
            turn.token()
    return [1000 * median(turn.seconds[warm_up:]) for turn in turns]


def report(tokens: int, shapes: Sequence[Shape] = SHAPES, show: Callable[[str], None] = print) -> None:
    """Print what each store reaches, per shape."""
    show(f"{device('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, batch 1")
    for shape in shapes:
        torch.manual_seed(0)
        dense = AutoModelForCausalLM.from_config(shape.config()).eval()
        sparse = halved(dense)
        read = [bytes_read(model) for model in (dense, sparse)]
        allowed = read[0] / read[1]
        show(f"\n{shape.name}: {read[0] / 1e6:.0f} and {read[1] / 1e6:.0f} MB per token allow {allowed:.2f}x")
        show(f"{'':14} dense, ms  sparse, ms  speed-up  of what bytes allow")
        for store in STORES:
            modeling.set_experts(sparse, store)
            slow, fast = milliseconds((dense, sparse), tokens)
            show(f"{store:14} {slow:9.1f} {fast:11.1f} {slow / fast:9.2f} {slow / fast / allowed:21.2f}")
