"""ShortGPT: remove whole blocks, those that change the residual stream least.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
https://arxiv.org/abs/2403.03853. With h_i the output of block i (h_0 the embeddings), Block Influence is

    BI_i = 1 - mean over tokens of cos(h_{i-1}, h_i)

from one pass of the dense model; the k blocks of lowest influence go at once. `metric=angular` is the variant of
Gromov et al., https://arxiv.org/abs/2403.17887: the run of k consecutive blocks l+1..l+k with the smallest

    d(l, k) = mean over windows of arccos(cos(h_l, h_{l+k})) / pi      at each window's last token.

Removing blocks is the only thing that happens, so the result loads in stock transformers.

Departs from the papers: the calibration is the run's own instead of PG19 (`matched` comparison); ties go to the deeper
block. The cosine is blind to scale: a block that only multiplies the stream has influence 0.
"""

# Shape suffixes: B batch, T tokens, D hidden size, N windows seen, L blocks.

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from methods import modeling
from methods.base import Batch, Budget, Calibration, Context, Method, Prediction
from methods.blocks import blocks_to_remove, predict_removal
from methods.errors import nothing_to_measure, overflow
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register
from methods.sharing import remembered

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import Decoder


@register("shortgpt", title="ShortGPT", reference="https://arxiv.org/abs/2403.03853", family="depth")
@dataclass(frozen=True, kw_only=True)
class ShortGPT(Method):
    """Remove whole blocks, least influential first."""

    streams: ClassVar[bool] = True

    metric: Literal["block_influence", "angular"] = "block_influence"
    """Any k blocks by Block Influence, or the k consecutive blocks of least angular distance."""

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """Blocks go whole: the size on the grid that is nearest to the ratio."""
        return predict_removal(self.name, shape, budget, shape.layers - 1)

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """Score the blocks of `model` in one pass and remove as many as the budget asks, in place."""
        if budget.ratio == 1:
            return model
        decoder = modeling.Decoder(model)
        self.predict(decoder.shape, budget)
        count = blocks_to_remove(decoder.shape, budget, decoder.shape.layers - 1)
        scores = remembered(
            context, calibration, "block scores", lambda: self.scores(decoder, calibration, context), metric=self.metric
        )
        choose = least_influential if self.metric == "block_influence" else nearest_run
        removed = choose(scores, count)
        return modeling.keep_layers(model, [i for i in range(decoder.shape.layers) if i not in removed])

    def scores(self, decoder: Decoder, calibration: Calibration, context: Context) -> list[Any]:
        """What decides for every ratio: BI [L], or d(l, k) in row k - 1 of a triangle."""
        steps = math.ceil(calibration.samples / context.batch_size)
        batches = context.progress.track(calibration.batches(context.batch_size), self.metric, steps)
        if self.metric == "block_influence":
            return block_influence(decoder, batches)
        return angular_distances(last_token_states(decoder, batches))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine along the last axis, shape [..., D] to [...], in at least fp32 and clamped to [-1, 1]."""
    x, y = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (x, y))
    return torch.nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1)


def block_influence(decoder: Decoder, batches: Iterable[Batch]) -> list[float]:
    """BI of every block (the paper's definition, in [0, 2]) over the real tokens of all batches, shape [L]."""
    total = torch.zeros(len(decoder.layers), dtype=torch.float64)
    tokens = 0
    with torch.no_grad():
        for batch in batches:
            mask_BT = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask.bool()

            def see(index: int, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor = mask_BT) -> None:
                total[index] += cosine(x_BTD, y_BTD)[mask_BT.to(x_BTD.device)].sum().item()

            with modeling.watch_layers(decoder, see):
                _forward(decoder, batch)
            tokens += int(mask_BT.sum())
    if tokens == 0:
        raise nothing_to_measure()
    return finite((1 - total / tokens).tolist())


def last_token_states(decoder: Decoder, batches: Iterable[Batch]) -> Tensor:
    """The residual stream before the first and after every block, at each window's last real token: [L + 1, N, D]."""
    states: list[list[Tensor]] = [[] for _ in range(len(decoder.layers) + 1)]
    with torch.no_grad():
        for batch in batches:
            if batch.mask is None:
                last_B = torch.full((len(batch.input_ids),), batch.input_ids.shape[1] - 1)
            else:
                positions = torch.arange(batch.input_ids.shape[1])
                last_B = torch.where(batch.mask.bool().cpu(), positions, -1).amax(1)

            def see(index: int, x_BTD: Tensor, y_BTD: Tensor, last_B: Tensor = last_B) -> None:
                rows = torch.arange(len(x_BTD))
                if index == 0:
                    states[0].append(x_BTD[rows, last_B].cpu())
                states[index + 1].append(y_BTD[rows, last_B].cpu())

            with modeling.watch_layers(decoder, see):
                _forward(decoder, batch)
    if not states[0]:
        raise nothing_to_measure()
    return torch.stack([torch.cat(windows) for windows in states])


def finite(scores: list[float]) -> list[float]:
    """The scores, which must all be numbers: an overflow would pick blocks at random."""
    if not all(map(math.isfinite, scores)):
        raise overflow()
    return scores


def _forward(decoder: Decoder, batch: Batch) -> None:
    device = decoder.model.device
    mask = None if batch.mask is None else batch.mask.to(device)
    decoder.model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False, logits_to_keep=1)


def least_influential(influence: Sequence[float], count: int) -> set[int]:
    """The `count` blocks of lowest influence, deeper ones first among equals."""
    return set(sorted(range(len(influence)), key=lambda index: (influence[index], -index))[:count])


def angular_distance(states_LND: Tensor, start: int, count: int) -> float:
    """d(start, count): from the stream after `start` blocks to the stream `count` blocks later, in [0, 1]."""
    return (cosine(states_LND[start], states_LND[start + count]).arccos() / math.pi).mean().item()


def angular_distances(states_LND: Tensor) -> list[list[float]]:
    """d(start, count) for all counts (rows, from 1) and starts."""
    return [
        finite([angular_distance(states_LND, start, count) for start in range(len(states_LND) - count)])
        for count in range(1, len(states_LND))
    ]


def nearest_run(distances: Sequence[Sequence[float]], count: int) -> set[int]:
    """The `count` consecutive blocks of least angular distance, the deeper run among equals."""
    if count == 0:
        return set()
    row = distances[count - 1]
    best = min(range(len(row)), key=lambda start: (row[start], -start))
    return set(range(best, best + count))
