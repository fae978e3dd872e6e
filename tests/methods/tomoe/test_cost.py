"""Memory and precision of training: bytes of all tensors alive, fp32 beside a bf16 model.

Time is not for tests: `python -m benchmarks.selfcheck training`.
"""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from methods.base import Budget
from methods.tomoe import ToMoE, masking
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.training import Trainer
from methods.training.losses import distillation
from methods.training.recomputation import recomputed
from tests.methods.tiny import ONE_PER_FAMILY, tiny_model
from tests.methods.training.small import SmallCalibration, context, tokenizer

TOKENS, WIDTH = 1024, 512
PROPORTIONS = {"hidden_size": 128, "intermediate_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 16}
PROPORTIONS |= {"vocab_size": 96, "max_position_embeddings": TOKENS, "pad_token_id": 0}
"""Heads, embeddings and MLP stand to the hidden size about as in a model of 7B parameters."""
KINDS: dict[str, dict[str, Any]] = {
    "llama-mha": {"model_type": "llama"},
    "llama-gqa": {"model_type": "llama", "num_key_value_heads": 4},
    "phi": {"model_type": "phi"},
}
SMALL = {"hidden_size": 192, "num_attention_heads": 6, "num_hidden_layers": 10}
MODELS = {
    **KINDS,
    "tiny-llama": {"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 264, **SMALL},
    "tiny-qwen2": {"model_type": "qwen2", "num_key_value_heads": 3, "intermediate_size": 240, **SMALL},
}
"""Narrow MLPs, beside which masks weigh most."""


def real_proportions(name: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**PROPORTIONS | MODELS[name])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


class Alive(TorchDispatchMode):
    """Bytes of the tensors made while it is on and not gone yet, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def cost(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes alive between the forward and the backward pass, and the most that was alive at any time."""
    with Alive() as alive:
        loss = forward()
        between = alive.bytes
        loss.backward()
    return between, alive.peak


def trainer(
    name: str,
    dtype: torch.dtype,
    folder: Path,
    noise: Literal["per_expert", "per_token"],
    checkpointing: bool = False,
    embedding: int | None = 4,
) -> Trainer:
    model = real_proportions(name, dtype)
    method = ToMoE(embedding=embedding, mask_noise=noise, checkpointing=checkpointing)
    return Trainer(method, model, tokenizer(), Budget(ratio=0.6), SmallCalibration(), context(folder))


IDS = torch.randint(96, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def plain(made: Trainer) -> Callable[[], Tensor]:
    """The dense model, with a shift of its embeddings as the one trained tensor, so that gradients run through all."""
    base, teacher_TD = made.model.base_model, made._hidden(IDS, None)
    shift = torch.zeros(made.decoder.shape.hidden, dtype=made.model.dtype, requires_grad=True)

    def forward() -> Tensor:
        out = base(inputs_embeds=made.decoder.embeddings[0](IDS) + shift, use_cache=False)
        return distillation(out.last_hidden_state[0], teacher_TD, made.decoder.head)[0]

    return forward


def student(made: Trainer) -> Callable[[], Tensor]:
    return lambda: made._terms(IDS, IDS, 0.6, 1.0).loss


def extra(made: Trainer) -> tuple[float, float]:
    """Memory of masked training beyond that of the plain model, over the plain model's activations."""
    before, peak = cost(plain(made))
    with made.masked.attached():
        masked_before, masked_peak = cost(student(made))
    return (masked_before - before) / before, (masked_peak - peak) / before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embedding", [4, None])  # in proportion, and the default
@pytest.mark.parametrize("name", MODELS)
def test_masks_need_little_memory_beside_the_activations(
    name: str, dtype: torch.dtype, embedding: int | None, tmp_path: Path
) -> None:
    between, peak = extra(trainer(name, dtype, tmp_path, "per_expert", embedding=embedding))
    assert between < 0.12 and peak < 0.15


def test_noise_per_token_nearly_doubles_the_activations(tmp_path: Path) -> None:
    between, peak = extra(trainer("llama-gqa", torch.bfloat16, tmp_path, "per_token"))
    assert 0.6 < between < 0.9 and 0.6 < peak < 0.9


class Widest(TorchDispatchMode):
    """The most rows of any fp32 tensor of the MLP's width."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and WIDTH in tensor.shape:
                self.rows = max(self.rows, tensor.numel() // WIDTH)
        return out


@pytest.mark.parametrize("name", KINDS)
def test_nothing_of_the_mlp_is_in_full_precision_but_a_chunk_of_tokens(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(masking, "CHUNK", 192)
    made = trainer(name, torch.bfloat16, tmp_path, "per_expert")
    with made.masked.attached(), Widest() as forward:
        loss = student(made)()
    with Widest() as backward:
        loss.backward()
    assert forward.rows == made.settings.experts
    assert backward.rows == 192


def trained_in_bf16(name: str, folder: Path, checkpointing: bool) -> ToMoENetwork:
    method, model = (
        ToMoE(experts=3, embedding=4, start="random", checkpointing=checkpointing),
        tiny_model(name, dtype=torch.bfloat16),
    )
    where = context(folder, steps=3)
    made = Trainer(method, model, tokenizer(), Budget(ratio=0.6, basis="block"), SmallCalibration(), where)
    before = {name: parameter.detach().clone() for name, parameter in made.network.trained().items()}
    made.run()
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in made.network.state_dict().values()} == {torch.float32}
    still = {name for name, parameter in made.network.trained().items() if parameter.equal(before[name])}
    assert still == ({name for name in before if "static" in name} if made.decoder.shape.qk_norm else set())
    return made.network


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_a_bf16_model_trains_in_full_precision_with_and_without_recomputation(name: str, tmp_path: Path) -> None:
    kept, recomputed = (
        trained_in_bf16(name, tmp_path / str(checkpointing), checkpointing).state_dict()
        for checkpointing in (False, True)
    )
    assert all(tensor.equal(recomputed[name]) for name, tensor in kept.items())


def test_recomputation_holds_a_fraction_of_the_activations(tmp_path: Path) -> None:
    made = trainer("llama-mha", torch.bfloat16, tmp_path, "per_token", checkpointing=True)
    plain_between, _ = cost(plain(made))
    with made.masked.attached(), recomputed(made.decoder.layers):
        between, _ = cost(student(made))
    assert between < 0.25 * plain_between
