"""Projections with some of their weights: the dense ones with zeros, on disk too, whatever is done to the module."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.errors import UserError
from methods.modeling.delta import load_delta, save_delta
from methods.modeling.describe import describe
from methods.modeling.footprint import footprint
from methods.modeling.structures import sparse_linears
from methods.modeling.structures.sparse_linears import SparseLinear, pack, unpack
from tests.methods.pruned import names
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, assert_cache_changes_nothing, logits, some_ids, tiny_model


def lots(shape: Any, seed: int) -> Tensor:
    """About a third."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def some_masks(model: PreTrainedModel) -> dict[tuple[int, str], Tensor]:
    """Of all projections but those of the last block."""
    layers = modeling.Decoder(model).layers[:3]
    every = [(i, name, layer) for i, layer in enumerate(layers) for part in names(layer) for name in part]
    return {(i, name): lots(layer.module.get_submodule(name).weight.shape, i) for i, name, layer in every}


def sparse(name: str, dtype: torch.dtype = torch.float64, all_but_one: bool = False) -> PreTrainedModel:
    model = tiny_model(name, dtype=dtype)
    for (block, part), mask in some_masks(model).items():
        if all_but_one:
            mask[:] = True
            mask[0, 0] = False
        modeling.sparsify(modeling.Decoder(model).layers[block], part, mask, "unstructured")
    return modeling.rebuild(model, {"sparse_linears": modeling.sparse_record(model)})


