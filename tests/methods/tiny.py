"""Tiny random models of every family, and a calibration sample for them. Random weights: for unit tests only."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from methods.base import Batch

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {"intermediate_size": 48, "rms_norm_eps": 1e-3}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-mha": {"model_type": "llama", **LLAMA},
    "llama-gqa": {"model_type": "llama", "num_key_value_heads": 2, **LLAMA},
    "llama-mqa": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 16, **LLAMA},
    "llama-tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True, **LLAMA},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **LLAMA},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, **LLAMA},
    "qwen2-tied": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True, **LLAMA},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, **LLAMA},
    "phi": {"model_type": "phi", "intermediate_size": 64, "partial_rotary_factor": 0.5},
    "opt": {"model_type": "opt", "ffn_dim": 64},
    "opt-untied": {"model_type": "opt", "ffn_dim": 64, "tie_word_embeddings": False},
}
ONE_PER_FAMILY = ["llama-gqa", "qwen2", "qwen3", "phi", "opt"]


def tiny_config(name: str, **changes: Any) -> Any:
    """The config of a tiny model."""
    content = {**SIZES, **CONFIGS[name], **changes}
    return AutoConfig.for_model(content.pop("model_type"), **content)


def tiny_model(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model with nothing at a neutral value: gains not 1, biases and embedding means not 0."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) + 0.03)
    return model


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What transformers' RMS norms do, but for fp64 input, which they round to fp32 inside and this does not."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * exact.to(x.dtype)


for _norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
    _norm.forward = _rms_norm  # so that comparisons in fp64 mean something, of rebuilt and loaded models too


@dataclass(frozen=True)
class RandomCalibration:
    """Random token windows; `padded` marks the last few tokens of every window as padding."""

    name: str = "random"
    sha256: str = "0" * 64
    samples: int = 12
    window: int = 16
    padded: int = 0
    seed: int = 0

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of at most `size` windows."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(2, SIZES["vocab_size"], (self.samples, self.window), generator=generator)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, self.window - self.padded :] = False
        for rows in torch.arange(self.samples).split(size) if self.samples else ():
            yield Batch(ids[rows], mask[rows] if self.padded else None)

    def rows(self) -> dict[str, list[str]]:
        """Text to train on: lines of random letters."""
        letters = random.Random(self.seed)
        return {"random": ["".join(letters.choices("abcdefgh ", k=40)) for _ in range(100)]}


def some_ids(batch: int = 2, tokens: int = 12, seed: int = 1) -> torch.Tensor:
    """Token ids to compare logits on, shape [batch, tokens]."""
    return torch.randint(2, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a model, shape [B, T, V]."""
    return model(input_ids=some_ids() if ids is None else ids).logits


@torch.no_grad()
def assert_cache_changes_nothing(model: PreTrainedModel) -> None:
    """Feeding tokens one by one through a cache gives the logits of one pass; greedy `generate` agrees with itself."""
    ids = some_ids(2, 9)
    whole = logits(model, ids)
    output = model(input_ids=ids[:, :4], use_cache=True)
    parts = [output.logits]
    for position in range(4, 9):
        output = model(input_ids=ids[:, position, None], past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert model.generate(ids, use_cache=True, **settings).equal(model.generate(ids, use_cache=False, **settings))
