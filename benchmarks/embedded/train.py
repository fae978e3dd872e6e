"""Train the embedded models on the `train` split of wikileads, on a CPU.

    python -m benchmarks.embedded.train tiny-llama          # an hour or two on one core
    python -m benchmarks.embedded.train tiny-phi --steps 20 --out /tmp/try

Hidden matrices are optimised by Muon, everything else by AdamW (transformers' classes, random init). Dropout on what
each block writes to the residual stream and weight decay hold off overfitting over several epochs; the weights with the
best validation loss are kept. Most steps see windows of 256 tokens, the last ones 512.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from benchmarks.embedded import wikileads

HERE = Path(__file__).parent
END = "<|endoftext|>"
SHARED: dict[str, Any] = {
    "vocab_size": 2048,
    "num_hidden_layers": 10,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "tiny-llama": LlamaConfig(
        hidden_size=192,
        intermediate_size=264,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **SHARED,
    ),
    "tiny-qwen2": Qwen2Config(
        hidden_size=192,
        intermediate_size=240,
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        **SHARED,
    ),
    "tiny-phi": PhiConfig(
        hidden_size=160,
        intermediate_size=400,
        num_attention_heads=5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        **SHARED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how hard to train."""

    steps: int = 1000
    """Optimiser steps."""
    tokens_per_step: int = 6144
    """Tokens in one step's batch."""
    learning_rate: float = 4e-3
    """Peak, for both optimisers; 40 steps of warm-up, then linear to zero."""
    weight_decay: float = 0.1
    dropout: float = 0.1
    """On the output of every projection that writes to the residual stream."""
    validate_every: int = 100
    validation_tokens: int = 30 * 1024
    seed: int = 0

    def window(self, step: int) -> int:
        """Tokens per window: short ones first, they cost less."""
        return 256 if step < 0.85 * self.steps else 512

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the peak."""
        return min((step + 1) / 40, (self.steps - step) / self.steps)


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: object
) -> tuple[Tensor, None]:
    """Causal attention by batched matrix products: query [B, H, T, d] to [B, T, H, d].

    The backward pass of torch's fused CPU kernel takes most of a training step at these sizes; this one does not.
    """
    B, H, T, d = query.shape
    key, value = (x.repeat_interleave(H // x.shape[1], 1).flatten(0, 1) for x in (key, value))
    future = torch.full((T, T), float("-inf"), dtype=query.dtype).triu(1)
    scores = torch.baddbmm(future, (query * scaling).flatten(0, 1), key.transpose(1, 2))
    return torch.bmm(scores.softmax(-1).to(value.dtype), value).view(B, H, T, d).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 2,048 entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SHARED["vocab_size"], special_tokens=[END], initial_alphabet=alphabet)
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


def encode(tokenizer: PreTrainedTokenizerFast, split: str) -> Tensor:
    """One split as one stream of token ids, shape [tokens]."""
    ids = tokenizer(wikileads.text(split), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids)


def epochs(stream: Tensor, window: int, generator: torch.Generator):
    """Endless shuffled windows of `stream`, shape [window], cut anew with a random offset each epoch."""
    while True:
        offset = int(torch.randint(window, (1,), generator=generator))
        count = (len(stream) - offset) // window
        windows = stream[offset : offset + count * window].view(count, window)
        yield from windows[torch.randperm(count, generator=generator)]


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Dropout (in training only) on every projection that writes to the residual stream."""

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, rate, module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "self_attn.dense", "fc2")):
            module.register_forward_hook(hook)


def optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or ".layers." not in n]
    muon = torch.optim.Muon(hidden, recipe.learning_rate, recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


@torch.no_grad()
def mean_loss(model: nn.Module, stream: Tensor, window: int = 512) -> float:
    """Mean negative log-likelihood per token (nats) over non-overlapping windows."""
    model.eval()
    windows = stream[: len(stream) // window * window].view(-1, window)
    losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def train(name: str, recipe: Recipe, out: Path, compiled: bool) -> None:
    """Train one model and write it (bf16 safetensors), its tokenizer and `training.json` to `out`."""
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(wikileads.text("train"))
    stream, validation = encode(tokenizer, "train"), encode(tokenizer, "validation")[: recipe.validation_tokens]
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32, attn_implementation="plain")
    add_dropout(model, recipe.dropout)
    forward = torch.compile(model, dynamic=False) if compiled else model
    groups = optimizers(model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = {window: epochs(stream, window, generator) for window in (256, 512)}
    log, best, started = [], float("inf"), time.monotonic()
    print(f"{name}: {model.num_parameters():,} parameters, {len(stream):,} tokens", flush=True)
    for step in range(recipe.steps):
        window = recipe.window(step)
        batch = torch.stack([next(batches[window]) for _ in range(recipe.tokens_per_step // window)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in groups:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * recipe.rate(step)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % recipe.validate_every == 0 or step + 1 == recipe.steps:
            held_out = mean_loss(model, validation, window)
            seconds = time.monotonic() - started
            log.append({"step": step + 1, "train_loss": float(loss.detach()), "validation_loss": held_out})
            print(f"{log[-1]} {seconds:.0f} s", flush=True)
            if held_out < best:
                best = held_out
                save(model, out)
    tokenizer.save_pretrained(out)
    record = {"tokens": recipe.steps * recipe.tokens_per_step, "train_split_tokens": len(stream), "log": log}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def save(model: PreTrainedModel, out: Path) -> None:
    """Write a bf16 copy; the model in training keeps its fp32 weights."""
    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(out)


def main() -> None:
    """Parse the command line and train one model."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--out", type=Path, help="default: next to this file")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    arguments = parser.parse_args()
    out = arguments.out or HERE / arguments.model
    train(arguments.model, Recipe(steps=arguments.steps), out, arguments.compile)


if __name__ == "__main__":
    main()
