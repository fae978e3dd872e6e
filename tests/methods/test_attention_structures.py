"""Narrow attention and values chosen per token, against naive references on every family."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.errors import UserError
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.modeling.structures import topk_cache, topk_products, topk_values
from methods.modeling.structures.attention import ReshapedAttention, reshape_attention
from methods.modeling.structures.topk_choice import choose
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, assert_cache_changes_nothing, logits, some_ids, tiny_model

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


def narrow(model: PreTrainedModel, *, heads: bool = True, vo: bool = True) -> PreTrainedModel:
    """Layers narrowed differently, rebuilt from the record."""
    shape = modeling.Decoder(model).shape
    for seed, layer in enumerate(layers_of(model)):
        modeling.narrow_qk(layer, shape, some_qk(shape, seed))
        if heads:
            modeling.narrow_heads(layer, shape, [shape.kv_heads - 1])
        if vo:
            modeling.narrow_vo(layer, shape, torch.tensor(some_vo(shape, seed)))
    return modeling.rebuild(model, {"narrow_attention": modeling.attention_record(model)})


def choosing(model: PreTrainedModel, kept: int = 3, **rule: Any) -> PreTrainedModel:
    """All layers but the first with a random selector, rebuilt from the record."""
    for layer in layers_of(model)[1:]:
        attention = reshape_attention(layer)
        selector = modeling.ValueSelector(attention.value.in_features, 5, attention.vo_width)
        modeling.convert_values(layer, selector, kept, modeling.ValueRule(**rule))
    records = {"narrow_attention": modeling.attention_record(model), "topk_values": modeling.value_record(model)}
    return modeling.rebuild(model, records)  # pyright: ignore[reportArgumentType]


def both(name: str, dtype: torch.dtype = torch.float64, **rule: Any) -> PreTrainedModel:
    """A narrowed model whose tokens choose values."""
    model = tiny_model(name, dtype=dtype, **SMALL)
    return choosing(narrow(model, vo=False), **rule)


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
def naive_attention(layer: modeling.DecoderLayer, shape: DecoderShape, x_BTD: Tensor, kept: list[int]) -> Tensor:
    """Dense attention with queries and keys masked *after* the rotation, head by head."""
    query, key, value = (linear(x_BTD).unflatten(-1, (-1, shape.head_dim)) for linear in layer.attention_inputs)
    theta = (getattr(layer.attention.config, "rope_parameters", None) or {}).get("rope_theta", 1.0)
    query, key = rotated(query, shape.rotary, theta), rotated(key, shape.rotary, theta)
    causal = torch.ones(x_BTD.shape[1], x_BTD.shape[1]).tril().bool()
    attended = []
    for head in range(shape.heads):
        j = head // (shape.heads // shape.kv_heads)
        scores = query[:, :, head, kept] @ key[:, :, j, kept].mT / math.sqrt(shape.head_dim)
        attended.append(scores.masked_fill(~causal, -math.inf).softmax(-1) @ value[:, :, j])
    return layer.attention_output(torch.cat(attended, -1))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen3"])
def test_narrow_queries_equal_masking_after_the_rotation(name: str) -> None:
    """Which needs the frequencies of the kept dimensions and the scale of the whole head."""
    model = tiny_model(name, **SMALL)
    layer, shape = layers_of(model)[0], modeling.Decoder(model).shape
    x, kept = torch.randn(2, 9, shape.hidden, dtype=torch.float64), some_qk(shape, 5)
    expected = naive_attention(layer, shape, x, kept)
    angles = None if shape.rotary == 0 else model.model.rotary_emb(x, torch.arange(9)[None])  # type: ignore[operator]
    modeling.narrow_qk(layer, shape, kept)
    actual = layer.attention(hidden_states=x, position_embeddings=angles, attention_mask=None)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # the stock angles are rounded to fp32


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
    normed = tiny_model("qwen3", **SMALL)
    with pytest.raises(UserError, match=r"qwen3 model normalises .* all 16 dimensions of a head.*asked: 2"):
        modeling.narrow_qk(layers_of(normed)[0], modeling.Decoder(normed).shape, [1, 9])
    with pytest.raises(UserError, match="no layer of this model chooses"):
        modeling.set_value_cache(normed, "compact")


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.lists(st.integers(-2, 2), min_size=8, max_size=8), min_size=1, max_size=4))
def test_choices_by_the_rules(kept: int, rows: list[list[int]]) -> None:
    """Ties included: the scores are small integers."""
    scores = torch.tensor(rows, dtype=torch.float32)[None]
    exact = choose(scores, kept, modeling.ValueRule()).mask(8)[0].tolist()
    cap = choose(scores, kept, modeling.ValueRule(rule="cap", threshold=0.0)).mask(8)[0].tolist()
    for row, exact_row, cap_row in zip(rows, exact, cap, strict=True):
        ranked = sorted(range(8), key=lambda i: (-row[i], i))[:kept]
        assert exact_row == [float(i in ranked) for i in range(8)]
        assert cap_row == [float(i == ranked[0] or (i in ranked and row[i] > 0)) for i in range(8)]


def mask_by_hooks(
    model: PreTrainedModel, choosers: PreTrainedModel, mask_of: Callable[[Tensor], Tensor], side: str
) -> None:
    """Make a dense model do what the layers of `choosers` do, from outside of its stock modules."""
    for layer, chooser in list(zip(layers_of(model), layers_of(choosers), strict=True))[1:]:
        selector, state = chooser.attention.selector, {}

        def before(module: Any, args: Any, kwargs: Any, selector: Any = selector, state: dict = state) -> None:
            x = kwargs["hidden_states"]
            inner = x @ selector.project.weight.T + selector.project.bias
            inner = (inner - inner.mean(-1, keepdim=True)) / (inner.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            inner = inner * selector.norm.weight + selector.norm.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            state["mask"] = mask_of(inner @ selector.score.weight.T)

        def masked(tensor: Tensor, state: dict = state) -> Tensor:
            return tensor * state["mask"].repeat(1, 1, tensor.shape[-1] // state["mask"].shape[-1])

        layer.attention.register_forward_pre_hook(before, with_kwargs=True)
        if side != "o_only":
            layer.attention_inputs[2].register_forward_hook(lambda m, a, output, masked=masked: masked(output))
        if side != "v_only":
            layer.attention_output.register_forward_pre_hook(lambda m, args, masked=masked: masked(args[0]))


def naive_mask(rule: str, kept: int = 3) -> Callable[[Tensor], Tensor]:
    def mask(scores: Tensor) -> Tensor:
        last = scores.sort(-1).values[..., -kept, None]
        if rule == "exact":
            return (scores >= last).double()
        best = scores == scores.max(-1, keepdim=True).values
        return (((scores >= last) & (scores > 0)) | best).double()

    return mask


@pytest.mark.parametrize("side", ["v_and_o", "v_only", "o_only"])
@pytest.mark.parametrize("rule", ["exact", "cap"])
@pytest.mark.parametrize("name", [*ONE_PER_FAMILY, "llama-mqa"])
def test_chosen_values_equal_masks_outside_the_stock_module(name: str, rule: str, side: str) -> None:
    dense = tiny_model(name, **SMALL)
    chosen = choosing(copy.deepcopy(dense), rule=rule, mask=side, threshold=0.0)
    before = logits(dense)
    mask_by_hooks(dense, chosen, naive_mask(rule), side)
    torch.testing.assert_close(logits(chosen), logits(dense), **CLOSE)
    assert not torch.allclose(logits(chosen), before, rtol=1e-3)


@torch.no_grad()
def stepwise(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, prompt: int = 4) -> Tensor:
    """Logits of a prompt and then of one token at a time, through a cache."""
    cache, parts, start = None, [], 0
    for end in range(prompt, ids.shape[1] + 1):
        seen = None if mask is None else mask[:, :end]
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        inputs = {"input_ids": ids[:, start:end], "attention_mask": seen, "position_ids": positions}
        output = model(**inputs, past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, end
        parts.append(output.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("cache", ["zeros", "compact"])
@pytest.mark.parametrize("rule", ["exact", "cap"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_decoding_step_by_step_equals_one_pass(name: str, rule: str, cache: str) -> None:
    """Also where a sequence is padded on the left: there it equals the sequence alone."""
    model = both(name, rule=rule, cache=cache, threshold=0.0)
    ids = some_ids(2, 9)
    torch.testing.assert_close(stepwise(model, ids), logits(model, ids), **CLOSE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = stepwise(model, ids, mask)
    torch.testing.assert_close(padded[:1, 3:], logits(model, ids[:1, 3:]), **CLOSE)
    torch.testing.assert_close(padded[1:], logits(model, ids[1:]), **CLOSE)


@pytest.mark.parametrize("cache", ["zeros", "compact"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_saved_loaded_and_generated_from(name: str, cache: str, tmp_path: Path) -> None:
    model = both(name, torch.float32, cache=cache)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(loaded.state_dict()[key].equal(tensor) for key, tensor in model.state_dict().items())
    assert logits(loaded).equal(logits(model))
    assert footprint(loaded) == footprint(model)
    assert loaded.config.compression == model.config.compression
    assert_cache_changes_nothing(loaded)


@pytest.mark.parametrize("rule", ["exact", "cap"])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "phi"])
def test_a_lone_token_reads_only_the_rows_it_chose(
    name: str, rule: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The products through an index give what the masked products give, and are used in decoding only."""
    model, ids, used = both(name, kept=6, rule=rule, threshold=0.0), some_ids(1, 8), []
    expected = stepwise(model, ids)
    for product in (topk_products.some_outputs, topk_products.some_inputs):
        spied = lambda *args, product=product: used.append(product.__name__) or product(*args)  # noqa: E731
        monkeypatch.setattr(topk_values, product.__name__, spied)
    stepwise(model, ids)
    assert not used, "weights this small are multiplied whole"
    monkeypatch.setattr(topk_products, "SMALLEST", 0)
    prompt = logits(model, ids)
    torch.testing.assert_close(stepwise(model, ids), expected, **CLOSE)
    assert used == ["some_outputs", "some_inputs"] * 4
    assert logits(model, ids).equal(prompt), "decoding changes no bit of what comes after"
    stepwise(model, some_ids(2, 8))
    model(input_ids=ids[:, :1]).logits.sum().backward()
    stepwise(copy.deepcopy(model).bfloat16(), ids)
    assert len(used) == 8, "two sequences, gradients, bf16: whole products"
    assert layers_of(model)[1].attention_inputs[2].weight.grad.any()  # type: ignore[union-attr]
    assert not layers_of(model)[1].attention_output.weight.is_contiguous()
    model.save_pretrained(tmp_path)
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids).equal(prompt)


