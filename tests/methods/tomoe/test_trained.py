"""Acceptance on the three trained embedded models: what random weights could hide, such as signals of real size.

Training here is a few steps long; what a few hundred steps learn is tested on one model in test_learning.py, and on all
of them in the committed records (test_committed.py).
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import data, models
from benchmarks.perplexity import window_loss
from methods import modeling
from methods.base import Budget, Calibration, Context, Training
from methods.modeling import Decoder
from methods.modeling.footprint import footprint
from methods.modeling.structures.moe_stores import STORES
from methods.tomoe import ToMoE, accounting
from methods.tomoe.conversion import convert
from methods.tomoe.masking import MaskedDecoder
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.training import Trainer
from tests.methods.tomoe.test_masking import everything_on

BUDGET = Budget(ratio=0.5, basis="block")
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A model, the network trained for it, and the sparse model that was made of both."""

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration
    z_SNI: Tensor
    """Before training."""
    network: ToMoENetwork
    sparse: PreTrainedModel
    ids: Tensor
    """Of held-out text, [3, 96]."""

    def trainer(self, folder: Path, steps: int = STEPS) -> Trainer:
        context = Context(scratch=folder, training=Training(steps=steps, sequences=1, window=64))
        return Trainer(ToMoE(start="random"), self.dense, self.tokenizer, BUDGET, self.calibration, context)


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen2", "tiny-phi"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path, folder = models.resolve(request.param).prepare(), tmp_path_factory.mktemp("scratch")
    tokenizer = models.load_tokenizer(path)
    calibration = data.sample_calibration(data.load("wikileads", "calibration"), tokenizer, 8, 64, seed=0)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    context = Context(scratch=folder, training=Training(steps=STEPS, sequences=1, window=64))
    method = ToMoE(start="random")
    trainer = Trainer(method, dense, tokenizer, BUDGET, calibration, context)
    z_SNI = trainer.network.hypernetwork.z_SNI.clone()
    trainer.run()
    sparse = convert(method, copy.deepcopy(dense), trainer.network, BUDGET, calibration, context)
    ids = torch.tensor(tokenizer(data.load("wikileads", "test").content, verbose=False)["input_ids"])
    return Case(dense, tokenizer, calibration, z_SNI, trainer.network, sparse.eval(), ids[: 3 * 96].view(3, 96))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def test_masks_all_on_are_the_dense_model_to_the_last_bit(case: Case) -> None:
    masked, expected = MaskedDecoder(Decoder(case.dense), copy.deepcopy(case.network)), logits(case.dense, case.ids)
    with masked.attached(), torch.no_grad():
        assert logits(case.dense, case.ids).equal(expected)
        masked.masks = everything_on(masked)
        assert logits(case.dense, case.ids).equal(expected)


def test_the_count_is_the_budget_and_whole_widths_are_everything(case: Case) -> None:
    shape = case.network.shape
    assert shape.layers * accounting.layer_weights(accounting.whole(shape), shape) == accounting.prunable(shape)
    share = footprint(case.sparse).active_block / footprint(case.dense).active_block
    assert share <= 0.5
    assert share == pytest.approx(0.5, abs=0.001)


def test_all_stores_compute_the_same(case: Case) -> None:
    """Also for a single token."""
    for ids in (case.ids, case.ids[:1, :1]):
        outputs = []
        for store in STORES:
            modeling.set_experts(case.sparse, store)
            outputs.append(logits(case.sparse, ids))
        modeling.set_experts(case.sparse, "shared")
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_stepwise_decoding_with_a_cache_is_the_full_pass(case: Case) -> None:
    """One of the two sequences is padded on the left."""
    ids, mask = case.ids[:2, :24].clone(), torch.ones(2, 24, dtype=torch.long)
    ids[1, :7], mask[1, :7] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = case.sparse(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, steps = None, []
    for end in range(1, 25):
        start = end - 1 if cache is not None else 0
        output = case.sparse(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        steps.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1)[0], full[0], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(torch.stack(steps, 1)[1, 7:], full[1, 7:], rtol=1e-4, atol=2e-4)
    alone = logits(case.sparse, case.ids[1:2, 7:24])
    torch.testing.assert_close(full[1, 7:], alone[0], rtol=1e-4, atol=2e-4)


def test_z_stays_and_a_resumed_run_is_an_uninterrupted_one(case: Case, tmp_path: Path) -> None:
    assert case.network.hypernetwork.z_SNI.equal(case.z_SNI)
    killed = case.trainer(tmp_path)
    batches = killed.loop.batches()
    killed.model.requires_grad_(False)
    with killed.masked.attached():
        killed.loop.step(0, next(batches))
    killed.loop.state.save("step-000001", 1)
    resumed = case.trainer(tmp_path)
    resumed.run()
    pairs = zip(resumed.network.state_dict().values(), case.network.state_dict().values(), strict=True)
    assert all(one.equal(other) for one, other in pairs)


def test_saved_and_loaded_has_the_same_perplexity_to_the_last_digit(case: Case, tmp_path: Path) -> None:
    case.sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()

    def perplexity(model: PreTrainedModel) -> float:
        return math.exp(sum(window_loss(model, window) for window in case.ids) / len(case.ids))

    assert perplexity(loaded) == perplexity(case.sparse)
