"""What 2:4 pruning changes of trained projections: SparseGPT least, then Wanda, then magnitude."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import data, models
from methods import modeling
from methods.sparsegpt import revived, solve, upper_factor
from methods.sparsity import Density
from methods.wanda import Energy, scores
from tests.methods.pruned import names, read

TWO_OF_FOUR = Density(0.5, (2, 4))


def pruned_thrice(W: Tensor, X: Tensor) -> list[Tensor]:
    """By SparseGPT, Wanda and magnitude, for inputs [N, C]."""
    energy = Energy(X.shape[1], X.device)
    energy.add(X)
    U, _ = upper_factor(revived(X.T @ X / len(X))[0], 0.01)
    masks = [TWO_OF_FOUR.mask(scores(W, energy)), TWO_OF_FOUR.mask(W.abs())]
    return [solve(W, U, TWO_OF_FOUR, 128).weight_RC, *(W * mask for mask in masks)]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-phi"])
@torch.no_grad()
def test_errors_of_trained_projections_are_in_the_published_order(name: str) -> None:
    """In the mean over the projections of the dense model; a single one may be out of order."""
    location = models.resolve(name).prepare()
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32).eval()
    text = data.load("wikileads", "calibration")
    calibration = data.sample_calibration(text, models.load_tokenizer(location), 8, 128, seed=0)
    errors = []
    for layer in modeling.Decoder(model).layers:
        inputs = read(model, layer, [group[0] for group in names(layer)], calibration)
        for X, part in ((inputs[group[0]], part) for group in names(layer) for part in group):
            W = layer.module.get_submodule(part).get_parameter("weight")
            lost = [(X @ (new - W).T).square().sum() / (X @ W.T).square().sum() for new in pruned_thrice(W, X)]
            errors.append(torch.stack(lost))
    sparsegpt, wanda, magnitude = torch.stack(errors).mean(0).tolist()
    assert 0 < 1.5 * sparsegpt < wanda < 0.98 * magnitude
