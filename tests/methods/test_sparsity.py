"""Patterns, masks and sizes against loops and counts, and the contracts of every method that prunes weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods import modeling
from methods.base import Batch, Budget, Context
from methods.errors import UserError
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.modeling.structures import sparse_linears
from methods.modeling.structures.sparse_linears import SparseLinear, unpack
from methods.sparsity import Density, group_of, highest_of_rows
from tests.methods.pruned import best, of_groups, weights
from tests.methods.test_floor import dense_shape
from tests.methods.test_slicegpt import LLAMA_2_7B
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    tiny_model,
)

METHODS = ["magnitude", "wanda", "sparsegpt", "pruner-zero"]
LEAVING = ["magnitude", "wanda", "pruner-zero"]
"""Those that update nothing."""
CALIBRATION = RandomCalibration()


def asked(ratio: float = 0.5, tolerance: float | None = 0.2) -> Budget:
    return Budget(ratio=ratio, basis="block", tolerance=tolerance)


def pruned(
    name: str, model: PreTrainedModel, scratch: Path, calibration: Any = CALIBRATION, ratio: float = 0.5, **fields: str
) -> tuple[PreTrainedModel, Context]:
    context = Context(scratch=scratch)
    method = methods.configure(name, fields)
    return method.compress(model, None, asked(ratio), calibration, context), context  # type: ignore[arg-type]


def parts(model: PreTrainedModel) -> dict[str, SparseLinear]:
    layers = modeling.Decoder(model).layers
    every = [(f"{i}.{name}", part) for i, layer in enumerate(layers) for name, part in layer.module.named_modules()]
    return {name: part for name, part in every if isinstance(part, SparseLinear)}


def kept(part: SparseLinear) -> Tensor:
    return unpack(part.mask, part.in_features)


# Masks

SCORES = st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5, -1.0]), min_size=8, max_size=8), min_size=1, max_size=4)


@given(rows=SCORES, n=st.integers(1, 7), m=st.sampled_from([2, 4, 8]))
def test_n_of_m_stay_the_first_among_equals(rows: list[list[float]], n: int, m: int) -> None:
    scores = torch.tensor(rows)
    if n < m:
        assert Density(n / m, (n, m)).mask(scores).equal(of_groups(scores, n, m))


@given(rows=SCORES, count=st.integers(0, 32))
def test_without_groups_rows_keep_equally_many(rows: list[list[float]], count: int) -> None:
    if count > 8 * len(rows):
        return
    mask = highest_of_rows(torch.tensor(rows), count)
    assert int(mask.sum()) == count
    for index, (row, found) in enumerate(zip(rows, mask, strict=True)):
        each = count // len(rows) + (index < count % len(rows))
        assert set(found.nonzero()[:, 0].tolist()) == best(row, each)


def test_scores_that_are_no_numbers_are_an_error() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="overflows"):
            Density(0.5, (2, 4)).mask(torch.tensor([[1.0, bad, 2.0, 3.0]]))


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "2", "2:", "a:4", "2:4:8", "-1:4", "", "2 :4", "²:4"])
def test_patterns_that_make_no_sense_are_refused(pattern: str) -> None:
    for name in METHODS:
        with pytest.raises(UserError, match="Type for example 2:4"):
            methods.configure(name, {"pattern": pattern})
    assert group_of("unstructured") is None and group_of("4:8") == (4, 8)


# Sizes


@pytest.mark.parametrize("method", METHODS)
def test_llama_2_7b_keeps_half_of_its_projections(method: str) -> None:
    shape = DecoderShape.from_config(LLAMA_2_7B)
    predicted = methods.configure(method, {}).predict(shape, Budget(ratio=0.519))
    assert predicted is not None and predicted.active_total / shape.total == pytest.approx(0.5195, abs=5e-4)
    assert shape.total - predicted.active_total == 32 * (4 * 4096**2 + 3 * 4096 * 11008) // 2
    with pytest.raises(UserError, match=rf"ratio 0.5 is not reachable for {method}.*Use --ratios 0.519"):
        methods.configure(method, {}).predict(shape, Budget(ratio=0.5))
    one = methods.configure(method, {}).predict(shape, Budget(ratio=1))
    assert one is not None and one.active_total == shape.total
    for ratio in (0.7, 0.5):
        free = methods.configure(method, {"pattern": "unstructured"}).predict(shape, Budget(ratio=ratio))
        assert free is not None and abs(free.active_total - ratio * shape.total) <= 32 * 7 / 2


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4, deadline=None)
@given(ratio=st.floats(0.2, 0.999), basis=st.sampled_from(["total", "block"]), method=st.sampled_from(METHODS))
def test_prediction_equals_the_count_of_the_tensors(
    name: str, ratio: float, basis: Any, method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, budget = dense_shape(name), Budget(ratio=ratio, basis=basis, tolerance=1)
    for pattern in ("unstructured", "1:4"):
        configured = methods.configure(method, {"pattern": pattern})
        predicted, model = configured.predict(shape, budget), tiny_model(name, dtype=torch.float32)
        few, context = RandomCalibration(samples=2), Context(scratch=tmp_path_factory.mktemp("scratch"))
        counted = footprint(configured.compress(model, None, budget, few, context))  # type: ignore[arg-type]
        assert predicted is not None
        assert (predicted.active_total, predicted.active_block) == (counted.active_total, counted.active_block)
        if pattern == "unstructured" and configured.density(shape, budget).share > 0.01:  # type: ignore[attr-defined]
            achieved = budget.achieved(predicted.active_total, predicted.active_block, shape)
            assert abs(achieved - ratio) <= predicted.grid_step / 2 + 1e-12


@given(
    ratio=st.floats(0.01, 0.999),
    basis=st.sampled_from(["total", "block"]),
    pattern=st.sampled_from(["2:4", "unstructured"]),
)
def test_a_ratio_is_met_or_refused_with_one_that_works(ratio: float, basis: Any, pattern: str) -> None:
    shape, method = DecoderShape.from_config(LLAMA_2_7B), methods.configure("wanda", {"pattern": pattern})
    try:
        method.predict(shape, Budget(ratio=ratio, basis=basis, tolerance=1e-4))
    except UserError as error:
        hint = float(str(error).partition("--ratios ")[2].partition(",")[0])
        method.predict(shape, Budget(ratio=hint, basis=basis, tolerance=1e-4))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_make_no_groups_are_named(method: str, tmp_path: Path) -> None:
    odd = tiny_model("llama-gqa", dtype=torch.float32, intermediate_size=50)
    with pytest.raises(
        UserError, match=rf"cannot keep 2:4 of the down projection: it reads 50 .* {method}.pattern=unst"
    ):
        pruned(method, odd, tmp_path)
    with pytest.raises(UserError, match="cannot keep 2:3 of the query projection: it reads 32"):
        pruned(method, odd, tmp_path, pattern="2:3", **({"blocksize": "120"} if method == "sparsegpt" else {}))
    pruned(method, odd, tmp_path, pattern="unstructured")


@pytest.mark.parametrize("name", ["llama-gqa", "phi"])
def test_magnitude_keeps_the_largest_of_a_group_or_of_a_matrix(name: str, tmp_path: Path) -> None:
    dense = weights(tiny_model(name))
    groups, _ = pruned("magnitude", tiny_model(name), tmp_path, pattern="3:8", ratio=0.4)
    matrix, _ = pruned("magnitude", tiny_model(name), tmp_path, pattern="unstructured")
    for key, W in dense.items():
        assert kept(parts(groups)[key]).equal(of_groups(W.abs(), 3, 8))
        found = kept(parts(matrix)[key])
        assert W[found].abs().min() > W[~found].abs().max()


# Contracts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_exactly_half_of_every_group_stays_and_nothing_else_changes(method: str, name: str, tmp_path: Path) -> None:
    model, before = tiny_model(name, dtype=torch.float32), tiny_model(name, dtype=torch.float32)
    small, context = pruned(method, model, tmp_path)
    dense = weights(before)
    assert parts(small).keys() == dense.keys()
    for key, part in parts(small).items():
        assert (kept(part).unflatten(1, (-1, 4)).sum(2) == 2).all() and (part.values != 0).all()
        if method in LEAVING:
            assert part.values.equal(dense[key][kept(part)])
    state = small.state_dict()
    for key, tensor in before.state_dict().items():
        if key in state:  # embeddings, head, norms and biases
            assert state[key].equal(tensor)
    assert not any("weight" in key and "layers" in key and "norm" not in key for key in state)
    count = len(dense)
    assert any(note.startswith(f"{count} of {count}") and "no speed-up" in note for note in context.notes)
    assert all(part._made is None for part in parts(small).values())  # a dense copy of the model that nobody asked for


def test_a_note_says_how_many_projections_run_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All, none, or those whose sizes the kernels take: here query and output."""
    monkeypatch.setattr(sparse_linears, "has_sparse_cores", lambda device, dtype: True)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "dtype": torch.bfloat16}
    for width, expected in ((48, ["20 of 28"]), (64, ["8 of 28"])):
        _, context = pruned("magnitude", tiny_model("llama-gqa", intermediate_size=width, **sizes), tmp_path)
        assert [note.partition(" pruned")[0] for note in context.notes] == expected
    sizes["num_key_value_heads"] = 2
    assert not pruned("magnitude", tiny_model("llama-gqa", intermediate_size=64, **sizes), tmp_path)[1].notes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_checkpoints_come_back_bitwise_and_generate(method: str, name: str, tmp_path: Path) -> None:
    for pattern in ("2:4", "unstructured"):
        twice = [pruned(method, tiny_model(name, dtype=torch.float32), tmp_path, pattern=pattern)[0] for _ in range(2)]
        twice[0].save_pretrained(tmp_path / pattern.replace(":", "of"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / pattern.replace(":", "of"))
        assert logits(loaded).equal(logits(twice[0])) and logits(twice[1]).equal(logits(twice[0]))
        assert_cache_changes_nothing(loaded)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_one_is_the_model_itself(method: str, tmp_path: Path) -> None:
    model = tiny_model("phi")
    assert pruned(method, model, tmp_path, ratio=1)[0] is model


@dataclass(frozen=True)
class Padded(RandomCalibration):
    """Windows that end in padding of some kind."""

    filler: int = 5

    def batches(self, size: int) -> Iterator[Batch]:
        for ids, mask in super().batches(size):
            assert mask is not None
            yield Batch(torch.where(mask, ids, self.filler), mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama-gqa", "phi", "opt"])
def test_padding_does_not_count(method: str, name: str, tmp_path: Path) -> None:
    one, other = (pruned(method, tiny_model(name), tmp_path, Padded(padded=5, filler=f))[0] for f in (5, 50))
    assert logits(one).equal(logits(other))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_through(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small, _ = pruned(method, tiny_model("qwen2", dtype=dtype), tmp_path)
    assert all(part.values.dtype == dtype for part in parts(small).values()) and logits(small).isfinite().all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "pruner-zero"])
def test_no_text_and_no_numbers_are_errors(method: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="calibration"):
        pruned(method, tiny_model("llama-gqa"), tmp_path, RandomCalibration(samples=0))
    model = tiny_model("llama-gqa")
    modeling.Decoder(model).layers[1].mlp_inputs[0].weight.data[0] = float("nan")
    with pytest.raises(UserError, match="overflows on the calibration text"):
        pruned(method, model, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_more_goes_where_less_is_asked(method: str, tmp_path: Path) -> None:
    """The error of the first block on what enters it grows."""
    dense = modeling.Decoder(tiny_model("llama-gqa"))
    (x,), (keywords,) = (lambda s: (s.batches, s.keywords))(modeling.Signals.of(dense, CALIBRATION, 12))
    errors = []
    for ratio in (0.9, 0.75, 0.6, 0.4):
        small, _ = pruned(method, tiny_model("llama-gqa"), tmp_path, ratio=ratio, pattern="unstructured")
        with torch.no_grad():
            difference = modeling.Decoder(small).layers[0].module(x, **keywords) - dense.layers[0].module(x, **keywords)
        errors.append(difference.square().mean().item())
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]
