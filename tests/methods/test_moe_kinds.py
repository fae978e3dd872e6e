"""Mixtures with several experts per token, shared parts, gates, routers and constants: against one loop over tokens."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.modeling.describe import describe, load_fractions
from methods.modeling.footprint import active, count, footprint
from methods.modeling.record import structures_of
from methods.modeling.structures import moe_gates
from methods.modeling.structures.moe_mlp import MoEMLP, mixtures
from methods.modeling.structures.moe_routers import AnalyticRouter, MLPRouter, OracleRouter
from methods.modeling.structures.moe_stores import STORES
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    some_ids,
    tiny_model,
)

HIDDEN = 32
SETTINGS = [(store, path) for store, kind in STORES.items() for path in ("fixed", *kind.paths)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def partition(width: int, sizes: list[int], seed: int = 0) -> list[Tensor]:
    """Neurons by lot, in parts of some sizes."""
    return [*torch.randperm(width, generator=generator(seed))[: sum(sizes)].split(sizes)]


def overlapping(width: int, seed: int = 0) -> list[Tensor]:
    """Five experts of ten neurons with two in all of them."""
    lots = [torch.randperm(width - 2, generator=generator(seed + i))[:8] + 2 for i in range(5)]
    return [torch.cat([torch.arange(2), lot]) for lot in lots]


KINDS: dict[str, dict[str, Any]] = {
    "top 2": {"active": 2},
    "all": {"active": 6},
    "shared": {"active": 1, "shared": True},
    "shared only weighs nothing": {"active": 3, "shared": True, "router": "cosine mlp"},
    "softmax": {"active": 2, "gate": "softmax", "scale": 3.0, "router": "mlp"},
    "softmax of one": {"active": 1, "gate": "softmax", "scale": 1.0, "shared": True},
    "scaled": {"active": 3, "gate": "scaled", "router": "analytic", "shared": True},
    "constants": {"active": 2, "constants": True, "router": "cosine mlp"},
    "constants of one": {"active": 1, "constants": True},
    "unequal": {"active": 2, "sizes": [9, 8, 8, 8, 8, 7], "shared": True},
    "unequal, one": {"active": 1, "sizes": [9, 8, 8, 8, 8, 7]},
    "oracle": {"active": 2, "router": "oracle", "sizes": [9, 8, 8, 8, 8, 7], "shared": True},
    "oracle of deviation": {"active": 2, "router": "oracle of deviation", "constants": True},
    "overlapping, oracle": {"active": 2, "router": "oracle of deviation", "overlapping": True},
    "overlapping": {"active": 2, "overlapping": True, "gate": "softmax", "scale": 2.0},
    "overlapping, equal": {"active": 3, "overlapping": True},
}


def draw_router(kind: str, layer: modeling.DecoderLayer, experts: int, seed: int) -> Tensor | nn.Module:
    g = generator(seed)
    if kind == "linear":
        return torch.randn(experts, HIDDEN, generator=g)
    if kind == "analytic":
        rows = [torch.randn(experts, HIDDEN, generator=g) for _ in layer.mlp_inputs]
        return AnalyticRouter(rows, layer.mlp_activation)
    if kind.startswith("oracle"):
        return OracleRouter(None if kind == "oracle" else torch.randn(layer.mlp_output.in_features, generator=g))
    router = MLPRouter(HIDDEN, experts, kind == "cosine mlp")
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g)
    return router


def convert(layer: modeling.DecoderLayer, case: str, seed: int = 0) -> tuple[MoEMLP, Callable[[Tensor], Tensor]]:
    """The mixture of a kind, and its definition written out for one token after the other."""
    kind = {"router": "linear", "gate": "equal", "scale": 1.0, "shared": False, "constants": False, **KINDS[case]}
    inputs, down, activation = copy.deepcopy(layer.mlp_inputs), copy.deepcopy(layer.mlp_output), layer.mlp_activation
    width = down.in_features
    sizes = kind.get("sizes") or [8] * 6
    always = torch.zeros(0, dtype=torch.int64)
    if kind.get("overlapping"):
        experts = overlapping(width, seed)
    elif kind["shared"]:
        always, *experts = partition(width, [width - sum(sizes[1:]), *sizes[1:]], seed)
    else:
        experts = partition(width, sizes if sum(sizes) == width else [*sizes[:-1], width - sum(sizes[:-1])], seed)
    constants = torch.randn(len(experts), HIDDEN, generator=generator(seed)) if kind["constants"] else None
    router = draw_router(kind["router"], layer, len(experts), seed)
    weights = [router] if isinstance(router, Tensor) else [p.detach().clone() for p in router.parameters()]
    centre = router.centre if isinstance(router, OracleRouter) else None
    u = torch.randn(len(experts), generator=generator(seed + 9)) if kind["gate"] == "scaled" else None
    b = torch.randn(len(experts), generator=generator(seed + 8)) / 4 if kind["gate"] == "scaled" else None

    def neuron(i: int, x_D: Tensor) -> Tensor:
        first, *others = (w.weight[i] @ x_D + (0 if w.bias is None else w.bias[i]) for w in inputs)
        hidden = activation(first)
        for other in others:
            hidden = hidden * other
        return hidden

    def truth(x_D: Tensor, i: int) -> float:
        h = float(neuron(i, x_D).detach())
        return abs(h) if centre is None else (h - float(centre[i])) ** 2

    def scores(x_D: Tensor) -> list[float]:
        if kind["router"].startswith("oracle"):
            return [sum(truth(x_D, i) for i in own.tolist()) for own in experts]
        rows = [weight.to(x_D) for weight in weights]
        if kind["router"] == "linear":
            return (rows[0] @ x_D).tolist()
        if kind["router"] == "analytic":
            first, *others = (row @ x_D for row in rows)
            return [abs(float(activation(a) * math.prod(o))) for a, *o in zip(first, *others, strict=True)]
        x_D = x_D / x_D.norm() if kind["router"] == "cosine mlp" else x_D
        return (rows[1] @ torch.tanh(rows[0] @ x_D)).tolist()

    def chosen(x_D: Tensor) -> dict[int, float]:
        r = scores(x_D)
        p = [math.exp(a - max(r)) for a in r]
        p = [a / sum(p) for a in p]
        rank = r if b is None else [a + float(c) for a, c in zip(p, b, strict=True)]
        best = sorted(range(len(r)), key=lambda j: -rank[j])[: kind["active"]]
        if kind["gate"] == "softmax":
            return {j: kind["scale"] * p[j] / sum(p[i] for i in best) for j in best}
        return {j: 1.0 if u is None else 1 + p[j] * float(u[j]) for j in best}

    def one_token(x_D: Tensor) -> Tensor:
        factors = [0.0] * width
        for j in always.tolist():
            factors[j] += 1
        best = chosen(x_D)
        for j, weight in best.items():
            for i in experts[j].tolist():
                factors[i] += weight
        y_D = torch.zeros_like(x_D) if down.bias is None else down.bias.clone()
        for j, constant in enumerate([] if constants is None else constants):
            y_D = y_D if j in best else y_D + constant.to(x_D)
        for i, factor in enumerate(factors):
            y_D = y_D + factor * neuron(i, x_D) * down.weight[:, i]
        return y_D

    options = {key: kind[key] for key in ("active", "gate", "scale")}
    moe = modeling.convert_mlp(layer, router, experts, shared=always, constants=constants, **options).eval()
    if u is not None and b is not None:
        with torch.no_grad():
            moe.get_submodule("gate").scale.copy_(u)
            moe.get_submodule("gate").bias.copy_(b)
    return moe, lambda x_TD: torch.stack([one_token(x_D) for x_D in x_TD.view(-1, HIDDEN)]).view_as(x_TD)


def make(name: str, case: str, dtype: torch.dtype = torch.float32) -> tuple[MoEMLP, Callable[[Tensor], Tensor]]:
    return convert(modeling.Decoder(tiny_model(name, dtype=dtype)).layers[1], case)


def converted(name: str, case: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model whose blocks, but for the third, are mixtures of a kind."""
    model = tiny_model(name, dtype=dtype)
    for index, layer in enumerate(modeling.Decoder(model).layers):
        if index != 2:
            convert(layer, case, index)
    return modeling.rebuild(model, {"moe_mlp": modeling.expert_record(model)})


