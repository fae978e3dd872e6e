"""One attention forward for every family, and narrow attention, against naive references."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import flash_attention

from methods import modeling
from methods.errors import UserError
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.modeling.structures.attention import ReshapedAttention, reshape_attention
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    assert_cache_changes_nothing,
    logits,
    some_ids,
    tiny_config,
    tiny_model,
)

SMALL = {"num_hidden_layers": 2}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def layers_of(model: PreTrainedModel) -> list[modeling.DecoderLayer]:
    return modeling.Decoder(model).layers


def some_qk(shape: DecoderShape, seed: int) -> list[int]:
    """Half of the groups, at random; all of them where queries are normalised."""
    groups = shape.rope_groups
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = groups if shape.qk_norm else [groups[i] for i in order[: len(groups) // 2]]
    return [dim for group in kept for dim in group]


def some_vo(shape: DecoderShape, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(shape.head_dim, generator=generator)[: shape.head_dim // 2 + 1].tolist()


def narrow(model: PreTrainedModel, *, vo: bool = True) -> PreTrainedModel:
    """Layers narrowed differently, rebuilt from the record."""
    shape = modeling.Decoder(model).shape
    for seed, layer in enumerate(layers_of(model)):
        modeling.narrow_qk(layer, shape, some_qk(shape, seed))
        modeling.narrow_heads(layer, shape, [shape.kv_heads - 1])
        if vo:
            modeling.narrow_vo(layer, shape, torch.tensor(some_vo(shape, seed)))
    return modeling.rebuild(model, {"narrow_attention": modeling.attention_record(model)})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_with_nothing_narrowed_it_is_the_stock_module(name: str, implementation: str) -> None:
    model = tiny_model(name, dtype=torch.float32, **SMALL)
    model.set_attn_implementation(implementation)
    expected = logits(model)
    for layer in layers_of(model):
        stock = type(layer.attention)
        attention = reshape_attention(layer)
        assert isinstance(attention, stock) and type(attention).__name__ == stock.__name__
        assert reshape_attention(layer) is attention
    assert logits(model).equal(expected)


@torch.no_grad()
def zero_dropped(layer: modeling.DecoderLayer, shape: DecoderShape, qk: list[int], vo: list[int], kv_head: int) -> None:
    """What narrowing amounts to, in a dense layer."""
    query, key, value = layer.attention_inputs
    groups = shape.heads // shape.kv_heads
    for linear, dims in ((query, qk), (key, qk), (value, vo)):
        dropped = [dim for dim in range(shape.head_dim) if dim not in dims]
        for tensor in (linear.weight, linear.bias):
            if tensor is not None and dropped:
                tensor.view(-1, shape.head_dim, *tensor.shape[1:])[:, dropped] = 0
    output = layer.attention_output.weight.view(shape.hidden, shape.kv_heads, groups * shape.head_dim)
    output[:, [j for j in range(shape.kv_heads) if j != kv_head]] = 0


@pytest.mark.parametrize("name", CONFIGS)
def test_narrowing_equals_zeroing_what_is_dropped(name: str) -> None:
    model = tiny_model(name, **SMALL)
    shape = modeling.Decoder(model).shape
    zeroed = copy.deepcopy(model)
    for seed, layer in enumerate(layers_of(zeroed)):
        zero_dropped(layer, shape, some_qk(shape, seed), some_vo(shape, seed), shape.kv_heads - 1)
    narrowed = narrow(model)
    torch.testing.assert_close(logits(narrowed), logits(zeroed), **CLOSE)
    for either in (narrowed, zeroed):
        either.set_attn_implementation("eager")  # its softmax rounds to fp32
    torch.testing.assert_close(logits(narrowed), logits(zeroed), rtol=1e-5, atol=1e-5)
    count, heads, vo = footprint(narrowed), shape.heads // shape.kv_heads, shape.head_dim // 2 + 1
    rows = [(heads + 1) * len(some_qk(shape, seed)) + vo for seed in range(2)]
    biases = sum(rows) * shape.qkv_bias + 2 * shape.hidden * shape.output_bias
    attention = (sum(rows) + 2 * heads * vo) * shape.hidden + biases
    assert count.active_block == shape.block - 2 * (shape.attention - shape.head_norms) + attention


def rotated(x_BTHh: Tensor, rotary: int, theta: float) -> Tensor:
    """Rotary position embedding, pair by pair."""
    out, positions = x_BTHh.clone(), torch.arange(x_BTHh.shape[1]).double()[:, None]
    for i in range(rotary // 2):
        angle = positions * torch.tensor(1 / theta ** (2 * i / rotary), dtype=torch.float32).double()
        angle = angle.float()  # as transformers rounds it
        first, second, cos, sin = x_BTHh[..., i], x_BTHh[..., i + rotary // 2], angle.cos(), angle.sin()
        out[..., i], out[..., i + rotary // 2] = first * cos - second * sin, second * cos + first * sin
    return out


@torch.no_grad()
def naive_attention(
    layer: modeling.DecoderLayer, shape: DecoderShape, x_BTD: Tensor, kept_J: list[list[int]]
) -> Tensor:
    """Dense attention with queries and keys masked *after* the rotation, head by head."""
    query, key, value = (linear(x_BTD).unflatten(-1, (-1, shape.head_dim)) for linear in layer.attention_inputs)
    theta = (getattr(layer.attention.config, "rope_parameters", None) or {}).get("rope_theta", 1.0)
    query, key = rotated(query, shape.rotary, theta), rotated(key, shape.rotary, theta)
    causal = torch.ones(x_BTD.shape[1], x_BTD.shape[1]).tril().bool()
    attended = []
    for head in range(shape.heads):
        j = head // (shape.heads // shape.kv_heads)
        scores = query[:, :, head, kept_J[j]] @ key[:, :, j, kept_J[j]].mT / math.sqrt(shape.head_dim)
        attended.append(scores.masked_fill(~causal, -math.inf).softmax(-1) @ value[:, :, j])
    return layer.attention_output(torch.cat(attended, -1))


def some_qk_per_head(shape: DecoderShape) -> list[list[int]]:
    """Half of the pairs and half of the other dimensions, other ones for every key head."""
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(shape.kv_heads):
        pairs = torch.randperm(shape.rotary // 2, generator=generator)[: shape.rotary // 4].tolist()
        singles = torch.randperm(shape.head_dim - shape.rotary, generator=generator)[: (shape.head_dim + 1) // 4]
        kept.append([*pairs, *(pair + shape.rotary // 2 for pair in pairs), *(singles + shape.rotary).tolist()])
    return kept


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen3"])
def test_narrow_queries_equal_masking_after_the_rotation(name: str, per_head: bool) -> None:
    """Which needs the frequencies of the kept dimensions and the scale of the whole head."""
    model = tiny_model(name, **SMALL)
    layer, shape = layers_of(model)[0], modeling.Decoder(model).shape
    x = torch.randn(2, 9, shape.hidden, dtype=torch.float64)
    kept_J = some_qk_per_head(shape) if per_head else [some_qk(shape, 5)] * shape.kv_heads
    expected = naive_attention(layer, shape, x, kept_J)
    angles = None if shape.rotary == 0 else model.model.rotary_emb(x, torch.arange(9)[None])  # type: ignore[operator]
    modeling.narrow_qk(layer, shape, torch.tensor(kept_J) if per_head else kept_J[0])
    actual = layer.attention(hidden_states=x, position_embeddings=angles, attention_mask=None)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # the stock angles are rounded to fp32


def one_width_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: object, softmax_scale: float, **__: object
) -> Tensor:
    """Flash attention as far as shapes go, [B, T, heads, width]: all three of one width."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    scores = torch.einsum("bthw,bshw->bhts", q, k).mul(softmax_scale).masked_fill(future, -math.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


