"""Values chosen per token, on every family: against masks outside of the stock modules, cached, saved and loaded."""

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
from methods.modeling.structures import topk_cache, topk_products, topk_values
from methods.modeling.structures.attention import reshape_attention
from methods.modeling.structures.topk_choice import choose
from tests.methods.test_attention_structures import CLOSE, SMALL, layers_of, narrow
from tests.methods.tiny import ONE_PER_FAMILY, assert_cache_changes_nothing, logits, some_ids, tiny_model


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


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.lists(st.integers(-2, 2), min_size=8, max_size=8), min_size=1, max_size=4))
def test_choices_by_the_rules(kept: int, rows: list[list[int]]) -> None:
    """Ties included: the scores are small integers."""
    scores = torch.tensor(rows, dtype=torch.float32)[None]
    exact = choose(scores, kept, modeling.ValueRule()).mask_BTv[0].tolist()
    cap = choose(scores, kept, modeling.ValueRule(rule="cap", threshold=0.0)).mask_BTv[0].tolist()
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
    model = both(name, rule=rule, threshold=0.0)
    ids = some_ids(2, 9)
    whole, short = logits(model, ids), logits(model, ids[:1, 3:])
    modeling.set_value_cache(model, cache)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(stepwise(model, ids), whole, **CLOSE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = stepwise(model, ids, mask)
    torch.testing.assert_close(padded[:1, 3:], short, **CLOSE)
    torch.testing.assert_close(padded[1:], whole[1:], **CLOSE)


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
    row = kept + math.ceil(width / 8 / FLOATS[dtype] / J)
    assert packed.shape == (B, J, T, min(row, width)), "rows where they are smaller, else the values"
    assert packed.dtype == dtype
    assert topk_cache.unpack(packed, kept, width).equal(values)
    assert not topk_cache.unpack(torch.zeros_like(packed), kept, width).any(), "rows nobody wrote"


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
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=["dynamic", "beams", "sequences", "static"],
)
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_compact_cache_serves_every_way_to_generate(heads: int, way: dict[str, Any]) -> None:
    dense = tiny_model("llama-gqa", hidden_size=48, num_attention_heads=6, num_key_value_heads=heads, **SMALL)
    model, ids = choosing(dense, rule="cap", threshold=0.0), some_ids(2, 6)
    way = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **way}
    expected = model.generate(ids, **{**way, "cache_implementation": None})
    modeling.set_value_cache(model, "compact")
    assert model.generate(ids, **way).equal(expected)


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_layers_are_compact_where_that_is_smaller(way: dict[str, Any]) -> None:
    """Of 8 values, 6 and their bits take 7 elements, 7 and theirs would take 8; the first layer chooses none."""
    model, ids = tiny_model("llama-gqa", num_hidden_layers=3), some_ids(2, 6)
    for layer, kept in zip(layers_of(model)[1:], (7, 6), strict=True):
        modeling.convert_values(layer, modeling.ValueSelector(32, 5, 8), kept, modeling.ValueRule())
    way = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, **way}
    expected, whole = model.generate(ids, **way), logits(model, ids)
    modeling.set_value_cache(model, "compact")
    made = model.generate(ids, **way)
    assert made.sequences.equal(expected.sequences)
    assert [layer.values.shape[-1] for layer in made.past_key_values.layers] == [8, 8, 7]
    torch.testing.assert_close(stepwise(model, ids), whole, **CLOSE)


def test_inference_mode_leaves_a_model_that_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_products, "SMALLEST", 0)
    model, ids = both("llama-biases", kept=6), some_ids(1, 8)
    with torch.inference_mode():
        expected = stepwise(model, ids)
    torch.testing.assert_close(stepwise(model, ids), expected)
    model.train()(input_ids=ids).logits.square().sum().backward()
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert layers_of(model)[1].attention_output.weight.grad.any()  # type: ignore[union-attr]


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
