"""The dense model itself: the row every other row is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.errors import UserError
from methods.modeling.shape import DecoderShape
from methods.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("dense", title="Dense", reference="", family="dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """No compression."""

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The dense size; any ratio but 1 is an error."""
        if budget.ratio != 1:
            raise UserError(f"dense has ratio 1 and was asked for {budget.ratio:g}. Leave dense to the planner.")
        return Prediction(active_total=shape.total, active_block=shape.block)

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """`model`, unchanged."""
        return model
