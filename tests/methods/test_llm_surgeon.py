"""LLM Surgeon: one shot by loops, shots, contracts, resuming."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import llm_surgeon, modeling
from methods.base import Batch, Budget, Context
from methods.errors import UserError
from methods.live_parts import projections
from methods.llm_surgeon import LLMSurgeon
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.random_structures import Random
from methods.surgery_shots import Patient
from tests.methods.test_floor import dense_shape
from tests.methods.test_kfac import naive
from tests.methods.test_slicegpt import LLAMA_2_7B
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    tiny_model,
)


def compress(
    model: PreTrainedModel, ratio: float, folder: Path, calibration: Any = None, **settings: Any
) -> PreTrainedModel:
    method, context = LLMSurgeon(**({"shots": 2} | settings)), Context(scratch=folder / "scratch", artifacts=folder)
    return method.compress(model, None, Budget(ratio=ratio), calibration or RandomCalibration(), context)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_contract(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32)
    shape = modeling.Decoder(model).shape
    assert compress(model, 1, tmp_path) is model
    predicted = LLMSurgeon().predict(shape, Budget(ratio=0.7))
    assert abs(predicted.active_total - 0.7 * shape.total) <= 1
    pruned = compress(model, 0.7, tmp_path / "first")
    counted = footprint(pruned)
    assert abs(counted.active_total - predicted.active_total) <= predicted.grid_step * shape.total / 2
    assert counted.active_block - predicted.active_block == counted.active_total - predicted.active_total
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(pruned))
    assert_cache_changes_nothing(loaded)
    again = compress(tiny_model(name, dtype=torch.float32), 0.7, tmp_path / "second")
    assert logits(again).equal(logits(pruned))


def test_published_sizes() -> None:
    shape = DecoderShape.from_config(LLAMA_2_7B)
    half = LLMSurgeon().predict(shape, Budget(ratio=0.519))  # 50 % of the projections
    linear = shape.layers * (4 * 4096**2 + 3 * 4096 * 11008)
    assert 1 - (shape.total - half.active_total) / linear == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(UserError, match="not reachable for llm-surgeon: the nearest sizes it can make keep 0.0389"):
        LLMSurgeon().predict(shape, Budget(ratio=0.02))
    assert LLMSurgeon().predict(shape, Budget(ratio=1)).active_total == shape.total


def test_a_ratio_that_leaves_the_least_works(tmp_path: Path) -> None:
    shape = dense_shape("qwen2")
    budget = Budget(ratio=(shape.layers * (7 + 3) + 2 * shape.layers * shape.norm) / shape.block, basis="block")
    context = Context(scratch=tmp_path)
    model = LLMSurgeon(shots=3).compress(tiny_model("qwen2"), None, budget, RandomCalibration(), context)  # type: ignore[arg-type]
    assert footprint(model).active_block == round(budget.ratio * shape.block) and logits(model).isfinite().all()


@dataclass(frozen=True)
class Texts:
    """These windows; what is False in the mask is padding."""

    ids: Tensor
    mask: Tensor | None = None
    sha256: str = ""

    def batches(self, size: int) -> Iterator[Batch]:
        for rows in torch.arange(len(self.ids)).split(size):
            yield Batch(self.ids[rows], None if self.mask is None else self.mask[rows])


def test_padding_and_the_size_of_batches_do_not_matter(tmp_path: Path) -> None:
    ids = torch.randint(2, 96, (6, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 12:] = False
    found = [
        compress(tiny_model("qwen2"), 0.7, tmp_path / str(place), calibration)
        for place, calibration in enumerate([Texts(ids[:, :12]), Texts(ids, mask)])
    ]
    assert logits(found[0]).equal(logits(found[1]))


def damped(M: Tensor) -> Tensor:
    return M + 0.01 * M.diagonal().mean() * torch.eye(len(M), dtype=M.dtype)


@pytest.mark.parametrize("name", ["llama-gqa", "phi"])
def test_one_shot_by_loops(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naive factors of every projection, explicit inverses, everything up to the threshold gone, both changes added."""
    calibration, model, after = RandomCalibration(samples=3), tiny_model(name), []
    texts = list(next(calibration.batches(3)).input_ids)
    monkeypatch.setattr(Patient, "save", lambda self: after.append([dict(block) for block in self.alive]))
    monkeypatch.setattr(llm_surgeon, "pack", lambda model, alive: model)
    compress(model, 0.8, tmp_path, calibration, shots=1)
    threshold = json.loads((tmp_path / "llm-surgeon.json").read_text())["shots"][0]["threshold"]
    dense = tiny_model(name)
    layers = zip(modeling.Decoder(dense).layers, modeling.Decoder(model).layers, after[0], strict=True)
    removed = 0
    for layer, pruned, alive in layers:
        for role, linear in projections(layer).items():
            a, g, _ = naive(dense, linear, texts)
            W = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], 1)
            W, G, A = W.detach(), g.T @ g, a.T @ a
            P_G, P_A = torch.linalg.inv(damped(G)), torch.linalg.inv(damped(A))
            rows = torch.tensor([float(w @ A @ w / P_G[r, r] / 2) for r, w in enumerate(W)]) <= threshold * (1 + 1e-9)
            columns = torch.tensor([float(w @ G @ w / P_A[c, c] / 2) for c, w in enumerate(W.T)])
            columns = columns <= threshold * (1 + 1e-9)
            inner = torch.arange(linear.in_features)
            columns[linear.in_features :] = False  # the bias
            for cheap, living in ((rows, alive[role].rows), (columns[inner], alive[role].columns)):
                assert (cheap & living).sum() <= 1  # the last of its projection
                cheap &= ~living
            columns[inner] &= ~alive[role].columns
            by_rows = P_G[:, rows] @ torch.linalg.solve(P_G[rows][:, rows], W[rows])
            by_columns = torch.linalg.solve(P_A[columns][:, columns], W[:, columns].T).T @ P_A[columns]
            expected = W - by_rows - by_columns
            expected[~alive[role].rows] = 0
            expected[:, inner[~alive[role].columns]] = 0
            found = projections(pruned)[role]
            torch.testing.assert_close(found.weight, expected[:, inner], rtol=1e-7, atol=1e-9)
            assert found.bias is None or torch.allclose(found.bias, expected[:, -1], rtol=1e-7, atol=1e-9)
            removed += int(rows.sum() + columns.sum())
    assert removed > 50