FLOATS = {torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}


@settings(deadline=None)
@given(
    st.sampled_from(list(FLOATS)),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(1, 70),
    st.data(),
)
def test_packing_loses_no_bit(dtype: torch.dtype, B: int, T: int, J: int, width: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, width))
    index = torch.rand(B, T, width).argsort(-1)[..., :kept].sort(-1).values
    mask = torch.zeros(B, T, width).scatter(-1, index, 1).bool()
    values = torch.randn(B, J, T, width).to(dtype).masked_fill(~mask[:, None], 0)
    packed = topk_cache.pack(values, index)
    size = FLOATS[dtype]
    assert packed.shape == (B, 1, T, J * kept + math.ceil(width / 8 / size))
    assert packed.dtype == dtype
    assert topk_cache.unpack(packed, J, kept, width).equal(values)
    assert not topk_cache.unpack(torch.zeros_like(packed), J, kept, width).any(), "rows nobody wrote"


def test_a_compact_cache_has_the_bytes_it_should() -> None:
    """2 J K + h / 8 in bf16 per token and layer instead of 2 J h; the K cache follows the narrow keys."""
    model = tiny_model("llama-gqa", dtype=torch.bfloat16, head_dim=64, **SMALL)
    shape = modeling.Decoder(model).shape
    for layer in layers_of(model):
        modeling.narrow_qk(layer, shape, [*range(16), *range(32, 48)])
    model = choosing(model, kept=24)
    sizes = {}
    for cache in ("compact", "zeros"):
        modeling.set_value_cache(model, cache)
        assert model.config.compression["structures"]["topk_values"]["cache"] == cache
        second = model(input_ids=some_ids(3, 10), use_cache=True).past_key_values.layers[1]
        sizes[cache] = (second.keys.nbytes / 30, second.values.nbytes / 30)
    assert sizes == {"compact": (2 * 2 * 32, 2 * 2 * 24 + 64 / 8), "zeros": (2 * 2 * 32, 2 * 2 * 64)}