def with_setting(moe: MoEMLP, store: str, path: str) -> MoEMLP:
    other = copy.copy(moe)
    other.store, other.path = store, path
    return other


def draw_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=generator(seed)).to(dtype)


def assert_close(y: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert float((y - expected).abs().max()) <= tolerance * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "phi", "opt"])
def test_every_store_and_path_computes_the_definition(name: str, case: str) -> None:
    moe, reference = make(name, case)
    inputs = [(x, reference(x)) for x in (draw_input(1), draw_input(1, 1), draw_input(2, 9), draw_input(130))]
    for store, path in SETTINGS:
        variant = with_setting(moe, store, path)
        for x, expected in inputs:
            assert_close(variant(x), expected, 3e-5)


@pytest.mark.parametrize("case", KINDS)
def test_with_gradients_it_is_the_same(case: str) -> None:
    moe, reference = make("llama-biases", case, torch.float64)
    torch.testing.assert_close(moe(draw_input(9, dtype=torch.float64)), reference(draw_input(9, dtype=torch.float64)))


@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "phi"])
def test_all_experts_of_a_partition_are_the_dense_mlp(name: str) -> None:
    layer = modeling.Decoder(tiny_model(name)).layers[0]
    dense, x = layer.run_mlp, draw_input(7, dtype=torch.float64)
    expected = dense(x)
    moe = modeling.convert_mlp(
        layer, torch.zeros(3, HIDDEN), partition(layer.mlp_output.in_features, [16] * 3), active=3
    )
    if name == "phi":
        assert not torch.allclose(moe(x), expected)  # 16 of 64 neurons are in no expert
    else:
        torch.testing.assert_close(moe(x), expected)


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_save_and_load_gives_the_same_bits(name: str, case: str, tmp_path: Path) -> None:
    model = converted(name, case)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("case", ["scaled", "constants", "softmax", "unequal"])
