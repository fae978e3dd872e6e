"""Parameter accounting: every worked example of the paper's models, exactly."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from methods.base import Budget
from methods.modeling.shape import DecoderShape
from methods.tomoe import ToMoE
from methods.tomoe.accounting import Added, Kept, active_block, keep_fraction, layer_weights, prunable
from methods.tomoe.network import ToMoENetwork

LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 4096}
QWEN: dict[str, Any] = {"model_type": "qwen2", "max_position_embeddings": 4096}
PHI: dict[str, Any] = {"model_type": "phi", "max_position_embeddings": 2048, "partial_rotary_factor": 0.4}


def shape(
    base: dict[str, Any], L: int, d: int, heads: int, kv: int, m: int, V: int, tied: bool = False
) -> DecoderShape:
    sizes = {"num_hidden_layers": L, "hidden_size": d, "num_attention_heads": heads, "num_key_value_heads": kv}
    return DecoderShape.from_config(
        base | sizes | {"intermediate_size": m, "vocab_size": V, "tie_word_embeddings": tied}
    )


SHAPES = {
    "llama2-7b": shape(LLAMA, 32, 4096, 32, 32, 11008, 32000),
    "llama2-13b": shape(LLAMA, 40, 5120, 40, 40, 13824, 32000),
    "llama3-8b": shape(LLAMA, 32, 4096, 32, 8, 14336, 128256),
    "qwen2.5-7b": shape(QWEN, 28, 3584, 28, 4, 18944, 152064),
    "qwen2.5-14b": shape(QWEN, 48, 5120, 40, 8, 13824, 152064),
    "phi-2": shape(PHI, 32, 2560, 32, 32, 10240, 51200),
}
TOTALS = {
    "llama2-7b": (6_476_005_376, 6_738_415_616),
    "llama2-13b": (12_687_769_600, 13_015_864_320),
    "llama3-8b": (6_979_321_856, 8_030_261_248),
    "qwen2.5-7b": (6_525_288_448, 7_615_616_512),
    "qwen2.5-14b": (13_212_057_600, 14_770_033_664),
    "phi-2": (2_516_582_400, 2_779_683_840),
}
FRACTIONS = {
    "llama2-7b": (0.3757, 0.4797, 0.5838, 0.6878, 0.5195),
    "llama2-13b": (0.3845, 0.4871, 0.5897, 0.6922, 0.5126),
    "llama3-8b": (0.3097, 0.4247, 0.5398, 0.6548, 0.5654),
    "qwen2.5-7b": (0.2997, 0.4165, 0.5332, 0.6499, 0.5716),
    "qwen2.5-14b": (0.3292, 0.4410, 0.5528, 0.6646, 0.5527),
    "phi-2": (0.3373, 0.4477, 0.5582, 0.6686, 0.5473),
}


@pytest.mark.parametrize("name", SHAPES)
def test_prunable_and_all_weights(name: str) -> None:
    assert (prunable(SHAPES[name]), SHAPES[name].total) == TOTALS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_fraction_to_keep_for_a_share_of_all_weights(name: str) -> None:
    *fractions, reached = FRACTIONS[name]
    for ratio, expected in zip((0.4, 0.5, 0.6, 0.7), fractions, strict=True):
        assert keep_fraction(SHAPES[name], Budget(ratio=ratio)) == pytest.approx(expected, abs=5e-5)
    total, all_weights = TOTALS[name]
    assert (all_weights - total + total // 2) / all_weights == pytest.approx(reached, abs=5e-5)


def test_half_of_llama2_7b() -> None:
    llama = SHAPES["llama2-7b"]
    half = llama.layers * layer_weights(Kept(64, 64, 64, llama.mlp_width // 2), llama)
    assert half == 3_238_002_688
    assert (llama.total - prunable(llama) + half) / llama.total == pytest.approx(0.5195, abs=5e-5)


@pytest.mark.parametrize(
    "name, millions, share",
    [
        ("llama2-7b", 18.35, 0.0027),
        ("llama2-13b", 28.5, 0.0022),
        ("llama3-8b", 18.4, 0.0023),
        ("qwen2.5-7b", 14.1, 0.0019),
        ("qwen2.5-14b", 34.2, 0.0023),
        ("phi-2", 11.5, 0.0041),
    ],
)
def test_added_parameters(name: str, millions: float, share: float) -> None:
    """The paper's formula leaves out what a LayerNorm and the bias that holds the mean embedding add: 3 e per layer."""
    model = SHAPES[name]
    added = model.layers * (Added(experts=8, embedding=128).count(model) - 3 * 128)
    assert added / 1e6 == pytest.approx(millions, abs=0.06)
    assert added / model.total == pytest.approx(share, abs=6e-5)


def test_added_parameters_of_llama2_7b_exactly() -> None:
    llama = SHAPES["llama2-7b"]
    counted = llama.layers * Added(experts=8, embedding=128).count(llama)
    assert counted == (16_777_216 + 524_288 + 1_048_576) + 32 * (256 + 128)
    assert Added(experts=1, embedding=0).count(llama) == 0


@pytest.mark.parametrize(
    "name, millions",
    [
        ("llama2-7b", 63.755),
        ("llama2-13b", 99.7),
        ("llama3-8b", 77.4),
        ("qwen2.5-7b", 82.3),
        ("qwen2.5-14b", 119.6),
        ("phi-2", 53.73),  # the paper's about 53.6 has h / 2 query/key groups; most of Phi's dimensions do not rotate
    ],
)
def test_trained_parameters(name: str, millions: float) -> None:
    with FakeTensorMode():
        network = ToMoENetwork(SHAPES[name], ToMoE(experts=8), 128, torch.Generator())
    assert sum(parameter.numel() for parameter in network.hypernetwork.parameters()) == 37_632
    trained = sum(parameter.numel() for parameter in network.trained().values())
    assert trained / 1e6 == pytest.approx(millions, abs=0.06)


def test_everything_kept_is_the_dense_model() -> None:
    for model in SHAPES.values():
        widths = [Kept(model.head_dim, model.head_dim, model.head_dim, model.mlp_width)] * model.layers
        assert active_block(model, widths, Added(experts=1, embedding=0)) == model.block