@pytest.mark.parametrize(
    "way",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=["beams", "sequences", "static"],
)
def test_a_compact_cache_serves_every_way_to_generate(way: dict[str, Any]) -> None:
    model, ids = both("llama-gqa", rule="cap", threshold=0.0), some_ids(2, 6)
    way = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **way}
    expected = model.generate(ids, **{**way, "cache_implementation": None})
    modeling.set_value_cache(model, "compact")
    assert model.generate(ids, **way).equal(expected)


@pytest.mark.parametrize("name", [*ONE_PER_FAMILY, "llama-mqa", "llama-biases"])
def test_idle_parameters_are_those_without_a_gradient(name: str) -> None:
    model = both(name)
    attention = layers_of(model)[1].attention
    inputs = {"hidden_states": torch.randn(1, 1, 32, dtype=torch.float64), "attention_mask": None}
    if modeling.Decoder(model).family.model_type != "opt":
        inputs["position_embeddings"] = model.model.rotary_emb(inputs["hidden_states"], torch.arange(1)[None])  # type: ignore[operator]
    attention(**inputs)[0].square().sum().backward()
    parts = [attention.value.weight.grad, attention.output.weight.grad]
    parts += [attention.value.bias.grad] if attention.value.bias is not None else []
    idle = sum(int((gradient == 0).sum()) for gradient in parts)
    assert attention.idle_parameters() == idle > 0
    counted = footprint(model)
    assert counted.distinct_total - counted.active_total == counted.stored_total - counted.active_total == idle
    value = (attention.vo_width - 3) * attention.kv_heads * (32 + (attention.value.bias is not None))
    for mask, expected in (("v_only", value), ("o_only", idle - value)):
        attention.rule = modeling.ValueRule(mask=mask)  # type: ignore[arg-type]
        assert attention.idle_parameters() == expected


def test_rules_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match="unknown rule of chosen values 'exacts'. Did you mean exact"):
        modeling.ValueRule(rule="exacts")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown mask of chosen values 'v'"):
        modeling.ValueRule(mask="v")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="mask 'o_only' it writes all of them"):
        modeling.ValueRule(mask="o_only", cache="compact")


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
