"""DISP-LLM: masks against scaled weights, cuts against masks and counts, the objective, training."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods import modeling
from methods.base import Budget, Prediction
from methods.dimension_masks import MaskedBlocks, MaskNetwork, Trainer, draw, kept_fraction, regulariser
from methods.disp_llm import DispLLM, Kept, choose, cut, masked_size, prunable, whole
from methods.errors import UserError
from methods.modeling import Decoder
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.training import loop as loop_module
from methods.training import recomputation
from methods.training.straight_through import st_gumbel_sigmoid
from tests.methods.test_delta import assert_same
from tests.methods.test_slicegpt import LLAMA_2_7B as LLAMA_2_7B_CONFIG
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, assert_cache_changes_nothing, logits, tiny_config, tiny_model
from tests.methods.training.small import SmallCalibration, context, sentences, tokenizer

LLAMA_2_7B = DecoderShape.from_config(LLAMA_2_7B_CONFIG)
HALF = Budget(ratio=0.6, basis="block")


def shape_of(name: str) -> DecoderShape:
    return DecoderShape.from_config(tiny_config(name).to_dict())


def random_masks(shape: DecoderShape, *, hard: bool, seed: int = 0) -> list[Kept]:
    """Of every block, between 0 and 1; at least one dimension of each is on."""
    generator = torch.Generator().manual_seed(seed)

    def one(width: int) -> Tensor:
        soft = torch.rand(width, generator=generator, dtype=torch.float64)
        soft[seed % width] = 1.0
        return soft.round() if hard else soft

    return [Kept(*map(one, whole(shape))) for _ in range(shape.layers)]


def numbers(masks: list[Kept]) -> list[Kept]:
    """What 0/1 masks keep."""
    return draw(masks, lambda mask: mask.nonzero()[:, 0])


@torch.no_grad()
def masked_logits(model: PreTrainedModel, masks: list[Kept]) -> Tensor:
    with MaskedBlocks(Decoder(model)).attached() as masked:
        masked.masks = masks
        return logits(model)


@torch.no_grad()
def scaled(model: PreTrainedModel, masks: list[Kept]) -> PreTrainedModel:
    """The dense model whose weights are multiplied with the masks."""
    for layer, mask in zip(Decoder(model).layers, masks, strict=True):
        for linear in layer.attention_inputs:
            linear.weight *= mask.attention_in
        for linear in layer.mlp_inputs:
            linear.weight *= mask.mlp_in
        layer.mlp_output.weight *= mask.neurons ** len(layer.mlp_inputs)  # on the gate and on up
        for linear, rows in ((layer.attention_output, mask.attention_out), (layer.mlp_output, mask.mlp_out)):
            linear.weight *= rows[:, None]
            if linear.bias is not None:
                linear.bias *= rows
    return model


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_masks_scale_what_a_block_reads_and_writes(name: str, hard: bool) -> None:
    masks = random_masks(shape_of(name), hard=hard)
    made = masked_logits(tiny_model(name), masks)
    torch.testing.assert_close(made, logits(scaled(tiny_model(name), masks)), rtol=1e-9, atol=1e-9)
    assert (made - logits(tiny_model(name))).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cut_model_is_the_masked_one_and_as_large_as_its_masks(name: str) -> None:
    shape, masks = shape_of(name), random_masks(shape_of(name), hard=True, seed=3)
    made = cut(tiny_model(name), numbers(masks))
    torch.testing.assert_close(logits(made), masked_logits(tiny_model(name), masks), rtol=1e-9, atol=1e-9)
    r = kept_fraction(masks, shape).item()
    assert footprint(made).active_block == shape.block - prunable(shape) + round(r * prunable(shape))


@pytest.mark.parametrize("name", CONFIGS)
def test_with_everything_on_masked_cut_and_dense_are_one(name: str) -> None:
    ones = draw(random_masks(shape_of(name), hard=True), torch.ones_like)
    dense = logits(tiny_model(name))
    assert masked_logits(tiny_model(name), ones).equal(dense)
    made = cut(tiny_model(name), numbers(ones))
    assert logits(made).equal(dense) and footprint(made) == footprint(tiny_model(name))


def test_the_published_p() -> None:
    """One half of all parameters of LLaMA-2-7B is 0.48 of its decoder projections, the constant of the script."""
    tables_and_norms = 2 * 32000 * 4096 + 65 * 4096
    projections = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    p = ((tables_and_norms + projections) / 2 - tables_and_norms) / projections
    assert DispLLM().target(LLAMA_2_7B, Budget(ratio=0.5)) == pytest.approx(p) == pytest.approx(0.48, abs=5e-4)
    q, wide = 4096, 11008
    assert masked_size(Kept(1, 10, 100, 1000, 10000), LLAMA_2_7B) == 3 * q + 10 * q + 2 * 10**5 + 10**7
    assert prunable(LLAMA_2_7B) == 32 * (4 * q * q + 3 * q * wide)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_the_highest_logits_stay_so_many_as_the_budget_allows(data: st.DataObject) -> None:
    """By trying every number of them."""
    shape = shape_of(data.draw(st.sampled_from(ONE_PER_FAMILY)))
    round_to, seed = data.draw(st.sampled_from([1, 1, 4])), data.draw(st.integers(0, 99))
    budget = Budget(ratio=data.draw(st.floats(0.45, 0.999)), basis=data.draw(st.sampled_from(["block", "total"])))
    logits = random_masks(shape, hard=False, seed=seed)
    outside = shape.total - shape.block if budget.basis == "total" else 0
    flat = sorted((float(z) for block in logits for mask in block for z in mask), reverse=True)

    def widths(k: int) -> list[list[int]]:
        cut = flat[k - 1]
        above = [[max(1, int((mask >= cut).sum())) for mask in block] for block in logits]
        return [
            [min(len(m), -(-n // round_to) * round_to) for n, m in zip(a, b, strict=True)]
            for a, b in zip(above, logits, strict=True)
        ]

    def size(k: int) -> int:
        return outside + shape.block - prunable(shape) + sum(masked_size(Kept(*w), shape) for w in widths(k))

    fitting = [k for k in range(1, len(flat) + 1) if size(k) <= budget.ratio * budget.dense(shape)]
    expected = widths(max(fitting))
    kept = choose(logits, shape, budget, round_to)
    assert [[len(n) for n in block] for block in kept] == expected
    for block, z in zip(kept, logits, strict=True):
        for chosen, mask in zip(block, z, strict=True):
            gone = torch.ones(len(mask), dtype=torch.bool).index_fill_(0, chosen, False)
            assert chosen.tolist() == sorted(chosen.tolist()) and (mask[chosen].min() > mask[gone]).all()


def test_a_mask_that_would_be_empty_keeps_its_highest() -> None:
    shape = shape_of("llama-gqa")
    logits = random_masks(shape, hard=False)
    logits[1] = logits[1]._replace(attention_in=logits[1].attention_in - 9, neurons=logits[1].neurons - 9)
    kept = choose(logits, shape, HALF)[1]
    assert kept.attention_in.tolist() == [int(logits[1].attention_in.argmax())]
    assert kept.neurons.tolist() == [int(logits[1].neurons.argmax())]


def test_the_regulariser_vanishes_at_the_target_and_pushes_towards_it() -> None:
    def gradient(r: float) -> tuple[float, float]:
        value = torch.tensor(r, dtype=torch.float64, requires_grad=True)
        term = regulariser(value, 0.5)
        term.backward()
        assert value.grad is not None
        return term.item(), value.grad.item()

    assert gradient(0.5) == (0.0, 0.0)
    assert gradient(0.8) == pytest.approx((0.470003629, 1 / 0.8))  # log 1.6
    assert gradient(0.25) == pytest.approx((0.693147181, -1 / 0.25))


@pytest.mark.parametrize("p, sign", [(0.9, 1), (0.02, -1)])
def test_its_gradient_moves_every_mask_in_the_same_direction(p: float, sign: int) -> None:
    network = MaskNetwork(shape_of("phi"), torch.Generator().manual_seed(0))
    z = draw(network.logits(), lambda m: (m - 3).detach().requires_grad_())  # about even chances
    torch.manual_seed(0)
    masks = draw(z, lambda m: st_gumbel_sigmoid(m, 0.4))
    regulariser(kept_fraction(masks, shape_of("phi")), p).backward()
    assert all((-sign * m.grad > 0).any() and (sign * m.grad <= 0).all() for block in z for m in block)


def test_the_hypernetwork_is_the_published_one() -> None:
    """128 (4 D + F) L parameters in its heads, a GRU of 64 each way on inputs of 32, all gates open at the start."""
    shape = shape_of("opt")
    network = MaskNetwork(shape, torch.Generator().manual_seed(0))
    heads = sum(parameter.numel() for parameter in network.heads.parameters())
    assert heads == 128 * (4 * shape.hidden + shape.mlp_width) * shape.layers
    gru = network.hypernetwork.gru
    assert (gru.input_size, gru.hidden_size, gru.bidirectional) == (32, 64, True)
    assert network.hypernetwork.z_SNI.shape == (5 * shape.layers, 1, 32)
    assert [len(m) for m in network.logits()[0]] == [32, 32, 32, 64, 32]
    assert all(m.abs().max() < 2 for block in network.logits() for m in block)


def run(
    folder: Path, name: str = "llama-gqa", *, steps: int = 4, seed: int = 0, budget: Budget = HALF, **fields: Any
) -> PreTrainedModel:
    where = context(folder / "scratch", steps=steps, seed=seed, artifacts=folder)
    model = tiny_model(name, dtype=torch.float32)
    return DispLLM(**fields).compress(model, tokenizer(), budget, SmallCalibration(), where)


def trainer(folder: Path, name: str = "llama-gqa", *, steps: int = 4, budget: Budget = HALF, **fields: Any) -> Trainer:
    model = tiny_model(name, dtype=torch.float32)
    return Trainer(DispLLM(**fields), model, tokenizer(), budget, SmallCalibration(), context(folder, steps=steps))


@pytest.mark.parametrize("name", CONFIGS)
def test_contract(name: str, tmp_path: Path) -> None:
    """The predicted size, the same after loading, with and without a cache; a delta."""
    budget, shape = Budget(ratio=0.7, basis="total" if "tied" in name else "block"), shape_of(name)
    predicted = DispLLM().predict(shape, budget)
    made = run(tmp_path, name, steps=2, budget=budget)
    share, step = footprint(made).active_total, predicted.grid_step * budget.dense(shape)
    assert predicted.active_total - step <= share <= predicted.active_total
    made.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert logits(loaded).equal(logits(made))
    assert_cache_changes_nothing(loaded)
    modeling.save_delta(made, tiny_model(name, dtype=torch.float32), tmp_path / "delta")
    assert_same(modeling.load_delta(tmp_path / "delta", tiny_model(name, dtype=torch.float32)), made)


def test_whole_is_untouched(tmp_path: Path) -> None:
    model = tiny_model("phi")
    assert DispLLM().compress(model, tokenizer(), Budget(ratio=1), SmallCalibration(), context(tmp_path)) is model
    shape = shape_of("phi")
    assert DispLLM().predict(shape, Budget(ratio=1)) == Prediction(active_total=shape.total, active_block=shape.block)


@pytest.mark.parametrize("estimator", ["soft", "st", "reinmax"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_only_the_network_is_trained(name: str, estimator: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, name, estimator=estimator)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    first = {key: value.clone() for key, value in made.network.state_dict().items()}
    made.run()
    assert all(value.equal(before[key]) for key, value in made.model.state_dict().items())
    still = {key for key, value in made.network.state_dict().items() if value.equal(first[key])}
    assert still == {"hypernetwork.z_SNI"}
    assert logits(made.model).equal(logits(tiny_model(name, dtype=torch.float32)))  # hooks are gone


def test_at_p_1_the_masks_stay_on(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=20, budget=Budget(ratio=1))
    assert made.plan.target == 1
    made.run()
    assert kept_fraction(draw(made.network.logits(), lambda z: (z > -3).float()), made.shape) == 1


def test_same_seed_same_masks_and_another_seed_others(tmp_path: Path) -> None:
    one, same, other = (run(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert all(tensor.equal(same.state_dict()[key]) for key, tensor in one.state_dict().items())
    assert not logits(one).equal(logits(other))


@pytest.mark.parametrize("fields", [{}, {"estimator": "reinmax", "lam": 6.0}, {"checkpointing": True}], ids=str)
def test_resumed_equals_uninterrupted_bit_for_bit(fields: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    expected = run(tmp_path / "whole", steps=6, **fields)
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0.0)
    step = loop_module.Loop.step

    def killed(self: Any, number: int, batch: Tensor) -> dict[str, float]:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(loop_module.Loop, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", steps=6, **fields)
    assert [path.name for path in (tmp_path / "part" / "scratch" / "disp-llm").iterdir()] == ["step-000004"]
    monkeypatch.setattr(loop_module.Loop, "step", step)
    made = run(tmp_path / "part", steps=6, **fields)
    assert all(tensor.equal(made.state_dict()[key]) for key, tensor in expected.state_dict().items())


def test_recomputed_activations_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        return checkpoint(*arguments, **keywords)

    monkeypatch.setattr(recomputation, "checkpoint", counting)
    kept, plain = run(tmp_path / "a"), len(calls)
    recomputed = run(tmp_path / "b", checkpointing=True)
    assert logits(kept).equal(logits(recomputed))
    assert plain == 0 and len(calls) % 4 == 0 and calls  # four blocks, every step


@pytest.mark.parametrize(
    "changed",
    [
        {"tau": 0.7},
        {"lam": 20.0},
        {"learning_rate": 2e-3},
        {"weight_decay": 0.5},
        {"estimator": "st"},
        {"estimator": "reinmax"},
        {"steps": 3},
    ],
)
def test_every_setting_has_an_effect(changed: dict[str, Any], tmp_path: Path) -> None:
    """On what is learned; the masks of so short a training need not differ."""

    def learned(folder: Path, **settings: Any) -> Tensor:
        method = DispLLM(**{"steps": 4, **settings})
        model, budget = tiny_model("llama-gqa", dtype=torch.float32), Budget(ratio=0.6, basis="block")
        trainer = Trainer(method, model, tokenizer(), budget, SmallCalibration(), context(folder))
        trainer.run()
        with torch.no_grad():
            return torch.cat([mask_M for block in trainer.network.logits() for mask_M in block])

    assert learned(tmp_path / "a").equal(learned(tmp_path / "b"))
    assert not learned(tmp_path / "c").equal(learned(tmp_path / "d", **changed))


def test_a_setting_without_effect_is_refused() -> None:
    with pytest.raises(UserError, match=r"disp-llm.tau=0.1 has no effect beside disp-llm.estimator=reinmax"):
        methods.configure("disp-llm", {"estimator": "reinmax", "tau": "0.1"})


def test_the_log_has_the_objective_and_the_widths(tmp_path: Path) -> None:
    run(tmp_path, steps=3)
    rows = list(csv.DictReader((tmp_path / "training.csv").read_text().splitlines()))
    assert len(rows) == 3 and {"lm", "regulariser", "fraction", "attention_in.0", "mlp_out.3"} <= rows[0].keys()
    row = {key: float(value) for key, value in rows[0].items()}
    assert row["loss"] == pytest.approx(row["lm"] + 6 * row["regulariser"], rel=1e-5)
    widths = [Kept(*(row[f"{name}.{block}"] for name in Kept._fields)) for block in range(4)]
    shape = shape_of("llama-gqa")
    assert row["fraction"] == pytest.approx(sum(masked_size(w, shape) for w in widths) / prunable(shape), rel=1e-5)


@pytest.mark.parametrize("estimator", ["soft", "reinmax"])
def test_masks_far_from_their_size_are_told_and_near_ones_are_not(estimator: str, tmp_path: Path) -> None:
    """The mean of many draws is what is compared."""
    made = trainer(tmp_path, steps=2, estimator=estimator)
    made.run()
    (note,) = made.context.notes
    told = re.match(r"disp-llm: training ended with (0\.9\d\d|1\.000) .* where (0\.\d+) was the target", note)
    assert told and float(told[2]) == pytest.approx(made.plan.target, abs=5e-4)
    torch.manual_seed(0)
    with torch.no_grad():
        z = made.network.logits()
        draws = [kept_fraction(draw(z, made._hard), made.shape).item() for _ in range(200)]
    assert float(told[1]) == pytest.approx(sum(draws) / 200, abs=5e-3)
    near = trainer(tmp_path / "near", steps=2, budget=Budget(ratio=0.99, basis="block"), estimator="soft")
    near.run()
    assert near.context.notes == []


def test_a_bf16_model_trains_in_full_precision(tmp_path: Path) -> None:
    model = tiny_model("phi", dtype=torch.bfloat16)
    made = Trainer(DispLLM(), model, tokenizer(), HALF, SmallCalibration(), context(tmp_path))
    made.run()
    assert model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in made.network.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lam": -1}, "disp-llm.lam is -1, which is not between 0"),
        ({"learning_rate": float("nan")}, "disp-llm.learning_rate is nan"),
        ({"round_to": 0}, "disp-llm.round_to is 0"),
        ({"steps": 0}, "disp-llm.steps is 0"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DispLLM(**fields)


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    shape = shape_of("llama-gqa")
    with pytest.raises(UserError, match=r"ratio 0\.01 leaves disp-llm only .*Use --ratios (0\.\d+) or more") as error:
        DispLLM().predict(shape, Budget(ratio=0.01, basis="block"))
    hint = float(str(error.value).split("--ratios ")[1].split(" ")[0])
    assert DispLLM().predict(shape, Budget(ratio=hint, basis="block"))
    with pytest.raises(UserError, match="Type --dtype bfloat16"):
        half = tiny_model("opt", dtype=torch.float16)
        DispLLM().compress(half, tokenizer(), HALF, SmallCalibration(), context(tmp_path))
    short = SmallCalibration(sources={"words": sentences(1)[0].split()[:3]})
    with pytest.raises(UserError, match="shorter than one training block"):
        model = tiny_model("opt", dtype=torch.float32)
        DispLLM().compress(model, tokenizer(), HALF, short, context(tmp_path))


def test_a_model_that_gives_no_numbers_ends_in_an_error(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=40)
    with torch.no_grad():
        made.decoder.layers[1].mlp_output.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"not finite in 10 steps in a row.*disp-llm\.learning_rate"):
        made.run()


@pytest.mark.parametrize("preset, estimator, lam", [("paper", "reinmax", 6.0), ("released", "soft", 16.0)])
def test_presets(preset: str, estimator: str, lam: float) -> None:
    method: Any = methods.configure("disp-llm", {"preset": preset})
    assert (method.estimator, method.lam, method.steps, method.learning_rate) == (estimator, lam, 10_000, 1e-3)
