"""Projections that read and write a part: the dense ones with zeros, on disk too, and beside narrow MLPs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.errors import UserError
from methods.modeling.decoder import DecoderLayer
from methods.modeling.describe import describe
from methods.modeling.footprint import footprint
from tests.methods.tiny import CONFIGS, assert_cache_changes_nothing, logits, tiny_model


def some(of: int, seed: int) -> Tensor:
    """About half of `of` numbers, ascending, at least one."""
    kept = torch.rand(of, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[seed % of] = True
    return kept.nonzero()[:, 0]


def choices(layer: DecoderLayer, block: int) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Kept rows and columns by projection: of the query both, of others one or the other."""
    family, linear = layer.family, layer.module.get_submodule
    query, output, up, down = (linear(name) for name in (family.query, family.output, family.up, family.down))
    return {
        family.query: (some(query.out_features, block), some(query.in_features, block + 9)),
        family.value: (None, some(query.in_features, block + 9)),
        family.output: (some(output.out_features, block + 1), None),
        family.up: (some(up.out_features, block + 2), some(up.in_features, block + 3)),
        family.down: (some(down.out_features, block + 4), None),
    }


@torch.no_grad()
def silenced(name: str) -> PreTrainedModel:
    """The dense model with zeros where nothing is kept."""
    model = tiny_model(name)
    for block, layer in enumerate(modeling.Decoder(model).layers[:3]):
        for projection, (rows, columns) in choices(layer, block).items():
            linear = layer.module.get_submodule(projection)
            if rows is not None:
                gone = torch.ones(linear.out_features, dtype=torch.bool).index_fill_(0, rows, False)
                linear.weight[gone] = 0
                if linear.bias is not None:
                    linear.bias[gone] = 0
            if columns is not None:
                linear.weight[:, torch.ones(linear.in_features, dtype=torch.bool).index_fill_(0, columns, False)] = 0
    return model


def gathered(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The model in which only the rest is stored; the last block stays whole."""
    model = tiny_model(name, dtype=dtype)
    for block, layer in enumerate(modeling.Decoder(model).layers[:3]):
        for projection, (rows, columns) in choices(layer, block).items():
            modeling.gather_linear(layer, projection, rows, columns)
    return modeling.rebuild(model, {"gathered_linears": modeling.gathered_record(model)})


@pytest.mark.parametrize("name", CONFIGS)
def test_gathering_equals_zeros(name: str) -> None:
    expected = logits(silenced(name))
    torch.testing.assert_close(logits(gathered(name)), expected, rtol=1e-10, atol=1e-10)
    assert (logits(tiny_model(name)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gathered_model_is_smaller_and_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    model, dense = gathered(name, torch.float32), silenced(name)
    zeros = 0
    for block, layer in enumerate(modeling.Decoder(dense).layers[:3]):
        for projection, (rows, columns) in choices(layer, block).items():
            linear = layer.module.get_submodule(projection)
            r = linear.out_features if rows is None else len(rows)
            c = linear.in_features if columns is None else len(columns)
            zeros += linear.weight.numel() - r * c + (0 if linear.bias is None else linear.out_features - r)
    assert footprint(model).active_block == footprint(dense).active_block - zeros
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert logits(loaded).equal(logits(model))
    assert_cache_changes_nothing(loaded)


def test_narrow_first_then_gather(tmp_path: Path) -> None:
    """Structures compose, and gradients pass through."""
    model, silent = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    layer, columns, neurons = modeling.Decoder(model).layers[1], some(32, 3), torch.arange(10)
    modeling.narrow_mlp(layer, neurons)
    modeling.gather_linear(layer, layer.family.up, None, columns)
    structures = {
        "gathered_linears": modeling.gathered_record(model),
        "narrow_mlp": {"layers": [None, 10, None, None]},
    }
    both = modeling.rebuild(model, structures)
    up, down = modeling.Decoder(silent).layers[1].mlp_inputs[1], modeling.Decoder(silent).layers[1].mlp_output
    with torch.no_grad():
        up.weight[:, torch.ones(32, dtype=torch.bool).index_fill_(0, columns, False)] = 0
        down.weight[:, 10:] = 0
    torch.testing.assert_close(logits(both), logits(silent), rtol=1e-10, atol=1e-10)
    both(input_ids=torch.arange(2, 8)[None]).logits.sum().backward()
    inner = modeling.Decoder(both).layers[1].module.get_submodule("mlp.up_proj.linear")
    assert inner.weight.grad is not None and inner.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="Narrow it first"):
        modeling.narrow_mlp(modeling.Decoder(both).layers[1], torch.arange(3))


def test_everything_kept_is_the_stock_module_and_nothing_kept_is_an_error() -> None:
    layer = modeling.Decoder(tiny_model("phi")).layers[0]
    modeling.gather_linear(layer, layer.family.up, torch.arange(64), torch.arange(32))
    assert type(layer.module.get_submodule(layer.family.up)) is torch.nn.Linear
    for rows in (torch.arange(0), torch.tensor([3, 1]), torch.tensor([64]), torch.tensor([1, 1])):
        with pytest.raises(UserError, match="rows of mlp.fc1 must be at least one"):
            modeling.gather_linear(layer, layer.family.up, rows, None)
    modeling.gather_linear(layer, layer.family.up, torch.arange(3), None)
    with pytest.raises(UserError, match="gathered or replaced already"):
        modeling.gather_linear(layer, layer.family.up, torch.arange(2), None)


def test_a_description_names_the_parts() -> None:
    layers = describe(gathered("llama-gqa"))["layers"]
    layer = modeling.Decoder(tiny_model("llama-gqa")).layers[0]
    rows, columns = choices(layer, 0)["self_attn.q_proj"]
    assert rows is not None and columns is not None
    assert layers[0]["gathered"]["self_attn.q_proj"] == {"rows": len(rows), "columns": len(columns)}
    assert layers[0]["gathered"]["self_attn.v_proj"] == {"rows": None, "columns": len(columns)}
    assert layers[3]["gathered"] == {}
