"""Gradients of samples and the scores made of them, against autograd sample by sample and loops over rows."""

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods import modeling
from methods.base import Batch, Silent
from methods.errors import UserError
from methods.gradients import Moments, gradient_moments, next_token_loss, snippets
from methods.importance import Importance
from tests.methods.tiny import ONE_PER_FAMILY, RandomCalibration, logits, some_ids, tiny_model

GRADIENT_MEASURES = ["vectorize", "param_first", "param_second", "param_mix"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def moments_of(model: PreTrainedModel, ids: Tensor, squares: bool = True) -> dict[nn.Parameter, Moments]:
    return gradient_moments(model, list(model.parameters()), ids, Silent(), squares=squares)


def naive_gradients(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, ...]]:
    """Of every sample's mean loss with respect to all parameters."""
    gradients = []
    for row in ids:
        chances = model(input_ids=row[None]).logits[0].log_softmax(-1)
        loss = -sum(chances[t - 1, row[t]] for t in range(1, len(row))) / (len(row) - 1)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))  # type: ignore[arg-type]
    return gradients


@pytest.mark.parametrize("name", [*ONE_PER_FAMILY, "llama-tied"])
def test_moments_equal_those_of_single_samples(name: str) -> None:
    model, ids = tiny_model(name), some_ids(3, 8)
    found, expected = moments_of(model, ids), zip(*naive_gradients(model, ids), strict=True)
    for parameter, gradients in zip(model.parameters(), expected, strict=True):
        mean, square = found[parameter]
        torch.testing.assert_close(mean, torch.stack(gradients).mean(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(square, torch.stack(gradients).square().mean(0), rtol=1e-9, atol=1e-12)
    assert all(square is None for _, square in moments_of(model, ids, squares=False).values())


def test_the_model_is_left_as_it_was_and_gradients_are_fp32() -> None:
    model, ids = tiny_model("llama-gqa", dtype=torch.bfloat16), some_ids(2, 8)
    model.model.norm.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    required = [parameter.requires_grad for parameter in model.parameters()]
    weight = modeling.Decoder(model).layers[1].mlp_output.weight
    found = gradient_moments(model, [weight], ids, Silent(), squares=False)
    after = dict(chain(model.named_parameters(), model.named_buffers()))
    assert all(after[name].dtype == tensor.dtype and after[name].equal(tensor) for name, tensor in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    exact = tiny_model("llama-gqa", dtype=torch.bfloat16).float()
    for name, buffer in model.named_buffers():
        exact.get_buffer(name).copy_(buffer)
    expected = moments_of(exact, ids)[modeling.Decoder(exact).layers[1].mlp_output.weight].mean
    assert found.keys() == {weight} and found[weight].mean.dtype == torch.float32
    torch.testing.assert_close(found[weight].mean, expected, rtol=1e-5, atol=1e-8)


def test_an_overflow_is_an_error_and_leaves_the_model_alone() -> None:
    model = tiny_model("llama-gqa", dtype=torch.bfloat16)
    modeling.Decoder(model).layers[1].mlp_output.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="overflows"):
        moments_of(model, some_ids(2, 8))
    assert model.dtype == torch.bfloat16


@given(
    samples=st.integers(1, 6),
    padded=st.integers(0, 12),
    count=st.integers(1, 10),
    length=st.integers(2, 20),
    seed=st.integers(0, 99),
)
def test_snippets_are_stretches_of_different_windows(
    samples: int, padded: int, count: int, length: int, seed: int
) -> None:
    text = RandomCalibration(samples=samples, window=16, padded=padded)
    windows = torch.cat([ids for ids, _ in text.batches(4)])[:, : 16 - padded].tolist()
    found = snippets(text, count, length, 4, torch.Generator().manual_seed(seed))
    assert found.shape == (count, min(length, 16 - padded))
    places = []
    for row in found.tolist():
        whole = [w for w, window in enumerate(windows) for at in range(16) if window[at : at + len(row)] == row]
        assert whole
        places.append(set(whole))
    if found.shape[1] > 4:  # short ones may be found in several windows
        for start in range(0, count, samples):
            turn = [tuple(place) for place in places[start : start + samples]]
            assert len(set(turn)) == len(turn)
    assert found.equal(snippets(text, count, length, 4, torch.Generator().manual_seed(seed)))


def test_snippets_begin_anywhere() -> None:
    text = RandomCalibration(samples=1, window=16)
    (window,) = next(text.batches(1)).input_ids.tolist()
    starts = {window.index(row[0]) for row in snippets(text, 200, 10, 1, generator()).tolist()}
    assert starts == {window.index(window[place]) for place in range(7)}


class Ragged(RandomCalibration):
    """One long window and three short ones."""

    def batches(self, size: int) -> Iterator[Batch]:
        mask = torch.ones(4, 16, dtype=torch.bool)
        mask[1:, 5:] = False
        yield Batch(some_ids(4, 16), mask)


def test_short_windows_are_left_out() -> None:
    (long, *_) = some_ids(4, 16)
    found = snippets(Ragged(), 3, 16, 4, generator())
    assert all(row.equal(long) for row in found)
    assert snippets(Ragged(), 3, 64, 4, generator()).equal(found)


@pytest.mark.parametrize(
    "text", [RandomCalibration(samples=0), RandomCalibration(padded=15), RandomCalibration(window=1)]
)
def test_nothing_to_measure(text: RandomCalibration) -> None:
    with pytest.raises(UserError, match="calibration text is empty"):
        snippets(text, 3, 8, 4, generator())


def naive_score(measure: str, triples: list[tuple[float, float, float]]) -> float:
    """Of a row's or column's weights, gradients and squared gradients."""
    if measure == "vectorize":
        return abs(sum(w * g for w, g, _ in triples))
    each = {
        "param_first": lambda w, g, f: abs(w * g),
        "param_second": lambda w, g, f: abs(w * w * f),
        "param_mix": lambda w, g, f: abs(w * g - 0.5 * w * w * f),
        "l1": lambda w, g, f: abs(w),
        "l2": lambda w, g, f: w * w,
    }[measure]
    return sum(each(*triple) for triple in triples)


def triples(moments: dict, parameter: nn.Parameter, *index: object) -> list[tuple[float, float, float]]:
    """The three numbers of some entries."""
    tensors = [parameter.detach(), *moments[parameter]]
    return list(zip(*(tensor[index].reshape(-1).tolist() for tensor in tensors), strict=True))


@pytest.mark.parametrize("measure", [*GRADIENT_MEASURES, "l1", "l2"])
def test_scores_of_rows_and_columns(measure: str) -> None:
    model = tiny_model("phi")
    found = moments_of(model, some_ids(3, 8))
    importance = Importance(measure, found, generator())  # type: ignore[arg-type]
    decoder = modeling.Decoder(model)
    layer, table = decoder.layers[1], decoder.embeddings[0]
    up, down, norm = layer.mlp_inputs[0], layer.mlp_output, layer.attention_norm
    rows = [naive_score(measure, triples(found, up.weight, i) + triples(found, up.bias, i)) for i in range(64)]
    columns = [naive_score(measure, triples(found, down.weight, slice(None), j)) for j in range(64)]
    entries = [
        naive_score(measure, [t for name in ("weight", "bias") for t in triples(found, norm.get_parameter(name), j)])
        for j in range(32)
    ]
    channels = [naive_score(measure, triples(found, table.weight, slice(None), j)) for j in range(32)]
    assert importance.rows(up).tolist() == pytest.approx(rows)
    assert importance.columns(down).tolist() == pytest.approx(columns)
    assert importance.rows(norm).tolist() == pytest.approx(entries)
    assert importance.columns(table).tolist() == pytest.approx(channels)


def test_second_order_with_one_sample_is_the_squared_first_order() -> None:
    model = tiny_model("llama-gqa")
    found = moments_of(model, some_ids(1, 8))
    linear = modeling.Decoder(model).layers[2].mlp_output
    expected = (found[linear.weight].mean * linear.weight).square().sum(0)
    torch.testing.assert_close(Importance("param_second", found, generator()).columns(linear), expected.detach())


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_the_first_order_score_is_the_loss_change(name: str) -> None:
    """|sum w g| of a row is what the loss loses per unit by which the row is shrunk."""
    model, ids = tiny_model(name), some_ids(2, 8)
    importance = Importance("vectorize", moments_of(model, ids, squares=False), generator())
    layer, shrink = modeling.Decoder(model).layers[1], 1e-5

    @torch.no_grad()
    def loss() -> float:
        return sum(float(next_token_loss(model, row)) for row in ids) / len(ids)

    up, down = layer.mlp_inputs[-1], layer.mlp_output
    before = loss()
    for index in (0, 7):
        for score, parts in (
            (
                importance.rows(up)[index],
                [up.weight.data[index]] + ([up.bias.data[index]] if up.bias is not None else []),
            ),
            (importance.columns(down)[index], [down.weight.data[:, index]]),
        ):
            for part in parts:
                part.mul_(1 - shrink)
            change = abs(loss() - before) / shrink
            for part in parts:
                part.div_(1 - shrink)
            assert change == pytest.approx(float(score), rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("measure", GRADIENT_MEASURES)
def test_permuted_channels_have_permuted_scores(measure: str) -> None:
    model, ids, order = tiny_model("llama-gqa"), some_ids(2, 8), torch.randperm(48, generator=generator())

    def scores() -> Tensor:
        importance = Importance(measure, moments_of(model, ids), generator())  # type: ignore[arg-type]
        layer = modeling.Decoder(model).layers[1]
        return torch.stack([*map(importance.rows, layer.mlp_inputs), importance.columns(layer.mlp_output)])

    before, expected = scores(), logits(model)
    modeling.narrow_mlp(modeling.Decoder(model).layers[1], order)
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores(), before[:, order], rtol=1e-8, atol=1e-14)


def test_lots_come_from_the_generator() -> None:
    linear = nn.Linear(6, 4)
    first, second = (Importance("random", {}, generator()) for _ in range(2))
    drawn = first.rows(linear), first.columns(linear)
    assert [len(lots) for lots in drawn] == [4, 6]
    assert second.rows(linear).equal(drawn[0]) and second.columns(linear).equal(drawn[1])
    assert not first.rows(linear).equal(drawn[0])
