"""Shares of blocks and the integers that come of them, against brute counts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.allocation import channel_size
from methods.base import Budget
from methods.modeling.shape import DecoderShape
from methods.module_widths import (
    Widths,
    block_size,
    mean_sparsity,
    model_size,
    removable,
    sparsities,
    spread,
    whole,
    widths,
)
from tests.methods.test_slicegpt import LLAMA_2_7B
from tests.methods.tiny import CONFIGS, tiny_config

influences = st.lists(st.floats(0, 2), min_size=1, max_size=12)


@given(influence=influences, mean=st.floats(0, 0.8), epsilon=st.floats(1e-3, 1e3), most=st.floats(0.8, 0.99))
def test_shares_have_their_mean_and_stay_in_bounds(
    influence: list[float], mean: float, epsilon: float, most: float
) -> None:
    shares = sparsities(influence, mean, epsilon, most)
    assert sum(shares) / len(shares) == pytest.approx(mean, abs=1e-9)
    assert all(0 <= share <= most for share in shares)
    for i, one in enumerate(influence):
        for j, other in enumerate(influence):
            assert one > other or shares[i] >= shares[j] - 1e-12


@given(influence=influences, mean=st.floats(0, 0.8))
def test_shares_follow_the_softmax_and_equal_blocks_are_treated_alike(influence: list[float], mean: float) -> None:
    assert sparsities([0.3] * 5, mean, 0.1, 0.8) == pytest.approx([mean] * 5)
    assert sparsities(influence, mean, math.inf, 0.8) == pytest.approx([mean] * len(influence))
    powers = [math.exp(-one / 0.7) for one in influence]
    published = [len(influence) * mean * power / sum(powers) for power in powers]
    if max(published) <= 0.8:
        assert sparsities(influence, mean, 0.7, 0.8) == pytest.approx(published)


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=8), share=st.floats(0, 1))
def test_spreading_equals_handing_on_the_excess_until_none_is_left(weights: list[float], share: float) -> None:
    total = share * len(weights)
    got = [total * weight / sum(weights) for weight in weights]
    for _ in range(500):  # the published loop, which only converges
        excess = sum(max(0, one - 1) for one in got)
        room = sum(one for one in got if one < 1)
        if excess < 1e-12 or room == 0:
            break
        got = [1 if one >= 1 else one + excess * one / room for one in got]
    assert spread(weights, total, 1.0) == pytest.approx(got, abs=1e-6)


@given(numbers=st.lists(st.integers(0, 4000), min_size=1, max_size=9))
def test_whole_numbers_keep_the_sum_and_are_near(numbers: list[int]) -> None:
    parts = [number / 7 for number in numbers]
    total = round(sum(parts))
    rounded = whole(parts, total) if total >= sum(math.floor(part + 1e-9) for part in parts) else None
    assert rounded is not None and sum(rounded) == total
    assert all(abs(one - part) < 1 + 1e-6 for one, part in zip(rounded, parts, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
@given(ratio=st.floats(0.45, 1), influence=st.lists(st.floats(0, 0.3), min_size=4, max_size=4))
def test_the_size_is_off_by_half_a_channel_at_most(name: str, ratio: float, influence: list[float]) -> None:
    shape, budget = DecoderShape.from_config(tiny_config(name).to_dict()), Budget(ratio=ratio, basis="block")
    shares = sparsities(influence, mean_sparsity(shape, budget), 0.2, 0.8)
    kept = widths(shape, budget, shares)
    total, block = model_size(shape, kept)
    assert shape.total - total == shape.block - block
    off = abs(block - round(ratio * shape.block))
    channels = [one.mlp for one in kept]
    if 4 < sum(channels) < 4 * shape.mlp_width:  # neither end is reached
        assert off <= channel_size(shape) / 2
    for one, share in zip(kept, shares, strict=True):
        pair = 2 if shape.rotary == shape.head_dim else 1
        near = max(pair, (1 - share) * shape.head_dim)
        assert one.qk % pair == 0 and (shape.qk_norm or abs(one.qk - near) <= pair / 2)
        assert abs(one.vo - max(1, (1 - share) * shape.head_dim)) <= 0.5 and 1 <= one.mlp <= shape.mlp_width


def test_nothing_removed_is_the_dense_size_and_llama_has_round_numbers() -> None:
    shape = DecoderShape.from_config(LLAMA_2_7B)
    dense = Widths(128, 128, 11008)
    assert block_size(shape, dense) == shape.layer and model_size(shape, [dense] * 32) == (shape.total, shape.block)
    assert removable(shape) == 4 * 4096**2 + 3 * 4096 * 11008
    budget = Budget(ratio=0.7)
    assert mean_sparsity(shape, budget) == pytest.approx(0.3 * shape.total / (32 * removable(shape)))
    kept = widths(shape, budget, [mean_sparsity(shape, budget)] * 32)
    assert {one.qk for one in kept} == {88} and {one.vo for one in kept} == {88}
    assert abs(model_size(shape, kept)[0] - 0.7 * shape.total) <= channel_size(shape) / 2
