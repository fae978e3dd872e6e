"""MLPs with fewer neurons: the same as silencing the others, on disk too, and beside other structures."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.base import Context
from methods.modeling.config import compressed_config
from methods.modeling.footprint import footprint
from methods.slicegpt import SliceGPT
from tests.methods.tiny import CONFIGS, RandomCalibration, assert_cache_changes_nothing, logits, tiny_model

KEPT = [torch.tensor([5, 2, 40]), torch.arange(0, 48, 2), None, torch.tensor([7])]
"""Neurons of the four blocks of a tiny model; None: all."""
RECORD = {"narrow_mlp": {"layers": [3, 24, None, 1]}}


def silenced(name: str) -> PreTrainedModel:
    """The dense model in which the neurons that go write nothing."""
    model = tiny_model(name)
    for layer, neurons in zip(modeling.Decoder(model).layers, KEPT, strict=True):
        if neurons is not None:
            gone = torch.ones(layer.mlp_output.in_features, dtype=torch.bool)
            gone[neurons] = False
            layer.mlp_output.weight.data[:, gone] = 0
    return model


def narrowed(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The model without them, in place."""
    model = tiny_model(name, dtype=dtype)
    for layer, neurons in zip(modeling.Decoder(model).layers, KEPT, strict=True):
        if neurons is not None:
            modeling.narrow_mlp(layer, neurons)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_narrowing_equals_silencing(name: str) -> None:
    expected = logits(silenced(name))
    torch.testing.assert_close(logits(narrowed(name)), expected, rtol=1e-10, atol=1e-10)
    assert (logits(tiny_model(name)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_narrow_model_is_smaller_and_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    model = modeling.rebuild(narrowed(name, torch.float32), RECORD)
    gated, biased = "llama" in name or "qwen" in name, name in ("llama-biases", "phi", "opt", "opt-untied")
    width = modeling.Decoder(tiny_model(name)).shape.mlp_width
    gone = 3 * width - (3 + 24 + 1)
    per_channel = 32 * (3 if gated else 2) + biased * (2 if gated else 1)
    assert footprint(model).active_total == footprint(tiny_model(name)).active_total - gone * per_channel
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert logits(loaded).equal(logits(model))
    assert_cache_changes_nothing(loaded)


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_a_sliced_model_can_be_narrowed(name: str, tmp_path: Path) -> None:
    """Structures compose: the neurons of a sliced model are silenced and removed like those of a dense one."""
    sliced = SliceGPT().slice(tiny_model(name), 24, RandomCalibration(), Context(scratch=tmp_path))
    layer, kept = modeling.Decoder(sliced).layers[1], torch.arange(10)
    layer.mlp_output.weight.data[:, 10:] = 0
    expected = logits(sliced)
    modeling.narrow_mlp(layer, kept)
    both = modeling.rebuild(sliced, {"narrow_mlp": {"layers": [None, 10, None, None]}})
    torch.testing.assert_close(logits(both), expected, rtol=1e-10, atol=1e-10)


def test_a_record_of_another_depth_is_an_error() -> None:
    config = compressed_config(tiny_model("phi").config, {"narrow_mlp": {"layers": [3]}})
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        AutoModelForCausalLM.from_config(config)
