"""Every method, given what cannot work or hardly can: an error that says what to type, or a result, and never a NaN."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import methods
from methods import modeling
from methods.base import Batch, Budget, Context, Training
from methods.errors import UserError
from methods.modeling.footprint import footprint
from tests.methods.tiny import RandomCalibration, logits, tiny_model
from tests.methods.training.small import tokenizer

NAMES = [name for name in methods.names() if name != "dense"]
WITHOUT_TEXT = {"random", "structured-magnitude", "magnitude", "llama-moe"}
"""Methods that look at no text."""
WITHOUT_LIMIT = {"llm-surgeon"}
"""Methods that can make a model of next to nothing: one row and one column of every projection."""
RATIO = 0.7
ADVICE = r"(--|Use |Give )"


@dataclasses.dataclass(frozen=True)
class Constant(RandomCalibration):
    """The same token everywhere: every covariance has rank one."""

    def batches(self, size: int) -> Iterator[Batch]:
        """Windows of sevens."""
        for batch in super().batches(size):
            yield Batch(torch.full_like(batch.input_ids, 7), None)

    def rows(self) -> dict[str, list[str]]:
        """Text of one letter."""
        return {"constant": ["a" * 40] * 100}


def compress(name: str, dense: PreTrainedModel, calibration: RandomCalibration, scratch: Path) -> PreTrainedModel:
    """A model at the ratio of these tests."""
    context = Context(scratch=scratch, training=Training(steps=2, sequences=2, window=16))
    budget = Budget(ratio=RATIO, basis="block", tolerance=0.2)
    return methods.configure(name, {}).compress(dense, tokenizer(), budget, calibration, context)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "calibration", [Constant(), RandomCalibration(samples=1, window=6)], ids=["constant tokens", "six tokens"]
)
def test_poor_text_gives_numbers_or_an_error(name: str, calibration: RandomCalibration, tmp_path: Path) -> None:
    for model in ("llama-tied", "phi"):
        try:
            found = compress(name, tiny_model(model, dtype=torch.float32), calibration, tmp_path / model)
        except UserError as error:
            assert any(word in str(error) for word in ("calibration", "text")), error
            continue
        assert logits(found).isfinite().all()
        counted = footprint(found).active_block / footprint(tiny_model(model)).active_block
        assert abs(counted - RATIO) < 0.2


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_TEXT])
def test_no_text_is_an_error(name: str, tmp_path: Path) -> None:
    class Nothing(RandomCalibration):
        def rows(self) -> dict[str, list[str]]:
            return {"nothing": []}

    with pytest.raises(UserError, match=ADVICE):
        compress(name, tiny_model("llama-gqa", dtype=torch.float32), Nothing(samples=0), tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_TEXT])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_an_error(name: str, value: float, tmp_path: Path) -> None:
    """Or they are removed (by SLEB, as the text is predicted better without)."""
    model = tiny_model("llama-gqa", dtype=torch.float32)
    modeling.Decoder(model).layers[1].mlp_inputs[1].weight.data[0, 0] = value
    try:
        assert logits(compress(name, model, RandomCalibration(samples=64), tmp_path)).isfinite().all()
    except UserError as error:
        assert re.search(ADVICE, str(error))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_LIMIT])
@pytest.mark.parametrize("ratio", [0.001, 0.01])
def test_next_to_nothing_is_refused_before_work(name: str, ratio: float) -> None:
    for model in ("llama-gqa", "phi", "opt"):
        shape = modeling.Decoder(tiny_model(model)).shape
        with pytest.raises(UserError, match=ADVICE):
            methods.configure(name, {}).predict(shape, Budget(ratio=ratio, basis="block", tolerance=0.01))
