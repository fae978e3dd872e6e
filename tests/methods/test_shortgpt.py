"""ShortGPT: planted blocks, a naive Block Influence, and its checkpoint in stock transformers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.base import Batch, Budget, Context
from methods.blocks import blocks_to_remove
from methods.errors import UserError
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.shortgpt import (
    ShortGPT,
    angular_distance,
    angular_distances,
    block_influence,
    cosine,
    last_token_states,
    least_influential,
    nearest_run,
)
from tests.methods.test_slicegpt import LLAMA_2_7B
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    some_ids,
    tiny_model,
)


def compress(model: PreTrainedModel, budget: Budget, tmp_path: Path, method: ShortGPT | None = None) -> PreTrainedModel:
    return (method or ShortGPT()).compress(model, None, budget, RandomCalibration(), Context(scratch=tmp_path))  # type: ignore[arg-type]


def remove_blocks(model: PreTrainedModel, count: int) -> Budget:
    """The budget that removes `count` blocks."""
    shape = modeling.Decoder(model).shape
    return Budget(ratio=1 - count * shape.layer / shape.total)


def silence(model: PreTrainedModel, index: int) -> None:
    """Make a block the identity: what it writes to the stream is 0."""
    layer = modeling.Decoder(model).layers[index]
    with torch.no_grad():
        for writer in (layer.attention_output, layer.mlp_output):
            writer.weight.zero_()
            if writer.bias is not None:
                writer.bias.zero_()


def naive_influence(model: PreTrainedModel, ids: torch.Tensor) -> list[float]:
    """BI from residual signals recorded by plain hooks, with an explicit loop over tokens."""
    signals: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(module, args, kwargs, output):
        signals.append((args[0], output[0] if isinstance(output, tuple) else output))

    handles = [layer.module.register_forward_hook(hook, with_kwargs=True) for layer in modeling.Decoder(model).layers]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    influence = []
    for x, y in signals:
        pairs = zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
        influence.append(1 - sum(cosines) / len(cosines))
    return influence


@pytest.mark.parametrize("name", CONFIGS)
def test_block_influence_equals_the_naive_one(name: str) -> None:
    model, ids = tiny_model(name), some_ids(4, 10)
    batches = [Batch(ids[:3], None), Batch(ids[3:], None)]
    assert block_influence(modeling.Decoder(model), batches) == pytest.approx(naive_influence(model, ids), abs=1e-12)


@pytest.mark.parametrize("metric", ["block_influence", "angular"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_planted_identity_block_goes_first(name: str, metric: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    silence(model, 2)
    expected = logits(model)
    influence = block_influence(modeling.Decoder(model), RandomCalibration().batches(8))
    assert abs(influence[2]) < 1e-6 and least_influential(influence, 1) == {2}
    pruned = compress(model, remove_blocks(model, 1), tmp_path, ShortGPT(metric=metric))  # type: ignore[arg-type]
    assert len(modeling.Decoder(pruned).layers) == 3
    assert pruned.config.compression["structures"]["removed_layers"] == {"kept": [0, 1, 3], "of": 4}
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=0)


def test_cosine_is_blind_to_scale_and_bounded() -> None:
    x = torch.randn(3, 5, 8)
    assert torch.allclose(1 - cosine(x, 7 * x), torch.zeros(3, 5), atol=1e-6)
    assert torch.allclose(1 - cosine(x, -x), torch.full((3, 5), 2.0))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_least_influential_breaks_ties_towards_deeper_blocks(influence: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(influence)))
    removed = least_influential([float(x) for x in influence], count)
    kept = set(range(len(influence))) - removed
    assert len(removed) == count
    assert all((influence[r], -r) < (influence[k], -k) for r in removed for k in kept)


def test_influence_ignores_padding_and_token_order_of_batches() -> None:
    model = tiny_model("llama-gqa")
    decoder = modeling.Decoder(model)
    ids = some_ids(4, 12)
    plain = block_influence(decoder, [Batch(ids, None)])
    shuffled = block_influence(decoder, [Batch(ids[[2, 0]], None), Batch(ids[[3, 1]], None)])
    padded_ids = torch.cat([ids, torch.zeros(4, 5, dtype=torch.long)], 1)
    mask = torch.arange(17).expand(4, 17) < 12
    padded = block_influence(decoder, [Batch(padded_ids, mask)])
    assert shuffled == pytest.approx(plain, abs=1e-12) and padded == pytest.approx(plain, abs=1e-9)
    last = last_token_states(decoder, [Batch(padded_ids, mask)])
    torch.testing.assert_close(last, last_token_states(decoder, [Batch(ids, None)]))


def test_the_last_block_is_seen_before_the_final_norm() -> None:
    model, ids = tiny_model("llama-gqa"), some_ids()
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    from_outputs = float(1 - cosine(states[-2], states[-1]).mean())
    assert abs(block_influence(modeling.Decoder(model), [Batch(ids, None)])[-1] - from_outputs) > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_angular_run_against_brute_force(count: int) -> None:
    states = torch.randn(5, 7, 8, dtype=torch.float64)
    distances = []
    for start in range(5 - count):
        a, b = states[start], states[start + count]
        angles = [math.acos(float(x @ y / (x.norm() * y.norm()))) for x, y in zip(a, b, strict=True)]
        distances.append(sum(angles) / len(angles) / math.pi)
        assert angular_distance(states, start, count) == pytest.approx(distances[-1])
    best = distances.index(min(distances))
    assert nearest_run(angular_distances(states), count) == set(range(best, best + count))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_all_but_one_block_removed_equals_a_one_block_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32)
    one = tiny_model(name, dtype=torch.float32, num_hidden_layers=1)
    pruned = compress(model, remove_blocks(model, 3), tmp_path)
    one.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(logits(pruned), logits(one), rtol=0, atol=0)
    assert footprint(pruned) == footprint(one)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_cache_equals_without(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32)
    pruned = compress(model, remove_blocks(model, 2), tmp_path)
    assert_cache_changes_nothing(pruned)


@pytest.mark.parametrize(("ratio", "removed"), [(0.79, 7), (0.73, 9), (0.70, 10), (0.61, 13), (0.5, 17)])
def test_blocks_removed_from_llama_2_7b(ratio: float, removed: int) -> None:
    shape = DecoderShape.from_config(LLAMA_2_7B)
    assert blocks_to_remove(shape, Budget(ratio=ratio), most=31) == removed
    assert ShortGPT().predict(shape, Budget(ratio=ratio)).active_total == shape.total - removed * shape.layer


def test_unreachable_ratio_says_what_can_be_reached() -> None:
    shape = DecoderShape.from_config(LLAMA_2_7B)
    with pytest.raises(
        UserError, match=r"ratio 0\.56 is not reachable.* 0\.5495 or 0\.5795 .*--ratios 0\.5495 0\.5795"
    ):
        ShortGPT().predict(shape, Budget(ratio=0.56, tolerance=0.001))
    with pytest.raises(UserError, match="not reachable for shortgpt"):
        ShortGPT().predict(shape, Budget(ratio=0.01))


def test_checkpoints_load_in_stock_transformers(tmp_path: Path) -> None:
    """A process that never imports this project gives the same logits, bit for bit, for every family."""
    for name in ONE_PER_FAMILY:
        model = tiny_model(name, dtype=torch.float32)
        pruned = compress(model, remove_blocks(model, 1), tmp_path)
        pruned.save_pretrained(tmp_path / name)
        save_file({"ids": some_ids(), "logits": logits(pruned)}, tmp_path / name / "expected.safetensors")
    script = (
        "import sys, torch; from safetensors.torch import load_file; from transformers import AutoModelForCausalLM\n"
        "for path in sys.argv[1:]:\n"
        "    expected = load_file(path + '/expected.safetensors')\n"
        "    model = AutoModelForCausalLM.from_pretrained(path)\n"
        "    assert model(input_ids=expected['ids']).logits.equal(expected['logits']), path\n"
        "    print(type(model).__name__, len(model.config.compression['structures']['removed_layers']['kept']))\n"
        "assert not {'methods', 'benchmarks'} & set(sys.modules)"
    )
    paths = [str(tmp_path / name) for name in ONE_PER_FAMILY]
    result = subprocess.run([sys.executable, "-I", "-c", script, *paths], capture_output=True, text=True, cwd=tmp_path)
    classes = [f"{family}ForCausalLM 3" for family in ("Llama", "Qwen2", "Qwen3", "Phi", "OPT")]
    assert result.stdout.splitlines() == classes, result.stderr


def test_per_layer_lists_of_the_config_lose_the_removed_blocks_entries(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    model = tiny_model("qwen2", dtype=torch.float32, layer_types=kinds, sliding_window=8, use_sliding_window=True)
    silence(model, 0)
    pruned = compress(model, remove_blocks(model, 1), tmp_path)
    pruned.save_pretrained(tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["layer_types"] == kinds[1:] and config["num_hidden_layers"] == 3
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")).equal(logits(pruned))


def test_block_basis_counts_blocks_only(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    dense = footprint(model)
    pruned = compress(model, Budget(ratio=0.5, basis="block"), tmp_path)
    assert footprint(pruned).active_block / dense.active_block == 0.5


@pytest.mark.parametrize("metric", ["block_influence", "angular"])
def test_nothing_to_measure_and_overflow_are_errors(metric: str, tmp_path: Path) -> None:
    method = ShortGPT(metric=metric)  # type: ignore[arg-type]
    model = tiny_model("llama-gqa")
    empty, some = RandomCalibration(samples=0), RandomCalibration()
    with pytest.raises(UserError, match="calibration text is empty"):
        method.compress(model, None, Budget(ratio=0.7), empty, Context(scratch=tmp_path))  # type: ignore[arg-type]
    modeling.Decoder(model).layers[1].mlp_output.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="overflows"):
        method.compress(model, None, Budget(ratio=0.7), some, Context(scratch=tmp_path))  # type: ignore[arg-type]
