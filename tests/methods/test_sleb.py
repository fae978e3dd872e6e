"""SLEB: brute force over blocks, planted blocks, removals that cost nothing, and its checkpoint on disk."""

import copy
import csv
import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods import modeling
from methods.base import Batch, Budget, Context
from methods.errors import UserError
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.shortgpt import block_influence, least_influential
from methods.sleb import SLEB, Removal, enter, losses_without, run
from methods.sleb import cut as cut_text
from tests.methods.test_shortgpt import remove_blocks, silence
from tests.methods.test_slicegpt import LLAMA_2_7B
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    some_ids,
    tiny_config,
    tiny_model,
)
from tests.methods.training.small import tokenizer

HERE = Context(scratch=Path())


@dataclass(frozen=True)
class Written(RandomCalibration):
    """Windows that a model has written."""

    ids: torch.Tensor | None = None

    def batches(self, size: int) -> Iterator[Batch]:
        assert self.ids is not None
        yield from (Batch(part, None) for part in self.ids.split(size))


def written_by(model: PreTrainedModel, samples: int = 6, window: int = 16, sure: float = 5) -> Written:
    """Text drawn from a model that is made sure of itself: on average, no other one predicts it better."""
    with torch.no_grad():
        for parameter in modeling.Decoder(model).final_norm.parameters():
            parameter.mul_(sure)
    ids, generator = some_ids(samples, 1), torch.Generator().manual_seed(0)
    while ids.shape[1] < window:
        chances = logits(model, ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, chances.multinomial(1, generator=generator)], 1)
    return Written(ids=ids)


