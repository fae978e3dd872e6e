"""Compressed checkpoints: saved, loaded in a fresh process, generated from; safetensors only; newer schemas refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.base import Context
from methods.errors import UserError
from methods.modeling.config import compressed_config
from methods.modeling.footprint import footprint
from methods.modeling.record import structures_of
from methods.modeling.shape import DecoderShape
from methods.slicegpt import SliceGPT
from tests.methods.test_narrow_mlp import RECORD, narrowed
from tests.methods.test_shortgpt import silence
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    some_ids,
    tiny_config,
    tiny_model,
)

REPOSITORY = Path(__file__).parents[2]


def sliced(name: str, tmp_path: Path, **changes) -> PreTrainedModel:
    model = tiny_model(name, dtype=torch.float32, **changes)
    return SliceGPT().slice(model, 24, RandomCalibration(), Context(scratch=tmp_path))


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = sliced(name, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert logits(loaded).equal(logits(model))
    assert footprint(loaded) == footprint(model)
    assert loaded.lm_head.weight is not modeling.Decoder(loaded).embeddings[0].weight
    weights = {path.name for path in (tmp_path / "saved").iterdir()}
    assert weights == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_loads_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    model = sliced(name, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    save_file({"ids": some_ids(), "logits": logits(model)}, tmp_path / "expected.safetensors")
    script = (
        "import sys, methods, torch; from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "expected = load_file(sys.argv[2]); model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert model(input_ids=expected['ids']).logits.equal(expected['logits'])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "saved"), str(tmp_path / "expected.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_cache_equals_without(name: str, tmp_path: Path) -> None:
    assert_cache_changes_nothing(sliced(name, tmp_path))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_hidden_states_are_recorded_in_the_sliced_width(name: str, tmp_path: Path) -> None:
    states = sliced(name, tmp_path)(input_ids=some_ids(), output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [24, 24, 24, 24, 32]


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_slicing_what_block_removal_left(name: str, tmp_path: Path) -> None:
    """Both structures compose: removing an identity block and changing the basis leaves the function as it is."""
    model = tiny_model(name)
    silence(model, 1)
    expected = logits(model)
    short = modeling.keep_layers(modeling.keep_layers(model, [0, 1, 2, 3]), [0, 2, 3])
    both = SliceGPT().slice(short, 32, RandomCalibration(), Context(scratch=tmp_path))
    assert structures_of(both.config)["removed_layers"] == {"kept": [0, 2, 3], "of": 4}
    assert set(structures_of(both.config)) == {"rotated_residual", "removed_layers"}
    torch.testing.assert_close(logits(both), expected, rtol=1e-9, atol=1e-9)
    both.save_pretrained(tmp_path / "saved")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")).equal(logits(both))


def test_blocks_of_a_sliced_model_cannot_be_removed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Remove blocks first"):
        modeling.keep_layers(sliced("llama-gqa", tmp_path), [0, 2, 3])


def test_a_sliced_model_is_not_taken_for_a_dense_one(tmp_path: Path) -> None:
    model = sliced("llama-gqa", tmp_path)
    with pytest.raises(UserError, match=r"compressed already \(rotated_residual\)"):
        _ = modeling.Decoder(model).shape
    assert DecoderShape.from_config(modeling.keep_layers(tiny_model("opt"), [0, 1]).config.to_dict()).layers == 2


class Made(TorchDispatchMode):
    """Collects the tensors that operations give while it is open, those without memory left out."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tensors += [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        return out


@pytest.mark.parametrize("name", CONFIGS)
def test_rebuilding_takes_no_memory_and_changes_nothing(name: str) -> None:
    model = narrowed(name, torch.float32)
    expected, state = logits(model), torch.random.get_rng_state()
    given = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    with Made() as made:
        built = modeling.rebuild(model, RECORD)
    assert {tensor.data_ptr() for tensor in made.tensors} <= given
    assert {tensor.data_ptr() for tensor in (*built.parameters(), *built.buffers())} == given
    assert logits(built).equal(expected)
    assert torch.random.get_rng_state().equal(state)


def test_an_unknown_structure_is_refused(tmp_path: Path) -> None:
    config = compressed_config(tiny_config("phi"), {"rotated_residuals": {"width": 24}})
    with pytest.raises(UserError, match="Did you mean rotated_residual"):
        AutoModelForCausalLM.from_config(config)


def test_a_rotated_block_passes_for_the_stock_one(tmp_path: Path) -> None:
    """Device placement goes by class name, recording of outputs by class; the attention back-end stays."""
    model = tiny_model("qwen2", dtype=torch.float32)
    stock = type(modeling.Decoder(model).module_list[0])
    model.set_attn_implementation("eager")
    rotated = SliceGPT().slice(model, 24, RandomCalibration(), Context(scratch=tmp_path))
    block = modeling.Decoder(rotated).module_list[0]
    assert isinstance(block, stock) and type(block).__name__ == stock.__name__
    assert rotated.config._attn_implementation == "eager"


def test_bf16_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    model = tiny_model("llama-tied", dtype=torch.bfloat16)
    compressed = SliceGPT().slice(model, 24, RandomCalibration(), Context(scratch=tmp_path))
    compressed.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert compressed.dtype == loaded.dtype == torch.bfloat16
    assert logits(loaded).equal(logits(compressed))


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    sliced("llama-gqa", tmp_path).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["compression"]["schema"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="schema 99.*reads up to 1. Upgrade"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("order", ["import methods, transformers", "import transformers, methods"])
def test_auto_classes_know_the_models_in_either_import_order(order: str, tmp_path: Path) -> None:
    sliced("phi", tmp_path).save_pretrained(tmp_path / "saved")
    script = f"{order}; print(type(transformers.AutoConfig.from_pretrained({str(tmp_path / 'saved')!r})).__name__)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "CompressedPhiConfig", result.stderr
    assert AutoConfig.for_model("tomoe_bench_phi").model_type == "tomoe_bench_phi"