def test_sizes_fall_linearly_and_the_curvature_is_measured_anew(tmp_path: Path) -> None:
    shape = dense_shape("llama-gqa")
    compress(tiny_model("llama-gqa"), 0.6, tmp_path, shots=5)
    content = json.loads((tmp_path / "llm-surgeon.json").read_text())
    dense, goal = shape.layers * (shape.attention + shape.mlp), content["goal"]
    assert dense - goal == shape.total - round(0.6 * shape.total)
    sizes = [shot["parameters"] for shot in content["shots"]]
    assert sizes == sorted(sizes, reverse=True)
    for number, size in enumerate(sizes, 1):
        assert abs(size - (dense - (dense - goal) * number / 5)) <= 3 * shape.hidden / 2 + 1
    losses = [shot["loss"] for shot in content["shots"]]
    assert len(set(losses)) == 5 and all(shot["threshold"] > 0 == shot["strained"] for shot in content["shots"])


def test_what_is_dead_stays_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    save = Patient.save

    def watch(self: Patient) -> None:
        seen.append([side.clone() for block in self.alive for part in block.values() for side in part])
        for block, linears in zip(self.alive, self._projections, strict=True):
            for role, part in block.items():
                assert not linears[role].weight[~part.rows].any() and not linears[role].weight[:, ~part.columns].any()
        save(self)

    monkeypatch.setattr(Patient, "save", watch)
    compress(tiny_model("phi"), 0.5, tmp_path, shots=4)
    for before, after in pairwise(seen):
        assert not any((now & ~then).any() for then, now in zip(before, after, strict=True))
    assert len(seen) == 4


class Killed(BaseException):
    """In place of a signal."""


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_a_killed_run_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(compress(tiny_model(name), 0.6, tmp_path / "whole", shots=4))
    operate = Patient.operate

    def die(self: Patient, *args: Any) -> None:
        if len(self.history) == 2:
            raise Killed
        operate(self, *args)

    monkeypatch.setattr(Patient, "operate", die)
    with pytest.raises(Killed):
        compress(tiny_model(name), 0.6, tmp_path, shots=4)
    with pytest.raises(UserError, match="is of another calibration. Remove it"):
        compress(tiny_model(name), 0.6, tmp_path, RandomCalibration(sha256="1" * 64), shots=4)
    with pytest.raises(UserError, match="is of another settings and another goal"):
        compress(tiny_model(name), 0.5, tmp_path, shots=5)
    done = []
    monkeypatch.setattr(Patient, "operate", lambda self, *args: (done.append(args), operate(self, *args)))
    assert logits(compress(tiny_model(name), 0.6, tmp_path, shots=4)).equal(expected)
    assert len(done) == 2
    content = json.loads((tmp_path / "llm-surgeon.json").read_text())
    assert content["shots"] == json.loads((tmp_path / "whole" / "llm-surgeon.json").read_text())["shots"]


def error(model: PreTrainedModel, name: str = "llama-mha") -> float:
    ids = next(RandomCalibration().batches(12)).input_ids
    return float((logits(model, ids) - logits(tiny_model(name), ids)).square().mean())


