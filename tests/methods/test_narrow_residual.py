"""A narrower residual stream: the dense model whose other channels are always zero, on disk too."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.base import Context
from methods.errors import UserError
from methods.modeling.footprint import footprint
from methods.slicegpt import SliceGPT
from tests.methods.tiny import (
    CONFIGS,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    some_ids,
    tiny_model,
)

KEPT = torch.tensor([30, 1, 2, 5, 8, 9, 13, 14, 20, 21, 22, 29])


class NormOverSome(torch.nn.Module):
    """What a norm does if there are no other channels, on a stream of full width."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, out = x[..., KEPT], torch.zeros_like(x)
        eps = getattr(self.norm, "eps", None) or self.norm.variance_epsilon
        if bias := isinstance(self.norm, torch.nn.LayerNorm):
            z = z - z.mean(-1, keepdim=True)
        z = self.norm.weight[KEPT] * z / (z.square().mean(-1, keepdim=True) + eps).sqrt()
        out[..., KEPT] = z + self.norm.bias[KEPT] if bias else z
        return out


@torch.no_grad()
def silenced(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model in which nothing is written to the other channels."""
    decoder = modeling.Decoder(model)
    gone = torch.ones(32, dtype=torch.bool)
    gone[KEPT] = False
    for table in decoder.embeddings:
        table.weight[:, gone] = 0
    for layer in decoder.layers:
        for name in {layer.family.attention_norm, layer.family.mlp_norm or layer.family.attention_norm}:
            layer.module.set_submodule(name, NormOverSome(layer.module.get_submodule(name)))
        for writer in (layer.attention_output, layer.mlp_output):
            writer.weight[gone] = 0
            if writer.bias is not None:
                writer.bias[gone] = 0
    decoder.replace(decoder.family.final_norm, NormOverSome(decoder.final_norm))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_narrowing_equals_silencing(name: str) -> None:
    model, expected = tiny_model(name), logits(silenced(tiny_model(name)))
    modeling.narrow_residual(model, KEPT)
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    assert (logits(tiny_model(name)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_smaller_and_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32)
    shape = dataclasses.replace(modeling.Decoder(model).shape, hidden=len(KEPT))
    modeling.narrow_residual(model, KEPT)
    expected = logits(model)
    narrow = modeling.rebuild(model, {"narrow_residual": {"width": len(KEPT)}})
    assert logits(narrow).equal(expected)
    counted = footprint(narrow)
    assert (counted.active_total, counted.active_block) == (shape.total, shape.block)
    narrow.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == narrow.state_dict().keys() and logits(loaded).equal(expected)
    assert_cache_changes_nothing(loaded)


@pytest.mark.parametrize("name", ["llama-tied", "phi"])
def test_every_tensor_of_the_stream_is_named_once(name: str) -> None:
    parts = modeling.stream_parts(modeling.Decoder(tiny_model(name)))
    modules = [*parts.readers, *parts.writers, *parts.norms]
    assert len({id(module.weight) for module in modules}) == len(modules)
    assert len(parts.norms) == (5 if name == "phi" else 9)


def test_its_blocks_can_still_be_removed_and_narrowed() -> None:
    model = tiny_model("llama-gqa")
    modeling.narrow_residual(model, KEPT)
    narrow = modeling.rebuild(model, {"narrow_residual": {"width": len(KEPT)}})
    modeling.narrow_mlp(modeling.Decoder(narrow).layers[1], torch.arange(10))
    expected = logits(modeling.keep_layers(narrow, [0, 1, 3]))
    both = modeling.rebuild(narrow, {"narrow_mlp": {"layers": [None, 10, None]}})
    assert logits(both, some_ids()).equal(expected)


def test_a_sliced_model_is_refused() -> None:
    sliced = SliceGPT().slice(tiny_model("llama-gqa"), 24, RandomCalibration(), Context(scratch=Path()))
    with pytest.raises(UserError, match="channels of a sliced model"):
        modeling.narrow_residual(sliced, torch.arange(8))