def test_generation_with_cache_equals_without(case: str, store: str) -> None:
    model = converted("llama-gqa", case)
    modeling.set_experts(model, store)
    assert_cache_changes_nothing(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_has_the_mixtures_of_its_record(name: str) -> None:
    model = converted(name, "unequal")
    record = structures_of(model.config)["moe_mlp"]["layers"]
    assert record[2] is None and mixtures(model)[2] is None
    width = modeling.Decoder(tiny_model(name)).layers[0].mlp_output.in_features
    assert record[0] == {
        "experts": 5,
        "width": 8,
        "neurons": width,
        "active": 2,
        "shared": width - 39,
        "sizes": [8, 8, 8, 8, 7],
    }
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


class Sums(TorchFunctionMode):
    """Counts how often a tensor is summed up while open."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor, self.count = tensor, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is Tensor.sum and args[0] is self.tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("store", "path"), SETTINGS)
def test_constants_are_summed_up_once_for_all_passes(store: str, path: str) -> None:
    """And again where they have changed; gradients go through a sum of their own."""
    moe, reference = make("llama-gqa", "constants")
    moe, x, constants = with_setting(moe, store, path), draw_input(9), moe.get_parameter("constants")
    with torch.no_grad(), Sums(constants) as sums:
        y = moe(x)
        assert moe(x[:1]).equal(moe(x[:1])) and moe(x).equal(y) and sums.count == 1
        constants.mul_(2)
        twice = moe(x)
        assert moe(x).equal(twice) and sums.count == 2
    chosen = moe.choose(moe.router(x)).experts_Tk
    absent_ND = constants.detach() * torch.ones(9, 6).scatter(1, chosen, 0)[:, :, None]
    assert_close(y, reference(x).detach(), 3e-5)
    assert_close(twice, y + absent_ND.sum(1) / 2, 3e-5)
    moe(x).sum().backward()
    assert constants.grad is not None
    assert constants.grad[:, 0].tolist() == (9 - chosen.flatten().bincount(minlength=6)).tolist()


# --- Where neurons lie ---


@torch.no_grad()
@pytest.mark.parametrize("case", ["top 2", "shared", "unequal", "scaled"])
def test_a_partition_lies_expert_by_expert_and_is_read_in_place(case: str) -> None:
    moe, _ = make("llama-gqa", case)
    ends = torch.cat([torch.zeros(0) if moe.shared is None else moe.shared, *moe.sets]).tolist()
    assert ends == list(range(48))
    moe(draw_input(3))
    weight = moe.get_parameter("gate_proj.weight")
    (store,) = [made[1] for made in [moe._made] if made]
    for expert, positions in zip(store.experts, moe.sets, strict=True):  # pyright: ignore
        assert expert.inputs[0][0].data_ptr() == weight[int(positions[0])].data_ptr()


def test_other_sets_keep_the_order_of_the_dense_mlp() -> None:
    for case in ("overlapping", "overlapping, equal"):
        moe, _ = make("llama-gqa", case)
        assert (moe.neurons.diff() > 0).all() and len(moe.neurons) < 48


# --- Gates ---


def test_the_bias_moves_the_choice_and_not_the_weight() -> None:
    gate = moe_gates.ScaledGate(4, torch.zeros(())).eval()
    logits_TN = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    with torch.no_grad():
        gate.scale.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        before = gate(logits_TN, 2)
        gate.bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
        after = gate(logits_TN, 2)
    assert before.experts_Tk.tolist() == [[3, 2]] and after.experts_Tk.tolist() == [[0, 3]]
    p = torch.softmax(logits_TN[0], 0)
    torch.testing.assert_close(after.weights_Tk, torch.stack([1 + p[0], 1 + 4 * p[3]])[None])
    torch.testing.assert_close(before.weights_Tk[0, 0], after.weights_Tk[0, 1])


def test_new_gates_weigh_one() -> None:
    logits_TN = torch.randn(100, 5)
    scaled = moe_gates.ScaledGate(5, torch.zeros(())).eval()(logits_TN, 3)
    assert scaled.weights_Tk.equal(torch.ones(100, 3))
    assert scaled.experts_Tk.equal(moe_gates.EqualGate().eval()(logits_TN, 3).experts_Tk)
    for dtype in (torch.float32, torch.bfloat16):
        single = moe_gates.SoftmaxGate(1.0)(logits_TN.to(dtype), 1)
        assert single.weights_Tk.equal(torch.ones(100, 1, dtype=dtype))
    torch.testing.assert_close(moe_gates.SoftmaxGate(4.0)(logits_TN, 3).weights_Tk.sum(1), torch.full((100,), 4.0))


def test_ties_go_to_the_lower_number() -> None:
    for gate in (moe_gates.EqualGate(), moe_gates.SoftmaxGate(1.0), moe_gates.ScaledGate(6, torch.zeros(())).eval()):
        for k in (1, 2, 5):
            assert gate(torch.zeros(3, 6), k).experts_Tk.tolist() == [list(range(k))] * 3


def test_balance_moves_the_bias_against_the_loads_of_training() -> None:
    gate = moe_gates.ScaledGate(3, torch.zeros(()))
    logits_TN = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    gate(logits_TN, 1)
    assert gate.loads.tolist() == [2, 1, 0] and not gate.bias.any()
    gate.balance()
    torch.testing.assert_close(gate.bias, torch.tensor([-1e-3, 0.0, 1e-3]))
    gate.eval()(logits_TN[:1], 1)
    assert gate.loads.tolist() == [2, 1, 0] and "loads" not in gate.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_of_the_balance_are_not_lost_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """2,000 of them lead beyond 0.5, and neither casts nor checkpoints round what they have made."""
    model = converted("llama-gqa", "scaled", dtype).train()
    model(input_ids=some_ids())
    for moe in mixtures(model):
        if moe is not None:
            gate: Any = moe.gate
            expected = gate.bias - 2 * (gate.loads - gate.loads.mean()).sign()
            for _ in range(2000):
                gate.balance()
            torch.testing.assert_close(gate.bias, expected, rtol=0, atol=1e-3)
            assert gate.bias.abs().max() > 0.5
    model.eval().save_pretrained(tmp_path)
    state, loaded = model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype and logits(loaded).equal(logits(model))
    copies = [copy.deepcopy(loaded) for _ in range(3)]
    for other in (loaded, copies[0].to(dtype), copies[1].half(), copies[2].float()):  # pyright: ignore[reportArgumentType]
        gates = {key: tensor for key, tensor in other.state_dict().items() if key.endswith(("gate.scale", "gate.bias"))}
        loads = [buffer for name, buffer in other.named_buffers() if name.endswith("gate.loads")]
        assert len(gates) == 6 and all(tensor.equal(state[key]) for key, tensor in gates.items())
        assert {tensor.dtype for tensor in (*gates.values(), *loads)} == {torch.float32}
    gate = moe_gates.ScaledGate(3, torch.zeros((), dtype=dtype)).to("meta", dtype)
    assert gate.scale.is_meta and gate.bias.is_meta and gate.loads.is_meta  # where it was sent


@pytest.mark.parametrize("case", ["top 2", "shared", "constants of one"])
def test_routers_of_equal_weights_learn(case: str) -> None:
    """The gradient is that of weights p_j, the value that of weights 1."""
    moe, reference = make("llama-biases", case, torch.float64)
    x = draw_input(9, dtype=torch.float64)
    torch.testing.assert_close(moe.train()(x), reference(x))
    moe(x).square().sum().backward()
    found = moe.router.weight.grad.clone()
    moe.router.weight.grad = None
    p = moe.router(x).softmax(-1)
    y, k = moe(x).detach(), moe.layout.active
    shares = []
    for row, weights in zip(x, p, strict=True):
        for j in weights.argsort(descending=True)[:k]:
            rows = moe.sets[j].long()
            gate, up = (moe.get_submodule(f"{name}_proj")(row)[rows] for name in ("gate", "up"))
            shares.append(
                weights[j] * (nn.functional.silu(gate) * up @ moe.get_parameter("down_proj.weight")[:, rows].T)
            )
    pull = 2 * y.repeat_interleave(k, 0)
    (torch.stack(shares) * pull).sum().backward()
    torch.testing.assert_close(found, moe.router.weight.grad)


def test_the_scale_and_the_weights_train() -> None:
    moe, _ = make("llama-gqa", "scaled", torch.float64)
    moe.train()(draw_input(20, dtype=torch.float64)).square().sum().backward()
    assert moe.get_submodule("gate").scale.grad.count_nonzero() > 0
    assert all(parameter.grad is not None for parameter in moe.parameters())


# --- Counting and telling ---


@pytest.mark.parametrize("case", [case for case in KINDS if "overlapping" not in case])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "phi"])
def test_a_mixture_uses_what_gets_a_gradient_from_one_token(name: str, case: str) -> None:
    """Of its experts, when they are the largest; routers and gates whole, of constants the sum and the chosen.

    An oracle gives no gradient to what it reads: gate and up of all neurons.
    """
    moe, _ = make(name, case, torch.float64)
    sizes = torch.tensor([len(own) for own in moe.sets])
    for seed in range(40):
        x = draw_input(1, dtype=torch.float64, seed=seed)
        experts = moe.choose(moe.router(x)).experts_Tk[0]
        if sizes[experts].sum() == sizes.sort(descending=True).values[: len(experts)].sum():
            break
    else:
        pytest.fail("no token with the largest experts")
    moe(x).sum().backward()
    read = [moe.output_name, *([] if moe.layout.oracular else moe.input_names)]
    mlp = {n: p for n, p in moe.named_parameters() if n.split(".")[0] not in ("router", "gate", "constants")}
    touched = sum(int(p.grad.count_nonzero()) if n.split(".")[0] in read else p.numel() for n, p in mlp.items())
    touched += sum(p.numel() for module in (moe.router, moe.get_submodule("gate")) for p in module.parameters())
    touched += 0 if moe.constants is None else (len(experts) + 1) * HIDDEN
    assert active(moe) == touched < count(moe) or len(experts) == 6


def test_more_neurons_than_there_are_are_not_counted() -> None:
    layer = modeling.Decoder(tiny_model("llama-gqa")).layers[0]
    moe = modeling.convert_mlp(layer, torch.zeros(3, HIDDEN), torch.arange(20).expand(3, 20), active=3)
    assert moe.idle_parameters() == 0 and moe.layout.used == 20


@pytest.mark.parametrize("case", ["unequal, one", "constants", "scaled"])
def test_sizes_are_known_without_values(case: str) -> None:
    model = converted("llama-gqa", case)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert footprint(empty) == footprint(model) and footprint(model).active_total < footprint(model).distinct_total


def test_a_description_says_what_a_token_uses() -> None:
    told = describe(converted("llama-gqa", "unequal"))["layers"][0]
    assert told["mlp"] == {"kept": 9 + 16, "full": 48}
    assert (told["mixture"]["active"], told["mixture"]["shared"], told["mixture"]["used"]) == (2, 9, 25)
    assert told["mixture"]["cosine"] == torch.eye(5).tolist()


def test_loads_add_up_to_the_experts_of_a_token() -> None:
    model = converted("opt", "softmax")
    batches = list(RandomCalibration(padded=3).batches(5))
    loads = load_fractions(model, batches)
    assert loads[2] is None and all(sum(one) == pytest.approx(2) for one in loads if one is not None)
    choices = [modeling.expert_choices(model, batch.input_ids, batch.mask)[0][batch.mask] for batch in batches]
    expected = [sum(int((c == j).sum()) for c in choices) / sum(map(len, choices)) for j in range(6)]
    assert loads[0] == pytest.approx(expected)


def test_first_choices_come_first() -> None:
    model = converted("llama-gqa", "scaled")
    ids = some_ids()
    every = modeling.expert_choices(model, ids)
    assert every[2] is None and every[0].shape == (*ids.shape, 3)
    assert modeling.expert_ids(model, ids)[0].equal(every[0][..., 0])