@torch.no_grad()
def naive_loss(model: PreTrainedModel, blocks: list[int], batches: list[Batch]) -> float:
    """Mean next-token loss of a copy of the model from which all other blocks are deleted, token by token."""
    small, losses = modeling.keep_layers(copy.deepcopy(model), blocks), []
    for ids, mask in batches:
        chances = small(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for row in range(len(ids)):
            for place in range(1, ids.shape[1]):
                if mask is None or (mask[row, place] and mask[row, place - 1]):
                    losses.append(-chances[row, place - 1, ids[row, place]].item())
    return sum(losses) / len(losses)


def naive_sleb(model: PreTrainedModel, batches: list[Batch], count: int) -> list[tuple[int, float]]:
    """Every candidate's copy is built and measured in full."""
    alive, removals = list(range(len(modeling.Decoder(model).layers))), []
    for _ in range(count):
        losses = {b: naive_loss(model, [a for a in alive if a != b], batches) for b in alive[1:-1]}
        best = min(losses, key=lambda b: losses[b])
        removals.append((best, losses[best]))
        alive.remove(best)
    return removals


def eliminate(model: PreTrainedModel, batches: list[Batch], count: int, **settings: Any) -> list[Removal]:
    rounds = SLEB(**settings).eliminate(modeling.Decoder(model), batches, count, HERE)
    return [removal for found in rounds for removal in found][:count]


def compress(model: PreTrainedModel, budget: Budget, **settings: Any) -> PreTrainedModel:
    return SLEB(**settings).compress(model, None, budget, RandomCalibration(), HERE)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_removals_equal_brute_force(name: str) -> None:
    model = tiny_model(name, num_hidden_layers=5)
    left = torch.arange(8).expand(2, 8) > 2
    batches = [*RandomCalibration(samples=5, window=8, padded=2).batches(2), Batch(some_ids(2, 8), left)]
    found, expected = eliminate(model, batches, 3), naive_sleb(model, batches, 3)
    assert [removal.block for removal in found] == [block for block, _ in expected]
    assert [removal.loss for removal in found] == pytest.approx([loss for _, loss in expected], abs=1e-9)


def test_the_second_removal_is_the_best_beside_the_first() -> None:
    model, batches = tiny_model("llama-gqa", num_hidden_layers=6), list(RandomCalibration().batches(8))
    first, second = eliminate(model, batches, 2)
    for other in {1, 2, 3, 4} - {first.block}:
        alive = [block for block in range(6) if block not in (first.block, other)]
        assert second.loss <= naive_loss(model, alive, batches) + 1e-9


@pytest.mark.parametrize("planted", [1, 2])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_an_identity_block_goes_first_and_costs_nothing(name: str, planted: int) -> None:
    model = tiny_model(name)
    silence(model, planted)
    text, expected = written_by(model), logits(model)
    batches = list(text.batches(4))
    (removal,) = eliminate(model, batches, 1)
    assert removal.block == planted
    assert removal.loss == pytest.approx(naive_loss(model, [0, 1, 2, 3], batches), abs=1e-9)
    pruned = SLEB().compress(model, None, remove_blocks(model, 1), text, HERE)  # type: ignore[arg-type]
    assert logits(pruned).equal(expected)


def test_the_first_one_wins_among_equals() -> None:
    model = tiny_model("llama-gqa", num_hidden_layers=5)
    silence(model, 1), silence(model, 3)
    removals = eliminate(model, list(written_by(model).batches(4)), 2)
    assert [removal.block for removal in removals] == [1, 3] and removals[0].loss == removals[1].loss


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_skipping_equals_deleting_bitwise(name: str) -> None:
    model, ids = tiny_model(name, dtype=torch.float32), some_ids()
    decoder = modeling.Decoder(model)
    entered = enter(decoder, Batch(ids, None))
    with torch.no_grad():
        skipped = decoder.head(decoder.final_norm(run(decoder, [0, 1, 3], entered.x_BTD, entered)))
    assert skipped.equal(logits(modeling.keep_layers(model, [0, 1, 3]), ids))


def test_one_shot_takes_the_best_of_the_first_round() -> None:
    model, batches = tiny_model("llama-mha", num_hidden_layers=7), list(RandomCalibration().batches(8))
    losses = {b: naive_loss(model, [a for a in range(7) if a != b], batches) for b in range(1, 6)}
    found = eliminate(model, batches, 3, rescore=False)
    assert [removal.block for removal in found] == sorted(losses, key=lambda b: losses[b])[:3]
    assert [removal.loss for removal in found] == pytest.approx(sorted(losses.values())[:3], abs=1e-9)


def test_hopeless_candidates_are_given_up() -> None:
    """After the best one, a candidate runs only until it has lost."""
    model = tiny_model("llama-gqa", num_hidden_layers=5)
    silence(model, 1)
    decoder = modeling.Decoder(model)
    text = [enter(decoder, batch) for batch in written_by(model, samples=12, sure=40).batches(1)]
    for give_up in (False, True):
        calls = []
        handle = decoder.layers[4].module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found = list(losses_without(decoder, text, range(5), [1, 2, 3], give_up=give_up))
        handle.remove()
        assert min(found, key=lambda removal: removal.loss).block == 1
        assert (len(calls) < 24) if give_up else (len(calls) == 36)  # three candidates, twelve windows
        assert any(removal.loss == float("inf") for removal in found) == give_up


def test_barriers_stay() -> None:
    model = tiny_model("llama-gqa", num_hidden_layers=6)
    for index in (0, 1, 5):
        silence(model, index)
    batches = list(written_by(model).batches(4))
    assert {removal.block for removal in eliminate(model, batches, 3, early_barrier=2)} == {2, 3, 4}
    assert eliminate(model, batches, 1, early_barrier=0)[0].block == 0
    assert eliminate(model, batches, 4, latter_barrier=2, early_barrier=0)[-1].block < 4


def test_padding_does_not_count() -> None:
    model, whole = tiny_model("llama-gqa"), RandomCalibration(padded=4)
    cut = [Batch(ids[:, :12], None) for ids, _ in whole.batches(8)]
    padded, plain = eliminate(model, list(whole.batches(8)), 2), eliminate(model, cut, 2)
    assert [r.block for r in padded] == [r.block for r in plain]
    assert [r.loss for r in padded] == pytest.approx([r.loss for r in plain], abs=1e-9)


@pytest.mark.parametrize("weak", [1, 2])
def test_no_worse_than_shortgpt_on_the_text_for_one_block(weak: int) -> None:
    worse = 0
    for seed in range(6):
        model, batches = tiny_model("llama-mha", seed=seed), list(RandomCalibration(seed=seed).batches(8))
        layers = modeling.Decoder(model).layers
        for layer, scale in ((layers[weak], 0.1), (layers[3], 3)):
            layer.attention_output.weight.data *= scale
            layer.mlp_output.weight.data *= scale
        assert least_influential(block_influence(modeling.Decoder(model), batches), 1) == {weak}
        loss = naive_loss(model, [block for block in range(4) if block != weak], batches)
        found = eliminate(model, batches, 1)[0].loss
        assert found <= loss + 1e-9
        worse += found < loss - 1e-3
    assert worse  # else nothing was compared


def test_different_kinds_of_attention_are_scored_with_their_own_masks() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model("qwen2", layer_types=kinds, sliding_window=3, use_sliding_window=True)
    batches = list(RandomCalibration(samples=4).batches(2))
    assert eliminate(model, batches, 2) == [
        (block, pytest.approx(loss, abs=1e-9)) for block, loss in naive_sleb(model, batches, 2)
    ]


def text_lines(count: int, words: int = 5) -> RandomCalibration:
    class Lines(RandomCalibration):
        def rows(self) -> dict[str, list[str]]:
            lines = [" ".join(f"w{(7 * line + word) % 90}" for word in range(words)) for line in range(count)]
            return {"a": lines[::2], "b": lines[1::2]}

    return Lines()


def test_published_calibration_takes_random_lines() -> None:
    model = tiny_model("llama-gqa")
    settings = SLEB(calib="as-published", lines=8, window=12)

    def windows(seed: int) -> torch.Tensor:
        context = Context(scratch=Path(), seed=seed, batch_size=2)
        batches = list(settings._batches(modeling.Decoder(model), tokenizer(), text_lines(40), context))
        assert all(len(batch.input_ids) <= 2 and batch.mask is None for batch in batches)
        return torch.cat([batch.input_ids for batch in batches])

    assert windows(0).shape == (3, 12)  # 8 lines of 5 words are 40 tokens
    assert windows(0).equal(windows(0)) and not windows(0).equal(windows(1))
    lines = {tuple(tokenizer()(line)["input_ids"]) for rows in text_lines(40).rows().values() for line in rows}  # type: ignore[arg-type]
    assert {tuple(line) for line in windows(0).flatten()[:35].view(-1, 5).tolist()} <= lines
    model_limit = SLEB(calib="as-published", lines=40)  # 2048 tokens per window, and the model takes 64
    batches = list(model_limit._batches(modeling.Decoder(model), tokenizer(), text_lines(40), HERE))
    assert [batch.input_ids.shape for batch in batches] == [(3, 64)]
    pruned = settings.compress(model, tokenizer(), remove_blocks(model, 1), text_lines(40), HERE)
    assert len(modeling.Decoder(pruned).layers) == 3


def test_cutting_drops_the_tail_and_refuses_too_little() -> None:
    assert cut_text("w0 w1 w2 w3 w4", tokenizer(), 2).tolist() == [[3, 4], [5, 6]]
    with pytest.raises(UserError, match=r"3 tokens, less than one window of 4.*sleb.lines=MORE.*sleb.window=3"):
        cut_text("w0 w1 w2", tokenizer(), 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_contract(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32)
    shape, budget = modeling.Decoder(model).shape, remove_blocks(model, 2)
    assert compress(model, Budget(ratio=1)) is model
    predicted = SLEB().predict(shape, budget)
    pruned = compress(model, budget)
    counted = footprint(pruned)
    assert (counted.active_total, counted.active_block) == (predicted.active_total, predicted.active_block)
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and logits(loaded).equal(logits(pruned))
    assert_cache_changes_nothing(loaded)
    again = compress(tiny_model(name, dtype=torch.float32), budget)
    assert again.config.compression == pruned.config.compression


def test_the_order_is_left_behind(tmp_path: Path) -> None:
    model, context = tiny_model("phi"), Context(scratch=tmp_path, artifacts=tmp_path / "kept")
    expected = eliminate(model, list(RandomCalibration().batches(8)), 2)
    SLEB().compress(model, None, remove_blocks(model, 2), RandomCalibration(), context)  # type: ignore[arg-type]
    header, *rows = csv.reader((tmp_path / "kept" / "removals.csv").read_text().splitlines())
    assert header == ["block", "loss"]
    assert [(int(block), float(loss)) for block, loss in rows] == [tuple(removal) for removal in expected]


def test_more_blocks_than_the_barriers_leave_is_refused() -> None:
    shape = DecoderShape.from_config(tiny_config("llama-gqa").to_dict())
    with pytest.raises(UserError, match="not reachable for sleb"):
        SLEB().predict(shape, Budget(ratio=1 - 3 * shape.layer / shape.total, tolerance=0.01))
    with pytest.raises(UserError, match=r"not reachable for sleb.*--ratios 1"):
        SLEB(early_barrier=9).predict(shape, Budget(ratio=0.5))
    big = DecoderShape.from_config(LLAMA_2_7B)
    assert SLEB().predict(big, Budget(ratio=0.79)).active_total == big.total - 7 * big.layer


def test_nothing_to_measure_and_overflow_are_errors() -> None:
    model = tiny_model("llama-gqa")
    for empty in ([], [Batch(some_ids(2, 1), None)], [Batch(some_ids(2, 4), torch.zeros(2, 4))]):
        with pytest.raises(UserError, match="calibration text is empty"):
            eliminate(model, empty, 1)
    modeling.Decoder(model).layers[3].mlp_output.weight.data[0, 0] = float("nan")
    for rescore in (True, False):
        with pytest.raises(UserError, match="overflows"):
            eliminate(model, list(RandomCalibration().batches(8)), 1, rescore=rescore)


@pytest.mark.parametrize("field", ["early_barrier", "latter_barrier", "lines", "window"])
def test_impossible_settings_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"sleb.{field} is -1; the least is"):
        SLEB(**{field: -1})


def test_one_shot_looks_only_at_what_goes() -> None:
    """A block whose overflow its own removal mends can go; that others overflow without theirs does not matter."""
    model = tiny_model("llama-gqa", num_hidden_layers=6)
    modeling.Decoder(model).layers[2].mlp_output.weight.data[0, 0] = torch.inf
    batches = list(RandomCalibration().batches(8))
    for rescore in (True, False):
        assert [removal.block for removal in eliminate(model, batches, 1, rescore=rescore)] == [2]
    with pytest.raises(UserError, match="overflows"):
        eliminate(model, batches, 2, rescore=False)
    assert len(eliminate(model, batches, 2)) == 2


def test_entering_holds_one_stream() -> None:
    """Not one per block: of a model of 80 blocks that would be gigabytes on the device."""
    model, alive = tiny_model("llama-gqa", num_hidden_layers=6), []
    layers = modeling.Decoder(model).layers

    def count(*_: object) -> None:
        alive.append(sum(t.shape == (8, 16, 32) for t in gc.get_objects() if type(t) is torch.Tensor))

    layers[1].module.register_forward_pre_hook(count)
    layers[5].module.register_forward_pre_hook(count)
    (batch,) = RandomCalibration(samples=8).batches(8)
    entered = enter(modeling.Decoder(model), batch)
    assert alive[1] == alive[0] and len(entered.keywords) == 6


def test_losses_of_bf16_models_are_summed_in_more_than_bf16() -> None:
    model = tiny_model("llama-gqa", dtype=torch.bfloat16)
    (batch,) = RandomCalibration().batches(12)
    (first,) = eliminate(model, [batch], 1)
    alive = [block for block in range(4) if block != first.block]
    with torch.no_grad():
        exact = modeling.keep_layers(model, alive)(input_ids=batch.input_ids).logits.double()[:, :-1]
    loss = torch.nn.functional.cross_entropy(exact.flatten(0, 1), batch.input_ids[:, 1:].flatten())
    assert first.loss == pytest.approx(loss.item(), abs=1e-6)


def test_equal_losses_do_not_end_the_search() -> None:
    """A candidate that is as good as the best one is measured to its end: what it says is its loss."""
    model = tiny_model("llama-gqa", num_hidden_layers=5)
    silence(model, 1), silence(model, 3)
    decoder, text = modeling.Decoder(model), [enter(modeling.Decoder(model), next(written_by(model).batches(8)))]
    losses = {found.block: found.loss for found in losses_without(decoder, text, range(5), [1, 3], give_up=True)}
    assert losses[1] == losses[3] < math.inf


def test_published_lines_are_joined_by_blank_lines(tmp_path: Path) -> None:
    seen = []

    class Spy:
        def __call__(self, text: str, **_: Any) -> Any:
            seen.append(text)
            return tokenizer()(text)

    settings, context = SLEB(calib="as-published", lines=8, window=12), Context(scratch=tmp_path)
    list(settings._batches(modeling.Decoder(tiny_model("llama-gqa")), Spy(), text_lines(40), context))  # type: ignore[arg-type]
    assert len(seen[0].split("\n\n")) == 8
    assert context.notes == ["scored on 8 random lines of the calibration text instead of its windows"]


@pytest.mark.parametrize("field", ["lines", "window"])
def test_settings_of_another_text_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=rf"sleb.{field}=64 has no effect beside sleb.calib=matched"):
        methods.configure("sleb", {field: "64"})
    methods.configure("sleb", {field: "64", "calib": "as-published"})
