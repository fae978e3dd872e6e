"""Pruner-Zero against autograd one sample at a time, and what must not matter to its masks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import methods
from methods import modeling
from methods.base import Context
from methods.errors import UserError
from methods.pruner_zero import scores
from methods.sparsity import Density
from tests.methods.pruned import best, of_groups, share_of, weights
from tests.methods.test_sparsity import kept, parts, pruned
from tests.methods.test_wanda import normal
from tests.methods.tiny import CONFIGS, RandomCalibration, tiny_model

TWO_OF_FOUR = Density(0.5, (2, 4))


def score(W: Tensor, G: Tensor) -> Tensor:
    return scores(W, G, Context(scratch=Path()))


def gradients(name: str, calibration: Any, together: bool = False, samples: int | None = None) -> dict[str, Tensor]:
    """100 g of every sample, squared and summed, and the root; or squared after the sum."""
    model, total = tiny_model(name), {}
    texts = [ids[mask] for b in calibration.batches(1) for ids, mask in zip(b.input_ids, b.mask, strict=True)]
    for ids in texts[:samples]:
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for i, layer in enumerate(modeling.Decoder(model).layers):
            for part, parameter in layer.module.named_parameters():
                g = 100 * parameter.grad.detach().clone()  # type: ignore[union-attr]
                key = f"{i}.{part.removesuffix('.weight')}"
                total[key] = total.get(key, 0) + (g if together else g.square())
    return {key: g.abs() if together else g.sqrt() for key, g in total.items()}


def naive_masks(name: str, G: dict[str, Tensor], pattern: str, share: float = 0.5) -> dict[str, Tensor]:
    masks = {}
    for key, W in weights(tiny_model(name)).items():
        S = (W * W).abs() * (G[key] - G[key].min()) / (G[key].max() - G[key].min())
        if pattern == "unstructured":
            each, rest = divmod(round(share * W.numel()), len(W))
            masks[key] = torch.zeros_like(W, dtype=torch.bool)
            for i, row in enumerate(S.tolist()):
                masks[key][i, sorted(best(row, each + (i < rest)))] = True
        else:
            masks[key] = of_groups(S, 2, 4)
    return masks


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_method_equals_the_naive_one(name: str, pattern: str, tmp_path: Path) -> None:
    calibration, dense = RandomCalibration(samples=5, padded=3), tiny_model(name)
    small, context = pruned("pruner-zero", dense, tmp_path, calibration, ratio=0.6, pattern=pattern)
    share = share_of(tiny_model(name), 0.6)
    expected = naive_masks(name, gradients(name, calibration), pattern, share)
    assert {key: kept(part) for key, part in parts(small).items()}.keys() == expected.keys()
    for key, part in parts(small).items():
        assert kept(part).equal(expected[key])
    assert not any("magnitude" in note for note in context.notes) and not [*tmp_path.iterdir()]


def test_samples_are_squared_one_by_one_and_counted(tmp_path: Path) -> None:
    calibration = RandomCalibration(samples=5, padded=3)
    small, _ = pruned("pruner-zero", tiny_model("qwen2"), tmp_path, calibration)
    together = naive_masks("qwen2", gradients("qwen2", calibration, together=True), "2:4")
    assert any(not kept(part).equal(together[key]) for key, part in parts(small).items())
    two, _ = pruned("pruner-zero", tiny_model("qwen2"), tmp_path, calibration, samples="2")
    expected = naive_masks("qwen2", gradients("qwen2", calibration, samples=2), "2:4")
    assert all(kept(part).equal(expected[key]) for key, part in parts(two).items())
    assert any(not kept(part).equal(kept(parts(two)[key])) for key, part in parts(small).items())


@given(seed=st.integers(0, 99), factor=st.floats(1e-3, 1e3))
def test_scale_of_gradients_and_sign_of_weights_do_not_matter(seed: int, factor: float) -> None:
    W, G = normal(6, 12, seed=seed), normal(6, 12, seed=seed + 100).abs()
    expected = TWO_OF_FOUR.mask(score(W, G))
    assert TWO_OF_FOUR.mask(score(W, factor * G)).equal(expected)
    assert TWO_OF_FOUR.mask(score(-W, G)).equal(expected)


def test_the_weight_of_least_gradient_is_worth_nothing() -> None:
    W, G = normal(6, 12, seed=0), normal(6, 12, seed=1).abs()
    G[3, 7], W[3, 7] = 0, 1000
    assert score(W, G)[3, 7] == 0 and score(W, G).min() == 0


def test_gradients_that_are_all_alike_leave_magnitude_and_it_is_told(tmp_path: Path) -> None:
    W, context = normal(6, 12, seed=0), Context(scratch=tmp_path)
    for G in (torch.full_like(W, 0.3), torch.zeros_like(W)):
        assert TWO_OF_FOUR.mask(scores(W, G, context)).equal(TWO_OF_FOUR.mask(W.abs()))
    assert len(context.notes) == 1 and "pruned by magnitude" in context.notes[0]
    silent = tiny_model("opt")
    silent.model.decoder.layers[1].fc1.weight.data.abs_()
    silent.model.decoder.layers[1].fc1.bias.data.fill_(-100)  # no neuron fires
    dense = weights(silent)
    values = {key: W.clone() for key, W in dense.items()}
    small, context = pruned("pruner-zero", silent, tmp_path)
    for key in ("1.fc1", "1.fc2"):
        assert kept(parts(small)[key]).equal(of_groups(values[key].abs(), 2, 4))
    assert any("pruned by magnitude" in note for note in context.notes)


def test_the_model_is_not_changed_by_looking(tmp_path: Path) -> None:
    """Gradients are taken in fp32, of weights that come back as they were; nothing is left to train."""
    small, _ = pruned("pruner-zero", tiny_model("phi", dtype=torch.bfloat16), tmp_path)
    dense = weights(tiny_model("phi", dtype=torch.bfloat16))
    for key, part in parts(small).items():
        assert part.values.equal(dense[key][kept(part)]) and part.values.grad is None
    full, _ = pruned("pruner-zero", tiny_model("phi", dtype=torch.bfloat16).float(), tmp_path)
    assert all(kept(part).equal(kept(parts(full)[key])) for key, part in parts(small).items())


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the least is 1"):
        methods.configure("pruner-zero", {"samples": "0"})
    with pytest.raises(UserError, match="calibration text is empty"):
        pruned("pruner-zero", tiny_model("qwen2"), tmp_path, RandomCalibration(window=1))
