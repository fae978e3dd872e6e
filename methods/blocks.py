"""Whole blocks as the unit of size: what methods that remove blocks share (ShortGPT, SLEB).

With S parameters of the dense model in the asked basis and s of one block, the k blocks whose removal comes nearest to
the ratio r are k = round((1 - r) S / s).
"""

import math

from methods.base import Budget, Prediction
from methods.modeling.shape import DecoderShape


def blocks_to_remove(shape: DecoderShape, budget: Budget, most: int) -> int:
    """The number of blocks whose removal comes nearest to the budget, `most` at most."""
    surplus = (1 - budget.ratio) * budget.dense(shape)
    return min(round(surplus / shape.layer), most)


def predict_removal(method: str, shape: DecoderShape, budget: Budget, most: int) -> Prediction:
    """The size on the grid of whole blocks that is nearest to the ratio.

    Raises:
        UserError: it is not within the budget's tolerance.
    """
    prediction = _size(shape, blocks_to_remove(shape, budget, most), budget)
    fewer = math.floor((1 - budget.ratio) * budget.dense(shape) / shape.layer)
    near = [_size(shape, min(k, most), budget) for k in (fewer, fewer + 1)]
    ratios = [budget.achieved(size.active_total, size.active_block, shape) for size in near]
    budget.require(method, prediction, shape, ratios)
    return prediction


def _size(shape: DecoderShape, removed: int, budget: Budget) -> Prediction:
    gone = removed * shape.layer
    step = shape.layer / budget.dense(shape)
    return Prediction(active_total=shape.total - gone, active_block=shape.block - gone, grid_step=step)
