"""Descriptions: widths against the tensors and the records, similarities against sets, loads against a loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import methods
from methods.base import Batch, Budget, Context
from methods.modeling import expert_ids, keep_layers
from methods.modeling.describe import describe, load_fractions
from methods.modeling.record import structures_of
from methods.slicegpt import SliceGPT
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, RandomCalibration, some_ids, tiny_config, tiny_model
from tests.methods.tomoe.test_conversion import converted


def widths(layer: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (layer[name]["kept"], layer[name]["full"]) for name in ("heads", "kv_heads", "qk", "vo", "mlp")}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dense_model_keeps_everything(name: str) -> None:
    model, config = tiny_model(name), tiny_config(name)
    kv_heads = getattr(config, "num_key_value_heads", None) or 4
    dim = getattr(config, "head_dim", None) or 8
    mlp = config.ffn_dim if "opt" in name else config.intermediate_size
    told = describe(model)
    assert told["removed_layers"] == [] and told["rotated_width"] is None
    full = {"heads": (4, 4), "kv_heads": (kv_heads,) * 2, "qk": (dim, dim), "vo": (dim, dim), "mlp": (mlp, mlp)}
    for number, layer in enumerate(told["layers"]):
        assert (layer["layer"], layer["mixture"], widths(layer)) == (number, None, full)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_a_sparse_model_in_numbers(name: str, tmp_path: Path) -> None:
    sparse, _ = converted(name, tmp_path, dtype=torch.float32)
    structures, state = structures_of(sparse.config), sparse.state_dict()
    told = describe(sparse)
    assert json.loads(json.dumps(told)) == told
    for i, layer in enumerate(told["layers"]):
        attention, experts = structures["narrow_attention"]["layers"][i], structures["moe_mlp"]["layers"][i]
        found, full = widths(layer), tiny_config(name)
        assert [found[key][0] for key in ("heads", "kv_heads", "qk")] == [
            attention[key] for key in ("heads", "kv_heads", "qk")
        ]
        assert found["vo"][0] == structures["topk_values"]["layers"][i]["kept"] < found["vo"][1]
        (index,) = [t for key, t in state.items() if f"layers.{i}." in key and key.endswith(".index")]
        (neurons,) = [t for key, t in state.items() if f"layers.{i}." in key and key.endswith(".neurons")]
        mlp = full.ffn_dim if name == "opt" else full.intermediate_size
        assert found["mlp"] == (index.shape[1], mlp)
        mixture = layer["mixture"]
        assert (mixture["experts"], mixture["union"]) == (len(index), len(neurons))
        assert mixture["union_share"] == len(neurons) / mlp and mixture["raw_widths"] == experts["raw_widths"]
        sets = [set(row) for row in index.tolist()]
        for j, one in enumerate(sets):
            for k, other in enumerate(sets):
                assert mixture["cosine"][j][k] == pytest.approx(len(one & other) / (len(one) * len(other)) ** 0.5)
                assert mixture["jaccard"][j][k] == pytest.approx(len(one & other) / len(one | other))


def test_removed_blocks_leave_their_numbers() -> None:
    told = describe(keep_layers(tiny_model("llama-gqa"), [0, 3]))
    assert told["removed_layers"] == [1, 2] and [layer["layer"] for layer in told["layers"]] == [0, 3]


def test_a_rotated_model_says_its_width(tmp_path: Path) -> None:
    sliced = SliceGPT().slice(tiny_model("phi"), 24, RandomCalibration(), Context(scratch=tmp_path))
    told = describe(sliced)
    assert told["rotated_width"] == 24 and widths(told["layers"][0])["mlp"] == (64, 64)


def test_a_narrower_model_says_what_is_left() -> None:
    method, context = methods.configure("random", {}), Context(scratch=Path())
    budget = Budget(ratio=0.5, basis="block", tolerance=1)
    model = method.compress(tiny_model("llama-gqa"), None, budget, RandomCalibration(), context)  # type: ignore[arg-type]
    record = structures_of(model.config)["narrow_mlp"]["layers"]
    for layer, width in zip(describe(model)["layers"], record, strict=True):
        found = widths(layer)
        assert found["mlp"] == (width, 48) and found["kv_heads"] == (1, 2) and found["heads"] == (2, 4)


def test_narrow_values_without_routing_are_told(tmp_path: Path) -> None:
    sparse, _ = converted("llama-gqa", tmp_path, experts=1, vo_routing=False)
    structures = structures_of(sparse.config)
    for i, layer in enumerate(describe(sparse)["layers"]):
        assert widths(layer)["vo"] == (structures["narrow_attention"]["layers"][i]["vo"], 8)
        assert widths(layer)["mlp"] == (structures["narrow_mlp"]["layers"][i], 48) and layer["mixture"] is None


def test_loads_count_real_tokens(tmp_path: Path) -> None:
    sparse, _ = converted("llama-gqa", tmp_path)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 9:] = False
    batches = [Batch(some_ids(), mask), Batch(some_ids(3, 7, seed=2), None)]
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for batch in batches:
        ids = expert_ids(sparse, batch.input_ids, batch.mask)
        for layer in range(4):
            for row in range(len(batch.input_ids)):
                for position in range(batch.input_ids.shape[1]):
                    if batch.mask is None or batch.mask[row, position]:
                        counts[layer, ids[layer, row, position]] += 1
    assert load_fractions(sparse, batches) == (counts / (24 - 3 + 21)).tolist()


def test_blocks_without_experts_have_no_loads() -> None:
    assert load_fractions(tiny_model("opt"), [Batch(some_ids(), None)]) == [None] * 4