@torch.no_grad()
def with_zeros(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = tiny_model(name, dtype=dtype)
    for (block, part), mask in some_masks(model).items():
        modeling.Decoder(model).layers[block].module.get_submodule(part).weight.mul_(mask)  # type: ignore[operator]
    return model


@given(rows=st.integers(1, 4), columns=st.integers(1, 40), seed=st.integers(0, 9))
def test_bits_are_those_of_numpy_and_come_back(rows: int, columns: int, seed: int) -> None:
    mask = lots((rows, columns), seed)
    expected = np.packbits(mask.numpy(), axis=1, bitorder="little")
    assert pack(mask).dtype == torch.uint8 and (pack(mask).numpy() == expected).all()
    assert unpack(pack(mask), columns).equal(mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sparse_model_is_the_dense_one_with_zeros(name: str) -> None:
    expected = logits(with_zeros(name))
    assert logits(sparse(name)).equal(expected)
    assert (logits(tiny_model(name)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_it_holds_what_it_keeps_and_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    model, masks = sparse(name, torch.float32), some_masks(tiny_model(name))
    logits(model)  # what was made to multiply with is not saved
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    dense = footprint(tiny_model(name))
    counted = footprint(model)
    assert (counted.active_block, counted.stored_total) == (dense.active_block - zeros, dense.stored_total - zeros)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    bits = sum(tensor.numel() for tensor in stored.values() if tensor.dtype == torch.uint8)
    assert sum(tensor.numel() for tensor in stored.values()) == counted.stored_total + bits
    assert bits == sum(len(mask) * -(-mask.shape[1] // 8) for mask in masks.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        loaded.state_dict().keys()
        == model.state_dict().keys()
        == stored.keys() | ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    )
    assert logits(loaded).equal(logits(model))
    assert_cache_changes_nothing(loaded)


def layer_of(model: PreTrainedModel) -> SparseLinear:
    part = modeling.Decoder(model).layers[0].module.get_submodule("mlp.down_proj")
    assert isinstance(part, SparseLinear)
    return part


def a_layer() -> SparseLinear:
    part = layer_of(sparse("llama-biases"))
    return part.requires_grad_(False)


def product(part: SparseLinear, x: Tensor) -> Tensor:
    """By definition."""
    weight = torch.zeros(part.out_features, part.in_features, dtype=part.values.dtype)
    weight[unpack(part.mask, part.in_features)] = part.values.detach()
    return x @ weight.T + part.bias


X = torch.randn(3, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def double(part: SparseLinear) -> SparseLinear:
    with torch.no_grad():
        part.values.mul_(2)
    return part


def replace(part: SparseLinear) -> SparseLinear:
    part.values = nn.Parameter(part.values.detach() + 1, requires_grad=False)
    return part


def load(part: SparseLinear) -> SparseLinear:
    part.load_state_dict({key: value.flip(0) for key, value in part.state_dict().items()})
    return part


def assign(part: SparseLinear) -> SparseLinear:
    part.load_state_dict({key: value.flip(0) for key, value in part.state_dict().items()}, assign=True)
    return part


def refill(part: SparseLinear) -> SparseLinear:
    part.values.data = part.values.data * 2
    part.mask.data = part.mask.data.flip(0)
    return part


def fill_and_forget(part: SparseLinear) -> SparseLinear:
    part.values.data.mul_(2)
    part.forget()
    return part


def recast(part: SparseLinear) -> SparseLinear:
    for parameter in part.parameters():
        parameter.data = parameter.data.float()
    return part


CHANGES: dict[str, Any] = {
    "nothing": lambda part: part,
    "written to": double,
    "replaced": replace,
    "its data replaced": refill,
    "its data written to": fill_and_forget,
    "loaded": load,
    "assigned": assign,
    "copied": copy.deepcopy,
    "cast": lambda part: part.float(),
    "cast and back": lambda part: double(part.float()).double(),
    "cast from below": recast,
    "its copy written to": lambda part: double(copy.deepcopy(part)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_matrix_follows_its_parts(change: str, mode: Any) -> None:
    part = a_layer()
    with mode():
        part(X)
    keys = part.state_dict().keys()
    changed = CHANGES[change](part)
    x = X.to(changed.values.dtype)
    with mode():
        torch.testing.assert_close(changed(x), product(changed, x))
    assert changed.state_dict().keys() == keys == {"values", "mask", "bias"}


def test_the_matrix_is_made_once() -> None:
    part = a_layer()
    part(X)
    assert part._made is not None
    made = part._made[3]
    part(X)
    assert part._made is not None and part._made[3] is made and part.weight is made
    part.to("cpu", torch.float64)
    assert part._made is None


def test_gradients_are_those_of_the_dense_matrix_at_the_kept_weights() -> None:
    model, silent, ids = sparse("llama-biases"), with_zeros("llama-biases"), some_ids()
    with torch.inference_mode():
        model(input_ids=ids)  # nothing made here may get in the way
    for each in (model, silent):
        each(input_ids=ids).logits.square().sum().backward()
    for (block, part), mask in some_masks(silent).items():
        mine, its = (modeling.Decoder(each).layers[block].module.get_submodule(part) for each in (model, silent))
        torch.testing.assert_close(mine.values.grad, its.weight.grad[mask])  # type: ignore[index, union-attr]
        torch.testing.assert_close(mine.bias.grad, its.bias.grad)  # type: ignore[union-attr]


def test_a_frozen_projection_passes_gradients_on() -> None:
    part, x = a_layer(), X.clone().requires_grad_()
    with torch.inference_mode():
        part(X)  # what is made here serves a gradient too
    part(x).sum().backward()
    torch.testing.assert_close(x.grad, part.weight.sum(0).expand_as(X))


def test_structures_compose(tmp_path: Path) -> None:
    """Heads, neurons and rows first, then weights; then blocks go."""
    model, silent = tiny_model("llama-gqa", dtype=torch.float32), tiny_model("llama-gqa", dtype=torch.float32)
    masks: dict[str, Tensor] = {}
    for each in (model, silent):
        shape, layer = modeling.Decoder(each).shape, modeling.Decoder(each).layers[1]
        modeling.narrow_heads(layer, shape, [1])
        modeling.narrow_vo(layer, shape, range(4))
        modeling.narrow_mlp(layer, torch.arange(20))
        modeling.gather_linear(layer, layer.family.key, None, torch.arange(16))
        for name in (f"{layer.family.key}.linear", layer.family.value, layer.family.output, layer.family.down):
            weight = layer.module.get_submodule(name).weight
            masks[name] = lots(weight.shape, 3)
            if each is model:
                modeling.sparsify(layer, name, masks[name], "unstructured")
            else:
                weight.data.mul_(masks[name])  # type: ignore[union-attr, operator]
    structures = {
        "narrow_attention": modeling.attention_record(model),
        "narrow_mlp": {"layers": [None, 20, None, None]},
        "gathered_linears": modeling.gathered_record(model),
        "sparse_linears": modeling.sparse_record(model),
    }
    both = modeling.rebuild(model, structures)
    assert logits(both).equal(logits(silent))
    modeling.keep_layers(both, [1, 3]).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(modeling.keep_layers(silent, [1, 3])))
    first, second = describe(loaded)["layers"]
    assert set(first["density"]) == set(masks) and second["density"] == {}
    with pytest.raises(UserError, match="become a SparseLinear cannot be made narrower"):
        modeling.narrow_mlp(modeling.Decoder(loaded).layers[0], torch.arange(3))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_a_description_names_the_density(name: str) -> None:
    model, masks = sparse(name), some_masks(tiny_model(name))
    layers = describe(model)["layers"]
    for (block, part), mask in masks.items():
        assert layers[block]["density"][part] == pytest.approx(mask.double().mean().item())
    assert layers[3]["density"] == {} and layers[0]["mlp"]["kept"] == layers[0]["mlp"]["full"]
    if not model.config.tie_word_embeddings:
        assert footprint(model.to("meta")) == footprint(sparse(name))


def test_a_delta_stores_the_values_unless_they_are_most_of_it(tmp_path: Path) -> None:
    save_delta(sparse("llama-gqa"), tiny_model("llama-gqa"), tmp_path)
    assert logits(load_delta(tmp_path, tiny_model("llama-gqa"))).equal(logits(sparse("llama-gqa")))
    with pytest.raises(UserError, match="projections that are sparse"):
        save_delta(sparse("llama-gqa", all_but_one=True), tiny_model("llama-gqa"), tmp_path)


def test_what_cannot_be_is_refused() -> None:
    layer = modeling.Decoder(tiny_model("phi")).layers[0]
    with pytest.raises(UserError, match="no weight of mlp.fc1 would be left"):
        modeling.sparsify(layer, layer.family.up, torch.zeros(64, 32, dtype=torch.bool), "unstructured")
    mask = torch.tensor([True, False]).repeat(64, 16)
    mask[5, 5] = True
    with pytest.raises(UserError, match="more than two of four"):
        modeling.sparsify(layer, layer.family.up, mask, "2:4")
    modeling.sparsify(layer, layer.family.up, mask, "4:6")
    with pytest.raises(UserError, match="sparse or replaced already"):
        modeling.sparsify(layer, layer.family.up, mask, "unstructured")


# Kernels


def two_of_four(dtype: torch.dtype, outputs: int = 64, inputs: int = 128) -> SparseLinear:
    holder = modeling.Decoder(tiny_model("llama-biases", dtype=dtype)).layers[0]
    linear = nn.Linear(inputs, outputs, dtype=dtype)
    holder.module.set_submodule("mlp.up_proj", linear)
    scores = torch.rand(outputs, inputs // 4, 4, generator=torch.Generator().manual_seed(0))
    mask = (scores >= scores.sort(-1).values[..., 2:3]).flatten(1)
    return modeling.sparsify(holder, "mlp.up_proj", mask, "2:4").requires_grad_(False)


def test_kernels_get_a_matrix_once_and_only_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has them; here the compressed form is the matrix itself, with its sign turned."""
    made: list[Tensor] = []

    def stand_in(weight: Tensor) -> Tensor:
        assert weight.is_contiguous() and (weight.unflatten(1, (-1, 4)) != 0).sum(2).max() == 2
        made.append(weight)
        return -weight

    part, x = two_of_four(torch.bfloat16), torch.randn(2, 3, 128, dtype=torch.bfloat16)
    expected = nn.functional.linear(x, part.weight, part.bias)
    turned = nn.functional.linear(x, -part.weight, part.bias)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", stand_in)
    monkeypatch.setattr(sparse_linears, "has_sparse_cores", lambda device, dtype: dtype == torch.bfloat16)
    with torch.no_grad():
        assert part(x).equal(turned) and part(x).equal(turned) and len(made) == 1
        assert part.weight.equal(made[0])
    assert part(x).equal(expected) and len(made) == 1
    with torch.inference_mode():
        assert part(x).equal(turned)
        assert part.float()(x.float()).dtype == torch.float32 and len(made) == 2
        small = two_of_four(torch.bfloat16, outputs=48)
        small(x)
        assert not small.has_kernel(torch.device("cpu")) and len(made) == 2
    part.pattern = "4:8"
    assert not part.has_kernel(torch.device("cpu"))


def test_kernels_get_contiguous_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others they refuse."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert x.is_contiguous()
        return nn.functional.linear(x, weight, bias)

    part, x = two_of_four(torch.bfloat16), torch.randn(3, 2, 128, dtype=torch.bfloat16).transpose(0, 1)
    expected = nn.functional.linear(x, part.weight, part.bias)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    monkeypatch.setattr(sparse_linears, "has_sparse_cores", lambda device, dtype: True)
    monkeypatch.setattr(sparse_linears, "multiply", kernel)
    with torch.no_grad():
        torch.testing.assert_close(part(x), expected, rtol=2e-2, atol=1e-3)


def test_what_is_made_is_counted_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """2:4 in bf16: 18 of 32 bits for values and mask, and the dense matrix, or its compressed form in 18 more."""
    part, cpu = two_of_four(torch.bfloat16), torch.device("cpu")
    dense = 2 * 64 * 128
    assert part.values.nbytes + part.mask.nbytes == dense * 18 // 32
    assert part.made_bytes(cpu) == part.weight.nbytes == dense
    model = sparse("llama-gqa")
    expected = modeling.made_bytes(model, cpu)
    logits(model)
    made = [part._made[3].nbytes for part in model.modules() if isinstance(part, SparseLinear) and part._made]
    assert sum(made) == expected > 0 and modeling.made_bytes(tiny_model("llama-gqa"), cpu) == 0
    monkeypatch.setattr(sparse_linears, "has_sparse_cores", lambda device, dtype: True)
    assert part.made_bytes(cpu) == dense * 18 // 32


def test_there_are_no_kernels_on_a_cpu() -> None:
    assert not sparse_linears.has_sparse_cores(torch.device("cpu"), torch.bfloat16)
    assert modeling.runs_sparse(sparse("llama-gqa")) == (0, 21)


def test_a_device_without_memory_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = [torch.OutOfMemoryError("full"), RuntimeError("no such kernel")]

    def try_it(device: torch.device, dtype: torch.dtype) -> None:
        raise failures.pop(0)

    monkeypatch.setattr(sparse_linears, "_multiply_some", try_it)
    device = torch.device("cuda", 7)  # of which nothing is known yet
    with pytest.raises(torch.OutOfMemoryError):
        sparse_linears.has_sparse_cores(device, torch.bfloat16)
    assert not any(sparse_linears.has_sparse_cores(device, torch.bfloat16) for _ in range(2)) and not failures
    sparse_linears.has_sparse_cores.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_real_device(dtype: torch.dtype) -> None:
    part = two_of_four(dtype).cuda()
    x = torch.randn(2, 3, 128, dtype=dtype, device="cuda")
    with torch.no_grad():
        found = part(x)
    torch.testing.assert_close(found, nn.functional.linear(x, part.weight, part.bias), rtol=2e-2, atol=2e-2)
    assert copy.deepcopy(part).cpu().values.device.type == "cpu"
