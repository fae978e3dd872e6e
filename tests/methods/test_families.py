"""The contract of a family adapter: parts are where it says, and the config alone gives the parameter count."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from methods import modeling
from methods.base import Batch
from methods.errors import UserError
from methods.modeling.compressed import MODELS
from methods.modeling.config import CONFIGS as CONFIG_CLASSES
from methods.modeling.families import FAMILIES
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from tests.methods.tiny import CONFIGS, logits, some_ids, tiny_config, tiny_model

PUBLISHED = {
    "llama-2-7b": (("llama", 32000, 4096, 32, 11008, 32, 32), 6_738_415_616),
    "llama-2-13b": (("llama", 32000, 5120, 40, 13824, 40, 40), 13_015_864_320),
    "llama-3-8b": (("llama", 128256, 4096, 32, 14336, 32, 8), 8_030_261_248),
    "qwen2.5-7b": (("qwen2", 152064, 3584, 28, 18944, 28, 4), 7_615_616_512),
    "qwen3-8b": (("qwen3", 151936, 4096, 36, 12288, 32, 8), 8_190_735_360),
    "phi-2": (("phi", 51200, 2560, 32, 10240, 32, 32), 2_779_683_840),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_from_the_config_equal_counts_of_the_tensors(name: str) -> None:
    model = tiny_model(name)
    shape = DecoderShape.from_config(model.config.to_dict())
    counted = footprint(model)
    assert (shape.total, shape.block) == (counted.active_total, counted.active_block)
    assert counted.distinct_total == counted.stored_total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_published_models(name: str) -> None:
    (kind, vocabulary, hidden, layers, mlp, heads, kv_heads), total = PUBLISHED[name]
    config = {"model_type": kind, "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers}
    config |= {"intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config["head_dim"] = hidden // heads
    assert DecoderShape.from_config({**config, "max_position_embeddings": 4096}).total == total


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_have_the_shapes_of_their_roles(name: str) -> None:
    model = tiny_model(name)
    decoder = modeling.Decoder(model)
    shape = decoder.shape
    kv, attention, hidden = shape.kv_width, shape.attention_width, shape.hidden
    assert len(decoder.layers) == shape.layers
    for layer in decoder.layers:
        assert [w.out_features for w in layer.attention_inputs] == [attention, kv, kv]
        assert [w.out_features for w in layer.mlp_inputs] == [shape.mlp_width] * (2 if shape.gated else 1)
        assert (layer.attention_output.in_features, layer.attention_output.out_features) == (attention, hidden)
        assert (layer.mlp_output.in_features, layer.mlp_output.out_features) == (shape.mlp_width, hidden)
        assert layer.parallel == shape.parallel
    every = {id(p) for layer in decoder.layers for p in layer.module.parameters()}
    outside = [*decoder.embeddings, decoder.final_norm, decoder.head]
    every |= {id(p) for module in outside for p in module.parameters()}
    assert every == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_add_attention_and_mlp_to_the_stream(name: str) -> None:
    """Re-computing a block from its parts gives what the block gives: the roles and the order are right."""
    model = tiny_model(name)
    decoder = modeling.Decoder(model)
    with torch.no_grad():
        ((x, kwargs),) = modeling.layer_calls(decoder, [Batch(some_ids(), None)])
        layer = decoder.layers[0]
        attended = layer.attention(hidden_states=layer.attention_norm(x), **kwargs)[0]
        middle = x if layer.parallel else x + attended
        fed = layer.run_mlp(layer.mlp_norm(middle))
        output = layer.module(x, **kwargs)
    torch.testing.assert_close(x + attended + fed, output)


@pytest.mark.parametrize("name", CONFIGS)
def test_watched_signals_chain_and_the_model_is_left_alone(name: str) -> None:
    model = tiny_model(name)
    expected = logits(model)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with modeling.watch_layers(modeling.Decoder(model), lambda i, x, y: seen.update({i: (x, y)})):
        logits(model)
    assert sorted(seen) == [0, 1, 2, 3]
    assert all(seen[i][1].equal(seen[i + 1][0]) for i in range(3))
    list(modeling.layer_calls(modeling.Decoder(model), [Batch(some_ids(), None)]))
    assert logits(model).equal(expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_unsupported_architecture_names_the_supported_ones() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)
    with pytest.raises(UserError, match="'gpt2' is not supported. Supported: llama, opt, phi, qwen2, qwen3"):
        modeling.Decoder(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "OPT-350M"),
        ("opt", {"word_embed_proj_dim": 16}, "OPT-350M"),
        ("opt", {"layer_norm_elementwise_affine": False}, "no weights"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ],
)
def test_unsupported_variants_are_refused(name: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DecoderShape.from_config(tiny_config(name, **changes).to_dict())


def test_groups_that_query_and_key_keep_or_lose_whole() -> None:
    phi = DecoderShape.from_config(tiny_config("phi", hidden_size=320, partial_rotary_factor=0.4).to_dict())
    assert (phi.head_dim, phi.rotary, phi.heads, phi.kv_heads) == (80, 32, 4, 4)
    assert phi.rope_groups == [(i, i + 16) for i in range(16)] + [(i,) for i in range(32, 80)]
    qwen3 = DecoderShape.from_config(tiny_config("qwen3").to_dict())
    assert (qwen3.head_dim, qwen3.heads, qwen3.kv_heads) == (16, 4, 2)
    assert qwen3.rope_groups == [(i, i + 8) for i in range(8)]
    assert DecoderShape.from_config(tiny_config("opt").to_dict()).rope_groups == [(i,) for i in range(8)]


def test_incomplete_config_is_refused() -> None:
    with pytest.raises(UserError, match="lacks model_type"):
        DecoderShape.from_config({})
    with pytest.raises(UserError, match="lacks hidden_size"):
        DecoderShape.from_config({"model_type": "llama", "vocab_size": 3, "num_hidden_layers": 1})
    incomplete = {key: value for key, value in tiny_config("qwen3").to_dict().items() if key != "head_dim"}
    with pytest.raises(UserError, match="lacks head_dim"):
        DecoderShape.from_config(incomplete)


def test_mixed_kinds_of_attention_are_refused_where_one_mask_must_serve_all() -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    model = tiny_model("qwen2", layer_types=kinds, sliding_window=8, use_sliding_window=True)
    with pytest.raises(UserError, match="full_attention, sliding_attention"):
        next(iter(modeling.layer_calls(modeling.Decoder(model), [Batch(some_ids(), None)])))


def test_every_family_has_its_config_and_its_model_class() -> None:
    assert list(FAMILIES) == list(CONFIG_CLASSES) == [m.config_class.model_type[len("tomoe_bench_") :] for m in MODELS]  # type: ignore[union-attr]


def test_tied_matrices_count_once() -> None:
    tied, untied = footprint(tiny_model("llama-tied")), footprint(tiny_model("llama-gqa"))
    assert untied.active_total - tied.active_total == 96 * 32
    assert isinstance(modeling.Decoder(tiny_model("llama-tied")).head, nn.Linear)