@pytest.mark.parametrize("narrow_values", [False, True])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_flash_kernels_get_one_width(name: str, narrow_values: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries narrower than values are padded here, values narrower than queries by transformers."""
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", one_width_kernel)
    model = tiny_model(name)
    shape = modeling.Decoder(model).shape
    for layer in layers_of(model):
        if narrow_values or name == "qwen3":
            modeling.narrow_vo(layer, shape, range(3))
        else:
            modeling.narrow_qk(layer, shape, [dim for group in shape.rope_groups[:2] for dim in group])
    expected = logits(model)
    model.config._attn_implementation = "flash_attention_2"  # set_attn_implementation would want the package
    torch.testing.assert_close(logits(model), expected)


def narrow_per_head(model: PreTrainedModel) -> PreTrainedModel:
    """Every key head narrowed in its own way, biases of values folded, one layer left alone; rebuilt."""
    shape = modeling.Decoder(model).shape
    layer = layers_of(model)[1]
    if not shape.qk_norm:
        modeling.narrow_qk(layer, shape, torch.tensor(some_qk_per_head(shape)))
    modeling.fold_value_bias(layer)
    modeling.narrow_vo(layer, shape, some_vo(shape, 0))
    return modeling.rebuild(model, {"narrow_attention": modeling.attention_record(model)})


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_of_their_own_and_folded_biases_come_back_from_disk(name: str, tmp_path: Path) -> None:
    model = narrow_per_head(tiny_model(name, dtype=torch.float32, **SMALL))
    shape = DecoderShape.from_config(tiny_config(name, **SMALL).to_dict())
    first, second = model.config.compression["structures"]["narrow_attention"]["layers"]
    assert first is None and (second["per_head"], second["folded"]) == (not shape.qk_norm, shape.qkv_bias)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert logits(loaded).equal(logits(model))
    assert_cache_changes_nothing(loaded)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folded_bias_is_the_same_function(name: str) -> None:
    model = tiny_model(name, **SMALL)
    expected, dense = logits(model), modeling.Decoder(model).shape
    for layer in layers_of(model):
        modeling.fold_value_bias(layer)
        assert layer.attention_inputs[2].bias is None
    model = modeling.rebuild(model, {"narrow_attention": modeling.attention_record(model)})
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    added = dense.hidden * (dense.qkv_bias and not dense.output_bias) - dense.kv_width * dense.qkv_bias
    assert footprint(model).active_total == dense.total + 2 * added


def test_heads_with_dimensions_of_their_own_can_go() -> None:
    model = tiny_model("llama-gqa", **SMALL)
    layer, shape = layers_of(model)[0], modeling.Decoder(model).shape
    x, kept_J = torch.randn(2, 9, shape.hidden, dtype=torch.float64), some_qk_per_head(shape)
    angles = model.model.rotary_emb(x, torch.arange(9)[None])  # type: ignore[operator]
    layer.attention_output.weight.data[:, :16] = 0  # the readers of the head that goes
    expected = naive_attention(layer, shape, x, kept_J)
    modeling.narrow_qk(layer, shape, torch.tensor(kept_J))
    modeling.narrow_heads(layer, shape, [1])
    actual = layer.attention(hidden_states=x, position_embeddings=angles, attention_mask=None)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_is_as_narrow_as_the_heads(name: str) -> None:
    model = tiny_model(name, **SMALL)
    shape = modeling.Decoder(model).shape
    cache = narrow(model)(input_ids=some_ids(2, 7), use_cache=True).past_key_values
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 7, len(some_qk(shape, i))) for i in (0, 1)]
    assert [tuple(layer.values.shape) for layer in cache.layers] == [(2, 1, 7, shape.head_dim // 2 + 1)] * 2


def test_what_cannot_be_narrowed_is_refused() -> None:
    model = tiny_model("phi", **SMALL)
    layer, shape = layers_of(model)[0], modeling.Decoder(model).shape
    for dims, message in [([0, 2, 3], r"\(1, 3\) of a head.*only \[3\]"), ([], "at least one"), ([0, 8], "between")]:
        with pytest.raises(UserError, match=message):
            modeling.narrow_qk(layer, shape, dims)
    with pytest.raises(UserError, match="each once"):
        modeling.narrow_heads(layer, shape, [1, 1])
    for rows, message in [([[0, 2], [4, 5], [4, 5], [4, 5]], "different numbers of rotary"), ([[4]], "of 1 heads")]:
        with pytest.raises(UserError, match=message):
            modeling.narrow_qk(layer, shape, torch.tensor(rows))
    modeling.narrow_qk(layer, shape, [5])
    with pytest.raises(UserError, match="queries and keys of this layer are 1 wide already, of 8"):
        modeling.narrow_qk(layer, shape, [6])
    modeling.narrow_vo(layer, shape, [1, 2])
    with pytest.raises(UserError, match="values of this layer are 2 wide already"):
        modeling.narrow_vo(layer, shape, [1])
    with pytest.raises(UserError, match="values of this layer are 2 wide: a selector of 8 scores that keeps 1"):
        modeling.convert_values(layer, modeling.ValueSelector(32, 4, 8), 1, modeling.ValueRule())
    modeling.convert_values(layers_of(model)[1], modeling.ValueSelector(32, 4, 8), 1, modeling.ValueRule())
    with pytest.raises(UserError, match="chosen per token already"):
        modeling.narrow_vo(layers_of(model)[1], shape, [1])
    with pytest.raises(UserError, match="Fold their bias first"):
        modeling.fold_value_bias(layers_of(model)[1])
    normed = tiny_model("qwen3", **SMALL)
    with pytest.raises(UserError, match=r"qwen3 model normalises .* all 16 dimensions of a head.*asked: 2"):
        modeling.narrow_qk(layers_of(normed)[0], modeling.Decoder(normed).shape, [1, 9])
    with pytest.raises(UserError, match="no layer of this model chooses"):
        modeling.set_value_cache(normed, "compact")


def test_it_composes_with_the_other_structures() -> None:
    """Widths come from the modules: an attention narrowed twice by different structures keeps the function."""
    model = tiny_model("qwen2", **SMALL)
    shape = modeling.Decoder(model).shape
    zeroed = copy.deepcopy(model)
    every = list(range(shape.head_dim))
    for layer in layers_of(zeroed):
        zero_dropped(layer, shape, every, every, 0)
        with torch.no_grad():
            layer.mlp_output.weight[:, 8:] = 0
    for layer in layers_of(model):
        modeling.narrow_mlp(layer, torch.arange(8))
    model = modeling.rebuild(model, {"narrow_mlp": {"layers": [8, 8]}})
    for layer in layers_of(model):
        modeling.narrow_heads(layer, shape, [0])
    model = modeling.rebuild(model, {"narrow_attention": modeling.attention_record(model)})
    torch.testing.assert_close(logits(model), logits(zeroed), **CLOSE)
    assert list(model.config.compression["structures"]) == ["narrow_mlp", "narrow_attention"]
    assert all(isinstance(layer.attention, ReshapedAttention) for layer in layers_of(model))
