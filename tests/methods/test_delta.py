"""Delta checkpoints: what is loaded is the compressed model to the last bit, and what is saved is small."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods.base import Budget, Context
from methods.errors import UserError
from methods.modeling import keep_layers, load_delta, save_delta
from methods.modeling.content import Dense, Part
from methods.modeling.footprint import footprint
from methods.modeling.record import structures_of
from methods.slicegpt import SliceGPT
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, RandomCalibration, logits, tiny_model
from tests.methods.tomoe.test_conversion import VARIANTS, converted


def base(name: str) -> PreTrainedModel:
    return tiny_model(name, dtype=torch.float32)


def chosen(method: str, name: str, ratio: float = 0.7) -> PreTrainedModel:
    """A tiny model made small by a method that trains nothing."""
    context = Context(scratch=Path())
    return methods.configure(method, {}).compress(
        base(name),
        None,
        Budget(ratio=ratio, basis="block", tolerance=1),
        RandomCalibration(),
        context,  # type: ignore[arg-type]
    )


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    """All tensors (by bytes), the config and what is computed."""
    one, other = loaded.state_dict(), model.state_dict()
    assert list(one) == list(other) and all(bits(one[name]) == bits(other[name]) for name in one)
    assert type(loaded) is type(model) and structures_of(loaded.config) == structures_of(model.config)
    assert logits(loaded).equal(logits(model))
    assert not loaded.training and footprint(loaded) == footprint(model)


def there_and_back(model: PreTrainedModel, name: str, folder: Path) -> PreTrainedModel:
    save_delta(model, base(name), folder / "delta")
    return load_delta(folder / "delta", base(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_delta_is_the_sparse_model(name: str, tmp_path: Path) -> None:
    sparse, _ = converted(name, tmp_path, dtype=torch.float32)
    loaded = there_and_back(sparse, name, tmp_path)
    assert_same(loaded, sparse)
    sparse.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    ours = {"architectures": None, "_name_or_path": str(tmp_path / "delta")}
    assert loaded.config.to_dict() == whole.config.to_dict() | ours


@pytest.mark.parametrize("changes", VARIANTS[1:], ids=str)
def test_a_delta_of_every_variant(changes: dict[str, Any], tmp_path: Path) -> None:
    sparse, _ = converted("llama-gqa", tmp_path, dtype=torch.float32, **changes)
    assert_same(there_and_back(sparse, "llama-gqa", tmp_path), sparse)


@pytest.mark.parametrize("method", ["structured-magnitude", "random", "shortgpt"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_methods_that_choose_leave_nothing_to_store_but_biases(method: str, name: str, tmp_path: Path) -> None:
    model = chosen(method, name)
    assert_same(there_and_back(model, name, tmp_path), model)
    content = json.loads((tmp_path / "delta" / "delta.json").read_text())
    stored = [tensor for tensor, recipe in content["tensors"].items() if "stored" in recipe]
    assert all(tensor.endswith("bias") for tensor in stored)
    assert method != "shortgpt" or not stored


def test_narrowed_blocks_of_which_some_were_removed_are_found_where_they_were(tmp_path: Path) -> None:
    kept = [0, 2, 3]
    model = keep_layers(base("llama-gqa"), kept)
    narrow = methods.configure("random", {}).compress(
        model,
        None,
        Budget(ratio=0.7, tolerance=1),
        RandomCalibration(),
        Context(scratch=Path()),  # type: ignore[arg-type]
    )
    assert_same(there_and_back(narrow, "llama-gqa", tmp_path), narrow)
    recipes = json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"]
    for position, number in enumerate(kept):
        recipe = recipes[f"model.layers.{position}.mlp.down_proj.weight"]
        assert recipe.keys() == {"base", "columns"}
        assert recipe["base"] == f"model.layers.{number}.mlp.down_proj.weight"


LARGER = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 512}


@pytest.mark.parametrize("name", ["llama-tied", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_is_a_few_per_cent_of_the_model(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = LARGER | ({"ffn_dim": 512} if name == "opt" else {})
    monkeypatch.setattr("tests.methods.tomoe.test_conversion.tiny_model", lambda *a, **k: tiny_model(*a, **k | larger))
    sparse, _ = converted(name, tmp_path, dtype=torch.float32, embedding=4, experts=4)
    sparse, dense = sparse.to(dtype), tiny_model(name, dtype=torch.float32, **larger).to(dtype)  # type: ignore[arg-type]
    save_delta(sparse, dense, tmp_path / "delta")
    sparse.save_pretrained(tmp_path / "whole")
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / kind).glob("*.safetensors")) for kind in ("delta", "whole")
    ]
    assert sizes[0] < 0.05 * sizes[1]
    loaded = load_delta(tmp_path / "delta", dense)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert loaded.dtype == dtype and logits(loaded).equal(logits(whole))


def test_a_rotated_model_has_no_delta(tmp_path: Path) -> None:
    sliced = SliceGPT().slice(base("llama-gqa"), 24, RandomCalibration(), Context(scratch=tmp_path))
    with pytest.raises(UserError, match=r"would hold \d+% of its 0\.\d MB.*save it whole with save_pretrained"):
        save_delta(sliced, base("llama-gqa"), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_another_base_is_refused_by_name(tmp_path: Path) -> None:
    save_delta(chosen("random", "llama-gqa"), base("llama-gqa"), tmp_path)
    one_bit = base("llama-gqa")
    with torch.no_grad():
        one_bit.lm_head.weight.view(torch.int32)[5, 5] ^= 1
    for other in (one_bit, base("qwen2"), base("llama-gqa").double()):
        with pytest.raises(UserError, match=r"made on a model \(llama, float32, sha256 \w{12}\).*with dtype=float32"):
            load_delta(tmp_path, other)


def test_what_is_no_delta_or_too_new_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no delta in .*delta\.json and delta\.safetensors"):
        load_delta(tmp_path, base("opt"))
    save_delta(chosen("random", "opt"), base("opt"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta.json", "delta.safetensors"]
    content = json.loads((tmp_path / "delta.json").read_text())
    (tmp_path / "delta.json").write_text(json.dumps(content | {"schema": 3}))
    with pytest.raises(UserError, match="schema 3, and this version of tomoe-bench reads up to 2"):
        load_delta(tmp_path, base("opt"))


def test_a_delta_of_the_first_version_still_loads(tmp_path: Path) -> None:
    model = chosen("random", "llama-gqa")
    save_delta(model, base("llama-gqa"), tmp_path)
    content = json.loads((tmp_path / "delta.json").read_text())
    for recipe in content["tensors"].values():
        for axis, name in enumerate(("rows", "columns")):
            if name in recipe:
                recipe |= {"axis": axis, "kept": recipe.pop(name)}
    assert any("axis" in recipe for recipe in content["tensors"].values())
    (tmp_path / "delta.json").write_text(json.dumps(content | {"schema": 1}))
    assert_same(load_delta(tmp_path, base("llama-gqa")), model)


def test_the_base_stays_as_it_is(tmp_path: Path) -> None:
    dense = base("llama-tied")
    before = {name: bits(tensor) for name, tensor in dense.state_dict().items()}
    save_delta(chosen("random", "llama-tied"), dense, tmp_path)
    loaded = load_delta(tmp_path, dense)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert {name: bits(tensor) for name, tensor in dense.state_dict().items()} == before
    assert loaded.generation_config.to_dict() == dense.generation_config.to_dict()
    assert loaded.generation_config is not dense.generation_config


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    base("llama-gqa").save_pretrained(tmp_path / "dense")
    model, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / "dense") for _ in range(2))
    save_delta(keep_layers(model, [0, 2]), dense, tmp_path / "delta")
    text = (tmp_path / "delta" / "delta.json").read_text()
    assert json.loads(text)["base"]["name"] == "dense" and str(tmp_path) not in text


def test_equal_lists_are_stored_once(tmp_path: Path) -> None:
    save_delta(chosen("random", "llama-gqa"), base("llama-gqa"), tmp_path)
    recipes = json.loads((tmp_path / "delta.json").read_text())["tensors"]
    layer = "model.layers.1.mlp"
    lists = {recipes[f"{layer}.{part}_proj.weight"]["rows"] for part in ("gate", "up")}
    lists.add(recipes[f"{layer}.down_proj.weight"]["columns"])
    stored = load_file(tmp_path / "delta.safetensors")
    assert len(lists) == 1 and stored[lists.pop()].dtype == torch.int16


FRESH = """
import sys, torch, methods
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    out = methods.modeling.load_delta(sys.argv[2], base)(torch.tensor([[5, 9, 2, 60]])).logits
print(out.double().flatten().tolist())
"""


def test_a_fresh_process_needs_only_the_base_and_import_methods(tmp_path: Path) -> None:
    sparse, _ = converted("llama-gqa", tmp_path, dtype=torch.float32)
    base("llama-gqa").save_pretrained(tmp_path / "base")
    save_delta(sparse, AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "delta")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "base"), str(tmp_path / "delta")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = logits(sparse, torch.tensor([[5, 9, 2, 60]])).double().flatten().tolist()
    assert json.loads(printed) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_and_columns_are_found_wherever_they_are_and_only_there(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    values = st.sampled_from([0.0, -0.0, 1.0, float("nan"), 3.5])
    whole = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    )
    axis = data.draw(st.integers(0, 1))
    kept = torch.tensor(data.draw(st.lists(st.integers(0, whole.shape[axis] - 1), min_size=1, max_size=12)))
    dense = Dense({"a.0.up.weight": torch.zeros(2, 2), "a.1.up.weight": whole, "a.2.other.weight": whole})
    part = dense.part("a.1.up.weight", whole.index_select(axis, kept))
    assert part is not None
    assert bits(taken(dense, part)) == bits(whole.index_select(axis, kept))
    absent = whole.index_select(axis, kept).clone()
    absent.view(-1)[0] = 7.0
    assert dense.part("a.1.up.weight", absent) is None
    assert dense.part("a.1.down.weight", whole.index_select(axis, kept)) is None


def test_rows_that_begin_alike_are_stored_rather_than_mistaken() -> None:
    whole = torch.zeros(3, 400)
    whole[:, 300] = torch.arange(3.0)
    dense = Dense({"up.weight": whole})
    assert dense.part("up.weight", whole[[2, 1]]) is None
    part = dense.part("up.weight", whole[:, [300, 7]])
    assert part is not None and part.rows is None and part.columns is not None
    assert whole[:, part.columns.int()].equal(whole[:, [300, 7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_together_are_found_under_the_name_of_a_module_around_them(dtype: torch.dtype) -> None:
    """In bf16 most values of a row of 512 are in other rows too; rows of zeros tell nothing."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(300, 512, generator=generator).to(dtype)
    whole[::7] = 0
    rows = torch.randperm(300, generator=generator)[:150].sort().values
    columns = torch.randperm(512, generator=generator)[:200].sort().values
    dense = Dense({"a.0.up.weight": whole.flip(0), "a.1.up.weight": whole, "a.1.other.weight": whole})
    part = dense.part("a.1.up.linear.weight", whole[rows][:, columns])
    assert part is not None and part.name == "a.1.up.weight"
    assert bits(taken(dense, part)) == bits(whole[rows][:, columns])
    assert part.columns is not None and part.columns.equal(columns.short())
    elsewhere = dense.part("a.5.up.linear.weight", whole[rows][:, columns])
    assert elsewhere is not None and bits(taken(dense, elsewhere)) == bits(whole[rows][:, columns])
    absent = whole[rows][:, columns].clone()
    absent[3, 5] += 1
    assert dense.part("a.1.up.linear.weight", absent) is None
    assert dense.part("a.1.down.linear.weight", whole[rows][:, columns]) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_found_of_rows_and_columns_is_never_wrong(data: st.DataObject) -> None:
    values = st.sampled_from([0.0, -0.0, 1.0, 2.0, float("nan"), 3.5])
    whole = torch.tensor(data.draw(st.lists(st.lists(values, min_size=6, max_size=6), min_size=5, max_size=5)))
    rows, columns = (data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n - 1)) for n in (5, 6))
    dense, inner = Dense({"up.weight": whole}), whole[rows][:, columns]
    part = dense.part("up.weight", inner)
    assert part is None or bits(taken(dense, part)) == bits(inner)


def taken(dense: Dense, part: Part) -> Tensor:
    """The tensor that a part says."""
    tensor = dense.tensors[part.name]
    tensor = tensor if part.rows is None else tensor.index_select(0, part.rows.int())
    return tensor if part.columns is None else tensor.index_select(1, part.columns.int())
