"""MLPs made of experts: equal to the dense MLP masked token by token, however they are stored and multiplied."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.base import Context
from methods.errors import UserError
from methods.modeling.record import structures_of
from methods.modeling.structures import moe_choice, moe_mlp
from methods.modeling.structures.moe_mlp import MoEMLP
from methods.modeling.structures.moe_stores import STORES
from methods.slicegpt import SliceGPT
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    some_ids,
    tiny_model,
)

EXPERTS, WIDTH, HIDDEN = 4, 20, 32
SETTINGS = [(store, path) for store, kind in STORES.items() for path in ("fixed", "measured", *kind.paths)]


def draw_experts(total: int, experts: int = EXPERTS, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Random neurons in random order, [experts, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(total, generator=generator)[:width] for _ in range(experts)])


def draw_router(experts: int = EXPERTS, seed: int = 0) -> Tensor:
    return torch.randn(experts, HIDDEN, generator=torch.Generator().manual_seed(seed))


def converted(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model whose blocks, but for the third, are mixtures of random experts with random routers."""
    model = tiny_model(name, dtype=dtype)
    for index, layer in enumerate(modeling.Decoder(model).layers):
        if index != 2:
            modeling.convert_mlp(layer, draw_router(seed=index), draw_experts(layer.mlp_output.in_features, seed=index))
    if dtype == torch.float64:  # rebuilding would bring back the stock norms, which round to fp32
        return model
    return modeling.rebuild(model, {moe_mlp.NAME: modeling.expert_record(model)})


