"""How many experts: closed forms against counting, the nearest size against all sizes, and what is refused."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import methods
from methods.base import Budget
from methods.errors import UserError
from methods.expert_plans import ExpertMethod, Structure, parse
from methods.modeling.shape import DecoderShape
from tests.methods.test_floor import dense_shape
from tests.methods.test_slicegpt import LLAMA_2_7B
from tests.methods.tiny import CONFIGS

NAMES = ["moefication", "g-moefication", "llama-moe", "llama-moe-v2", "cmoe"]


def llama() -> DecoderShape:
    return DecoderShape.from_config(LLAMA_2_7B)


def expert_method(name: str, **settings: str) -> Any:
    return methods.configure(name, settings)


@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 8), st.integers(0, 500))
def test_parts_are_all_neurons_as_evenly_as_can_be(shared: int, active: int, others: int, more: int) -> None:
    structure = Structure(shared, active, shared + active + others)
    width = structure.experts + more
    sizes = structure.sizes(width)
    assert sum(sizes) == width and len(sizes) == structure.experts and max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True) and structure.routed == active + others
    routed = sizes[shared:]
    assert structure.shared_neurons(width) == sum(sizes[:shared])
    assert structure.used_neurons(width) == sum(sizes[:shared]) + sum(sorted(routed, reverse=True)[:active])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("auto", (None, None)),
        ("E16", (16, None)),
        ("A4E16", (16, Structure(0, 4, 16))),
        ("S3A3E8", (8, Structure(3, 3, 8))),
        ("S0A1E1", (1, Structure(0, 1, 1))),
    ],
)
def test_structures_are_read(text: str, found: Any) -> None:
    assert parse("x", text) == found


@pytest.mark.parametrize("text", ["", "16", "E0", "S3E8", "A0E8", "S4A5E8", "A9E8", "S1A1E8x", "s1a1e8", "S-1A1E8"])
def test_other_structures_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be auto, E16.*SxAyEz"):
        expert_method("cmoe", experts=text)


@pytest.mark.parametrize("name", ["moefication", "g-moefication", "llama-moe"])
def test_where_nothing_is_shared_nothing_can_be(name: str) -> None:
    with pytest.raises(UserError, match="no expert is shared.*experts=A3E8"):
        expert_method(name, experts="S3A3E8")
    with pytest.raises(UserError, match="mode=vanilla shares no expert"):
        expert_method("llama-moe-v2", mode="vanilla", experts="S1A1E8")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.6, 0.5])
def test_the_nearest_of_all_sizes_is_taken(name: str, ratio: float) -> None:
    method, shape, budget = expert_method(name), llama(), Budget(ratio=ratio)
    structure, prediction = method.structure(shape, budget), method.predict(shape, budget)
    sizes = {}
    for n in range(1, structure.experts + 1):
        other = method.divided(n, structure.experts)
        assert other.shared + other.active == n and 1 <= other.active <= other.routed
        sizes[n] = method._size(shape, other)[0]
    best = min(sizes.values(), key=lambda size: abs(size / shape.total - ratio))
    assert prediction.active_total == best
    assert abs(best / shape.total - ratio) <= 0.01
    smaller = structure.experts // 2
    if smaller >= method.default_experts(shape):  # a coarser grid would have missed
        others = [method._size(shape, method.divided(n, smaller))[0] for n in range(1, smaller + 1)]
        assert min(abs(size / shape.total - ratio) for size in others) > 0.01
    assert all(a < b for a, b in pairwise(sizes.values()))


def test_published_structures() -> None:
    shape = llama()
    for name, experts in (("cmoe", 8), ("llama-moe", 16), ("llama-moe-v2", 8), ("g-moefication", 64)):
        assert expert_method(name).default_experts(shape) == experts
    assert expert_method("moefication").default_experts(shape) == 344  # of 32 neurons
    assert str(expert_method("cmoe").divided(6, 8)) == "S3A3E8"
    assert str(expert_method("llama-moe-v2").divided(2, 8)) == "S1A1E8"
    assert expert_method("llama-moe-v2").blocks(shape) == range(1, 31)
    assert expert_method("llama-moe-v2", mode="vanilla").blocks(shape) == range(32)


def test_routing_of_llama_2_7b_in_numbers() -> None:
    """S3A3E8 keeps 75 % of the neurons, which is 0.84 of the model."""
    shape = llama()
    d, F, R = 4096, 11008, 5
    assert expert_method("cmoe").added(shape, Structure(3, 3, 8)) == 2 * R * d + R
    assert expert_method("llama-moe").added(shape, Structure(0, 4, 16)) == 16 * d + 256
    assert expert_method("llama-moe", router="linear").added(shape, Structure(0, 4, 16)) == 16 * d
    assert expert_method("llama-moe-v2").added(shape, Structure(1, 1, 8)) == 7 * d
    assert expert_method("moefication").added(shape, Structure(0, 20, 96)) == 96 * d + 96 * 96
    assert expert_method("g-moefication").added(shape, Structure(0, 20, 96)) == 96 * d + 96 * 96 + 21 * d
    assert expert_method("moefication", router="similarity").added(shape, Structure(0, 20, 96)) == 96 * d
    assert expert_method("g-moefication", router="similarity").added(shape, Structure(0, 20, 96)) == 96 * d + 21 * d
    assert expert_method("g-moefication", router="ground-truth").added(shape, Structure(0, 20, 96)) == 21 * d
    method, budget = expert_method("cmoe", experts="S3A3E8"), Budget(ratio=0.84)
    expected = shape.total - 32 * (3 * d * F // 4 - (2 * R * d + R))
    assert method.predict(shape, budget).active_total == expected
    assert expected / shape.total == pytest.approx(0.84, abs=0.005)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", CONFIGS)
def test_small_models_get_fewer_experts(name: str, model: str) -> None:
    shape = dense_shape(model)
    structure = expert_method(name).structure(shape, Budget(ratio=0.8, basis="block"))
    assert min(structure.sizes(shape.mlp_width)) >= 8


@pytest.mark.parametrize("name", ["moefication", "g-moefication"])
def test_the_ground_truth_spares_a_share_of_down_only(name: str) -> None:
    """Gate and up of all neurons are read: a third of what other routers spare, in steps a third as large."""
    shape = llama()
    oracle, other = expert_method(name, router="ground-truth"), expert_method(name, router="similarity")
    structure = Structure(0, 10, 64)
    spared, usual = (
        shape.total + shape.layers * method.added(shape, structure) - method._size(shape, structure)[0]
        for method in (oracle, other)
    )
    assert 3 * spared == usual == shape.layers * 3 * shape.hidden * 54 * shape.mlp_width // 64
    budget = Budget(ratio=0.8)
    assert oracle.predict(shape, budget).active_total / shape.total == pytest.approx(0.8, abs=0.005)
    two = [expert_method(name, router=router, experts="E8") for router in ("ground-truth", "similarity")]
    steps = [method.predict(shape, Budget(ratio=0.8, tolerance=1)).grid_step for method in two]
    assert 3 * steps[0] == pytest.approx(steps[1])
    with pytest.raises(UserError, match=rf"0.5 is not reachable for {name}.*keep 0\.7\d+.*Use --ratios 0\.7"):
        oracle.predict(shape, Budget(ratio=0.5))


def test_impossible_ratios_are_refused_with_what_is_possible() -> None:
    shape = llama()
    for name in NAMES:
        with pytest.raises(UserError, match=f"not reachable for {name}.*Use --ratios 0.[34]"):
            expert_method(name).predict(shape, Budget(ratio=0.2))
    with pytest.raises(UserError, match=r"not reachable for cmoe.*Use --ratios 0\.8"):
        expert_method("cmoe", experts="S3A3E8").predict(shape, Budget(ratio=0.5))
    with pytest.raises(UserError, match="asks for 20000 experts.*has 11008"):
        expert_method("cmoe", experts="E20000").predict(shape, Budget(ratio=0.5))
    with pytest.raises(UserError, match="leaves all 2 blocks"):
        shallow = DecoderShape.from_config({**LLAMA_2_7B, "num_hidden_layers": 2})
        expert_method("llama-moe-v2").predict(shallow, Budget(ratio=0.5))


@pytest.mark.parametrize(
    ("name", "text", "real"),
    [("cmoe", "S3A3E8", 0.8396), ("llama-moe-v2", "S4A1E8", 0.7742), ("llama-moe", "A4E16", 0.5185)],
)
def test_a_whole_structure_is_for_its_own_ratio(name: str, text: str, real: float) -> None:
    """Within the tolerance of the run, and not that of a grid of which it is a point."""
    method, shape = expert_method(name, experts=text), llama()
    for ratio in (real, real - 0.0095, real + 0.0095):
        found = method.predict(shape, Budget(ratio=ratio))
        assert found.active_total / shape.total == pytest.approx(real, abs=6e-5) and not found.grid_step
    for ratio in (real - 0.011, real + 0.011, real - 0.06, real + 0.06):
        with pytest.raises(UserError, match=rf"not reachable for {name}.*Use --ratios {real}, or --ratio-tolerance"):
            method.predict(shape, Budget(ratio=ratio))
    method.predict(shape, Budget(ratio=real + 0.06, tolerance=0.07))
    number = expert_method(name, experts=text[text.index("E") :])
    assert number.predict(shape, Budget(ratio=real + 0.02)).grid_step > 0.03


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("cmoe", {"top": "0"}, "cmoe.top is 0"),
        ("cmoe", {"iterations": "0"}, "cmoe.iterations 0"),
        ("moefication", {"expert_neurons": "0"}, "expert_neurons is 0"),
        ("g-moefication", {"batch": "0"}, "batch=0"),
        ("moefication", {"learning_rate": "nan"}, "learning_rate=nan"),
        ("moefication", {"router": "oracle"}, "router"),
        ("g-moefication", {"split": "random"}, "split"),
        ("moefication", {"router": "similarity", "epochs": "3"}, "epochs=3 has no effect beside.*router=similarity"),
        ("g-moefication", {"router": "ground-truth", "batch": "8"}, "batch=8 has no effect.*router=ground-truth"),
        ("moefication", {"router": "ground-truth", "learning_rate": "1"}, "learning_rate=1.* has no effect"),
        ("moefication", {"router": "similarity", "tokens": "9"}, "tokens=9 has no effect.*split=parameters"),
        ("moefication", {"router": "ground-truth", "tokens": "9"}, "tokens=9 has no effect.*split=parameters"),
        ("llama-moe", {"samples": "0"}, "samples is 0"),
        ("llama-moe", {"scale": "-1"}, "scale -1"),
        ("llama-moe-v2", {"jitter": "1"}, "jitter=1"),
        ("llama-moe-v2", {"dense_ends": "-1"}, "dense_ends=-1"),
        ("llama-moe-v2", {"mode": "vanilla", "jitter": "0.2"}, "jitter=0.2 has no effect beside .*mode=vanilla"),
        ("llama-moe", {"samples": "5"}, "samples=5 has no effect beside llama-moe.split=random"),
        ("llama-moe", {"samples": "5", "split": "clustering"}, "samples=5 has no effect beside .*split=clustering"),
        ("moefication", {"expert_neurons": "4", "experts": "E16"}, "expert_neurons=4 has no effect .*experts=E16"),
        ("moefication", {"expert_neurons": "4", "experts": "A4E16"}, "expert_neurons=4 has no effect .*experts=A4E16"),
        ("moefication", {"epochs": "0", "batch": "3"}, "batch=3 has no effect beside moefication.epochs=0"),
        ("g-moefication", {"epochs": "0", "learning_rate": "1"}, "learning_rate=1.0 has no effect beside .*epochs=0"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        expert_method(name, **settings)


@pytest.mark.parametrize("router", ["similarity", "ground-truth"])
def test_settings_that_do_something_are_accepted(router: str) -> None:
    expert_method("moefication", router=router, split="coactivation", tokens="9")
    expert_method("g-moefication", router=router, tokens="9")
    expert_method("moefication", tokens="9", epochs="1", batch="3", learning_rate="1")
    expert_method("moefication", expert_neurons="4", experts="auto")
    expert_method("moefication", epochs="0", tokens="9")
    for split in ("gradient", "sharing"):
        expert_method("llama-moe", split=split, samples="5")
    expert_method("llama-moe-v2", jitter="0.2", tokens="9", samples="5", dense_ends="0")


def test_a_method_says_three_things() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(ExpertMethod):
        name = "mine"

    assert Mine.__abstractmethods__ == {"added", "convert", "default_experts"}