def test_error_grows_as_the_model_shrinks(tmp_path: Path) -> None:
    ratios = (1, 0.95, 0.8, 0.6)
    errors = [error(compress(tiny_model("llama-mha"), ratio, tmp_path / str(ratio))) for ratio in ratios]
    assert errors == sorted(errors) and errors[0] == 0 < errors[1]


@pytest.mark.parametrize("name", ["llama-mha", "phi"])
def test_it_is_better_than_lots(name: str, tmp_path: Path) -> None:
    budget, context = Budget(ratio=0.7), Context(scratch=tmp_path)
    by_lot = Random().compress(tiny_model(name), None, budget, RandomCalibration(), context)  # type: ignore[arg-type]
    assert error(compress(tiny_model(name), 0.7, tmp_path), name) < error(by_lot, name) / 3


def test_every_setting_has_an_effect(tmp_path: Path) -> None:
    def outcome(**settings: Any) -> Tensor:
        folder = tmp_path / repr(settings)
        return logits(compress(tiny_model("llama-gqa"), 0.6, folder, **settings))

    changes = [{"shots": 3}, {"damp_g": 0.5}, {"damp_a": 0.5}, {"update": "joint"}, {"max_correlate": 2}]
    changes.append({"power_iterations": 1})
    found = [outcome(), *(outcome(**change) for change in changes)]
    for place, one in enumerate(found):
        assert all(not torch.allclose(one, other, rtol=1e-9) for other in found[place + 1 :])
    assert outcome(factors="host").equal(found[0])


SOME = [61, 51, 95, 66, 51, 92, 85, 40, 9, 94, 49, 51, 41, 21, 43, 47, 27, 82, 35, 53, 7, 94, 95, 4]


@pytest.mark.parametrize("texts", [torch.full((2, 16), 7), torch.tensor([[5, 6, 7]]), torch.tensor([SOME])])
def test_poor_texts_still_give_a_model(texts: Tensor, tmp_path: Path) -> None:
    """One token all over, or fewer tokens than any matrix is wide: damping decides."""
    for name in ("llama-gqa", "opt"):
        context = Context(scratch=tmp_path / name)
        method = LLMSurgeon(shots=2, damp_a=0)
        pruned = method.compress(tiny_model(name), None, Budget(ratio=0.6), Texts(texts), context)  # type: ignore[arg-type]
        assert logits(pruned).isfinite().all()
        few, damped = f"{texts.numel()} calibration tokens are fewer", "took more damping than asked"
        assert any(few in note for note in context.notes) and any(damped in note for note in context.notes)


def test_nothing_unusual_is_not_noted(tmp_path: Path) -> None:
    context = Context(scratch=tmp_path)
    LLMSurgeon(shots=2).compress(tiny_model("phi"), None, Budget(ratio=0.6), RandomCalibration(), context)  # type: ignore[arg-type]
    assert not context.notes


def test_half_precision_is_computed_in_full(tmp_path: Path) -> None:
    pruned = compress(tiny_model("llama-gqa", dtype=torch.bfloat16), 0.6, tmp_path)
    full = compress(tiny_model("llama-gqa", dtype=torch.bfloat16).float(), 0.6, tmp_path / "full")
    assert pruned.dtype == torch.bfloat16
    mine, its = pruned.state_dict(), full.state_dict()
    assert mine.keys() == its.keys() and all(mine[name].equal(its[name].to(mine[name].dtype)) for name in mine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 0}, "shots is 0; the least is 1"),
        ({"max_correlate": -1}, "max_correlate is -1; the least is 0"),
        ({"power_iterations": -1}, "power_iterations is -1"),
        ({"damp_g": -0.1}, "damp_g is -0.1 .* between 0 and 1"),
        ({"damp_a": float("nan")}, "damp_a nan: both are shares"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLMSurgeon(**settings)


def test_unmeasurable_models_and_texts_are_refused(tmp_path: Path) -> None:
    for empty in (RandomCalibration(samples=0), Texts(torch.tensor([[3], [4]]))):
        with pytest.raises(UserError, match="calibration text is empty"):
            compress(tiny_model("phi"), 0.7, tmp_path, empty)
    broken = tiny_model("llama-gqa")
    modeling.Decoder(broken).layers[1].mlp_output.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="overflows"):
        compress(broken, 0.7, tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, context = Budget(ratio=0.8, basis="block"), Context(scratch=tmp_path)
    method = LLMSurgeon(shots=2)

    def compress(seed: int) -> PreTrainedModel:
        return method.compress(tiny_model("llama-gqa", seed=seed), None, budget, RandomCalibration(), context)  # type: ignore[arg-type]

    first = compress(0)
    assert logits(compress(0)).equal(logits(first))
    with pytest.raises(UserError, match=r"is of another model\. Remove it"):
        compress(1)
