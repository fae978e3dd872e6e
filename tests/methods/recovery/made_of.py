"""A tiny model of every structure, for what must work on all of them."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from methods import modeling
from methods.base import Context
from methods.modeling.structures.topk_choice import ValueSelector
from methods.slicegpt import SliceGPT
from tests.methods.test_gathered_linears import gathered
from tests.methods.tiny import RandomCalibration, tiny_model

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra finetune: pip install '.[finetune]'")
STRUCTURES: dict[str, Callable[[str, Path], PreTrainedModel]] = {}


def structure(build: Callable[[str, Path], PreTrainedModel]) -> Callable[[str, Path], PreTrainedModel]:
    STRUCTURES[build.__name__] = build
    return build


@structure
def removed_layers(name: str, scratch: Path) -> PreTrainedModel:
    return modeling.keep_layers(fresh(name), [0, 2])


@structure
def rotated_residual(name: str, scratch: Path) -> PreTrainedModel:
    return SliceGPT().slice(fresh(name), 24, RandomCalibration(), Context(scratch=scratch))


@structure
def narrow_residual(name: str, scratch: Path) -> PreTrainedModel:
    model = fresh(name)
    modeling.narrow_residual(model, torch.arange(0, 32, 2))
    return modeling.rebuild(model, {"narrow_residual": {"width": 16}})


@structure
def narrow_parts(name: str, scratch: Path) -> PreTrainedModel:
    """Fewer heads, narrower values, fewer neurons."""
    model = fresh(name)
    shape = modeling.Decoder(model).shape
    for layer in modeling.Decoder(model).layers:
        modeling.narrow_heads(layer, shape, [0])
        modeling.narrow_vo(layer, shape, [0, 1, 3])
        modeling.narrow_mlp(layer, torch.arange(0, 48, 2))
    records = {"narrow_attention": modeling.attention_record(model), "narrow_mlp": {"layers": [24] * 4}}
    return modeling.rebuild(model, records)


@structure
def gathered_linears(name: str, scratch: Path) -> PreTrainedModel:
    return gathered(name, torch.float32)


@structure
def experts_and_chosen_values(name: str, scratch: Path) -> PreTrainedModel:
    """What ToMoE makes: every token has its expert and its value dimensions."""
    return chosen(name, 0.0)


def noisy(name: str, scale: float = 0.5) -> PreTrainedModel:
    """The same, choosing by chance."""
    return chosen(name, scale)


def chosen(name: str, noise: float) -> PreTrainedModel:
    model, draw = fresh(name), torch.Generator().manual_seed(0)
    for layer in modeling.Decoder(model).layers:
        width, hidden = layer.mlp_output.in_features, layer.attention_inputs[0].in_features
        experts = torch.stack([torch.randperm(width, generator=draw)[:12] for _ in range(3)])
        modeling.convert_mlp(layer, 0.3 * torch.randn(3, hidden, generator=draw), experts)
        head_dim = modeling.Decoder(model).family.shape(model.config.to_dict()).head_dim
        modeling.convert_values(layer, ValueSelector(hidden, 4, head_dim), 3, modeling.ValueRule())
    records = {"moe_mlp": modeling.expert_record(model), "topk_values": modeling.value_record(model) or {}}
    return modeling.rebuild(model, records | ({"choice_noise": {"scale": noise}} if noise else {}))


def fresh(name: str) -> PreTrainedModel:
    return tiny_model(name, dtype=torch.float32)