def masked_dense(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The reference: the dense model, with hooks that zero in front of down what the token's expert lacks."""
    model = tiny_model(name, dtype=dtype)
    for index, layer in enumerate(modeling.Decoder(model).layers):
        if index != 2:
            router = draw_router(seed=index).to(dtype)
            masks = torch.zeros(EXPERTS, layer.mlp_output.in_features, dtype=dtype)
            for mask, neurons in zip(masks, draw_experts(masks.shape[1], seed=index), strict=True):
                mask[neurons] = 1
            chosen: list[Tensor] = []

            def route(module, args, router=router, chosen=chosen):
                chosen[:] = [(args[0] @ router.T).argmax(-1)]

            def mask_hidden(module, args, masks=masks, chosen=chosen):
                return args[0] * masks[chosen[0]]

            layer.mlp_inputs[0].register_forward_pre_hook(route)
            layer.mlp_output.register_forward_pre_hook(mask_hidden)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_equals_the_masked_dense_one(name: str) -> None:
    torch.testing.assert_close(
        logits(converted(name, torch.float64)), logits(masked_dense(name, torch.float64)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model = converted(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(model))
    assert [buffer.dtype for buffer in loaded.buffers()].count(torch.int32) == 6


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    model = converted("llama-gqa")
    model.save_pretrained(tmp_path)
    expected = {str(tokens): logits(model, some_ids(4, tokens)) for tokens in (1, 64)}
    save_file(expected, tmp_path / "expected.safetensors")
    script = (
        "import sys, methods, torch; from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM; from tests.methods.tiny import logits, some_ids\n"
        "torch.set_num_threads(int(sys.argv[2])); model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "expected = load_file(sys.argv[1] + '/expected.safetensors')\n"
        "assert all(logits(model, some_ids(4, int(tokens))).equal(y) for tokens, y in expected.items())"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(torch.get_num_threads())]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@pytest.mark.parametrize("store", STORES)
def test_generation_with_cache_equals_without(name: str, store: str) -> None:
    model = converted(name)
    modeling.set_experts(model, store)
    assert_cache_changes_nothing(model)


# --- One module against a loop over tokens ---

Reference = Callable[[Tensor], Tensor]
CASES = {
    "overlapping": (5, 12),
    "width 1": (5, 1),
    "one expert": (1, 12),
    "everything in every expert": (3, None),
    "nothing in all experts": (2, 12),
}
DENSE = ["llama-gqa", "llama-biases", "phi", "opt"]


def make(name: str, case: str = "overlapping", dtype: torch.dtype = torch.float32) -> tuple[MoEMLP, Reference]:
    """The mixture of one block, and its definition written out for one token after the other."""
    model = tiny_model(name, dtype=dtype)
    layer = modeling.Decoder(model).layers[1]
    inputs, down, activation = copy.deepcopy(layer.mlp_inputs), copy.deepcopy(layer.mlp_output), layer.mlp_activation
    count, width = CASES[case]
    experts = draw_experts(down.in_features, count, width or down.in_features)
    if case == "nothing in all experts":
        experts = torch.arange(24).view(2, 12).flip(1)
    router = draw_router(count)

    def one_token(x_D: Tensor) -> Tensor:
        scores = [float(row @ x_D) for row in router.to(dtype)]
        neurons = experts[scores.index(max(scores))].tolist()
        y_D = torch.zeros_like(x_D) if down.bias is None else down.bias.clone()
        for j in neurons:
            first, *others = (w.weight[j] @ x_D + (0 if w.bias is None else w.bias[j]) for w in inputs)
            hidden = activation(first)
            for other in others:
                hidden = hidden * other
            y_D = y_D + hidden * down.weight[:, j]
        return y_D

    moe = modeling.convert_mlp(layer, router, experts).eval()
    return moe, lambda x_TD: torch.stack([one_token(x_D) for x_D in x_TD.view(-1, HIDDEN)]).view_as(x_TD)


def with_setting(moe: MoEMLP, store: str, path: str) -> MoEMLP:
    other = copy.copy(moe)
    other.store, other.path = store, path
    return other


def draw_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equal_up_to_rounding(y: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert float((y - expected).abs().max()) <= tolerance * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DENSE)
def test_every_store_and_path_computes_the_definition(name: str, case: str) -> None:
    moe, reference = make(name, case)
    same_expert = draw_input(1, 1).expand(1, 6, -1)
    for x in (draw_input(1), draw_input(1, 1), draw_input(2, 9), same_expert, draw_input(300)):
        expected = reference(x)
        for store, path in SETTINGS:
            assert_equal_up_to_rounding(with_setting(moe, store, path)(x), expected)


def test_the_cases_are_what_they_say() -> None:
    routes = make("llama-gqa")[0].router(draw_input(2, 9)).argmax(-1)
    assert len(routes.unique()) > 1
    everything, nothing = (make("opt", case)[0] for case in list(CASES)[-2:])
    masks = [set.intersection(*(set(row.tolist()) for row in moe.index)) for moe in (everything, nothing)]
    assert [len(mask) for mask in masks] == [64, 0]
    assert [len(moe.neurons) for moe in (everything, nothing)] == [64, 24]


@torch.no_grad()
@pytest.mark.parametrize("store", STORES)
def test_ties_go_to_the_first_expert(store: str) -> None:
    moe, _ = make("llama-gqa", dtype=torch.float64)
    moe.router.weight.copy_(torch.zeros(5, HIDDEN))
    alone = copy.deepcopy(moe)
    alone.router.weight[0] += 1
    x = draw_input(7, dtype=torch.float64).abs()  # against ones, so that expert 0 wins here
    torch.testing.assert_close(with_setting(moe, store, "fixed")(x), alone(x))
    alone.router.weight[1] += 2
    assert not torch.allclose(moe(x), alone(x))


# --- Copies follow the weights ---


def changed_in_place(moe: MoEMLP) -> MoEMLP:
    moe.get_submodule("down_proj").weight.mul_(2)
    return moe


def cast_there_and_back(moe: MoEMLP) -> MoEMLP:
    return moe.to(torch.bfloat16).to(torch.float32)


def replaced(moe: MoEMLP) -> MoEMLP:
    up = moe.get_submodule("up_proj")
    up.weight = nn.Parameter(up.weight * 2)
    return moe


def loaded(moe: MoEMLP) -> MoEMLP:
    state = {name: value * 2 if value.is_floating_point() else value for name, value in moe.state_dict().items()}
    moe.load_state_dict(state)
    return moe


def other_table(moe: MoEMLP) -> MoEMLP:
    moe.index.copy_(moe.index.flip(0))
    return moe


CHANGES = [changed_in_place, cast_there_and_back, replaced, loaded, other_table, copy.deepcopy]


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [changed_in_place, cast_there_and_back, replaced, loaded, other_table, copy.deepcopy]
)
@pytest.mark.parametrize("store", STORES)
def test_copies_follow_the_weights(store: str, change: Callable[[MoEMLP], MoEMLP]) -> None:
    moe = with_setting(make("llama-biases")[0], store, "fixed")
    x_many, x_one = draw_input(300), draw_input(1)
    before = moe(x_many), moe(x_one)
    moe = change(moe)
    fresh = with_setting(moe, "pseudo", "fixed")
    for x, old in zip((x_many, x_one), before, strict=True):
        assert_equal_up_to_rounding(moe(x), fresh(x))
        assert moe(x).equal(old) == (change is copy.deepcopy)


@torch.no_grad()
@pytest.mark.parametrize("store", STORES)
def test_a_cast_model_computes_in_its_dtype(store: str) -> None:
    moe, reference = make("llama-gqa")
    moe = with_setting(moe, store, "fixed")
    for x in (draw_input(1), draw_input(300)):
        moe.float()(x)
        y = moe.bfloat16()(x.bfloat16())
        assert y.dtype == torch.bfloat16
        same_route = moe.router(x.bfloat16()).argmax(-1) == make("llama-gqa")[0].router(x).argmax(-1)
        assert_equal_up_to_rounding(y[same_route].float(), reference(x)[same_route], 0.05)


@pytest.mark.parametrize("store", STORES)
def test_what_inference_mode_made_serves_elsewhere(store: str) -> None:
    moe = with_setting(make("opt")[0], store, "fixed")
    x = draw_input(4)
    with torch.inference_mode():
        expected = moe(x)
    with torch.no_grad():
        assert moe(x).equal(expected)
    moe.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


# --- Settings ---


def test_a_checkpoint_remembers_the_setting_and_stores_weights_once(tmp_path: Path) -> None:
    model = converted("llama-gqa")
    record = structures_of(model.config)[moe_mlp.NAME]
    record["layers"][0]["note"] = "kept"
    names, expected = set(model.state_dict()), logits(model)
    modeling.set_experts(model, "materialised", "sorted")
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    moe = moe_mlp.mixtures(again)[0]
    assert moe is not None and (moe.store, moe.path) == ("materialised", "sorted")
    assert structures_of(again.config)[moe_mlp.NAME]["layers"][0]["note"] == "kept"
    assert logits(again).equal(logits(model))


def test_an_impossible_setting_is_refused() -> None:
    model = converted("llama-gqa")
    with pytest.raises(UserError, match="Did you mean materialised"):
        modeling.set_experts(model, "materialized")
    with pytest.raises(UserError, match="'shared' has no path 'grouped'.*fixed, measured, masked, sorted"):
        modeling.set_experts(model, "shared", "grouped")


@pytest.mark.parametrize("experts", [[[]], [[0, 0]], [[-1, 3]], [[0, 48]]])
def test_experts_must_be_sets_of_neurons(experts: list[list[int]]) -> None:
    layer = modeling.Decoder(tiny_model("llama-gqa")).layers[0]
    with pytest.raises(ValueError, match="distinct and below 48"):
        modeling.convert_mlp(layer, draw_router(1), torch.tensor(experts, dtype=torch.int64))


def chosen_by_fixed(store: str, tokens: int, case: str = "overlapping", dtype: torch.dtype = torch.float32) -> str:
    moe = with_setting(make("llama-gqa", case, dtype)[0], store, "fixed")
    with torch.no_grad():
        return moe_choice.fixed(moe._ready(), draw_input(tokens, dtype=dtype))


def test_the_fixed_rule() -> None:
    left_out = len(make("llama-gqa")[0].neurons) - 12
    for store, fetches in (("shared", 2), ("materialised", 1), ("core+rest", 1), ("pseudo", None)):
        least = -(-32 * (fetches or 1) * 5 * 12 // left_out)
        chosen = [chosen_by_fixed(store, tokens) for tokens in (1, 2, least - 1, least)]
        assert chosen == (["single", "masked", "masked", "sorted"] if fetches else ["masked"] * 4)
        assert chosen_by_fixed(store, 100_000, "one expert") == "masked"  # which leaves nothing out
    assert chosen_by_fixed("shared", 1, dtype=torch.bfloat16) == "masked"


@torch.no_grad()
def test_measuring_picks_the_fastest_once_per_kind_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = with_setting(make("llama-gqa")[0], "materialised", "measured")
    store, timed = moe._ready(), []
    taken = {name: [] for name in store.ways}
    for name, way in store.ways.items():
        store.ways[name] = lambda e, x, name=name, way=way: taken[name].append(len(x)) or way(e, x)

    def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
        before = {name: len(calls) for name, calls in taken.items()}
        run()
        (name,) = (name for name, calls in taken.items() if len(calls) > before[name])
        taken[name].pop()
        timed.append(name)
        return 0.1 if name == "grouped" else 0.2

    monkeypatch.setattr(moe_choice, "_seconds", seconds)
    monkeypatch.setattr(moe_choice, "_fastest", {})
    moe(draw_input(5))
    assert sorted(timed) == ["grouped", "masked", "sorted"] and taken["grouped"] == [5]
    moe(draw_input(7))
    assert len(timed) == 3 and taken["grouped"] == [5, 7]
    moe(draw_input(8))
    assert len(timed) == 6
    moe(draw_input(1))
    assert sorted(timed[6:]) == ["grouped", "masked", "single", "sorted"]


# --- Training ---


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", DENSE)
def test_gradients_in_training_are_those_of_the_formula(name: str, store: str) -> None:
    moe, reference = make(name, dtype=torch.float64)
    x = draw_input(2, 9, dtype=torch.float64)
    moe = with_setting(moe, store, "fixed")
    with torch.no_grad():
        moe(x)  # copies exist
    moe.train()
    y = moe(x)
    torch.testing.assert_close(y, reference(x))
    pull = draw_input(2, 9, dtype=torch.float64, seed=4)
    (y * pull).sum().backward()

    router = moe.router.weight.detach().clone().requires_grad_()
    probabilities = torch.softmax(x @ router.T, -1)
    chosen = torch.nn.functional.one_hot(probabilities.argmax(-1), 5)
    gate = chosen + probabilities - probabilities.detach()
    (reference(x).detach() * (gate * chosen).sum(-1, keepdim=True) * pull).sum().backward()
    assert moe.router.weight.grad is not None and float(moe.router.weight.grad.abs().max()) > 0
    torch.testing.assert_close(moe.router.weight.grad, router.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("store", STORES)
def test_weights_get_the_gradient_of_the_masked_dense_mlp(store: str, training: bool) -> None:
    moe, reference = make("llama-biases", dtype=torch.float64)
    dense = modeling.Decoder(tiny_model("llama-biases")).layers[1]
    x = draw_input(9, dtype=torch.float64)
    moe = with_setting(moe, store, "fixed").train(training)
    with torch.no_grad():
        moe(x)
    moe(x).square().sum().backward()
    hidden = dense.mlp_inputs[1](x) * dense.mlp_activation(dense.mlp_inputs[0](x))
    mask = torch.zeros_like(hidden)
    for row, expert in zip(mask, moe.router(x).argmax(-1), strict=True):
        row[moe.neurons[moe.index[expert].long()].long()] = 1
    y = dense.mlp_output(hidden * mask)
    torch.testing.assert_close(y, reference(x))
    y.square().sum().backward()
    for name, linear in zip(["gate_proj", "up_proj"], dense.mlp_inputs, strict=True):
        torch.testing.assert_close(moe.get_parameter(f"{name}.weight").grad, linear.weight.grad[moe.neurons.long()])
    torch.testing.assert_close(
        moe.get_parameter("down_proj.weight").grad, dense.mlp_output.weight.grad[:, moe.neurons.long()]
    )


def test_the_gate_is_exactly_one() -> None:
    logits_TN = torch.randn(1000, 5)
    assert moe_mlp.unit_gate(logits_TN, logits_TN.argmax(-1)).equal(torch.ones(1000, 1))


# --- Looking at experts, composing ---


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_expert_ids_are_those_of_the_masked_dense_model(name: str) -> None:
    ids = some_ids(2, 7)
    found = modeling.expert_ids(converted(name, torch.float64), ids)
    assert found.shape == (4, 2, 7) and found.dtype == torch.int64 and (found[2] == -1).all()
    model, expected = masked_dense(name, torch.float64), {}
    for index, layer in enumerate(modeling.Decoder(model).layers):
        routing = draw_router(seed=index).double()

        def see(module, args, index=index, routing=routing):
            expected[index] = (args[0] @ routing.T).argmax(-1).view(2, 7)

        layer.mlp_inputs[0].register_forward_pre_hook(see)
    logits(model, ids)
    for index in (0, 1, 3):
        assert found[index].equal(expected[index])


def test_expert_ids_heed_the_attention_mask() -> None:
    model, ids = converted("llama-gqa", torch.float64), some_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 6, dtype=torch.int64)], 1)
    assert modeling.expert_ids(model, padded, mask)[:, :, 3:].equal(modeling.expert_ids(model, ids))
    assert not modeling.expert_ids(model, padded)[:, :, 3:].equal(modeling.expert_ids(model, ids))


def test_descriptions() -> None:
    described = modeling.describe_experts(converted("phi"))
    assert described[2] is None
    sets = [set(row.tolist()) for row in draw_experts(64, seed=1)]
    layer = described[1]
    assert layer is not None
    assert (layer["experts"], layer["width"], layer["union"]) == (EXPERTS, WIDTH, len(set.union(*sets)))
    for i, one in enumerate(sets):
        for j, other in enumerate(sets):
            assert layer["cosine"][i][j] == pytest.approx(len(one & other) / (len(one) * len(other)) ** 0.5)
            assert layer["jaccard"][i][j] == pytest.approx(len(one & other) / len(one | other))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_experts_in_a_sliced_model(name: str, tmp_path: Path) -> None:
    """Both structures on one layer: the mixture reads and writes the narrower stream."""
    model = SliceGPT().slice(
        tiny_model(name, dtype=torch.float32), 24, RandomCalibration(), Context(scratch=tmp_path / "scratch")
    )
    dense = copy.deepcopy(model)
    for layer in modeling.Decoder(model).layers:
        modeling.convert_mlp(
            layer, draw_router()[:, :24], torch.arange(layer.mlp_output.in_features)[None].expand(4, -1)
        )
    both = modeling.rebuild(model, {moe_mlp.NAME: modeling.expert_record(model)})
    torch.testing.assert_close(logits(both), logits(dense), rtol=1e-4, atol=1e-4)
    assert set(structures_of(both.config)) == {"rotated_residual", moe_mlp.NAME}
    both.save_pretrained(tmp_path)
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path)).equal(logits(both))
