"""SLEB: remove whole blocks one by one, each time the one without which the model predicts its text best.

Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
https://arxiv.org/abs/2402.09025; facts of the released code from jiwonsong-dev/SLEB at d07129a. With A the blocks that
are left, the block that goes next is

    argmin over b in A, without the first and last of them, of   mean next-token loss of the model with blocks A - {b}

the first one among equals, until as many are gone as the budget asks. Nothing else changes, so that the result loads in
stock transformers. `rescore=False` is the paper's ablation: the losses of the first round decide at once.

Removing b leaves what enters b as it was. A round therefore carries the stream from block to block, runs only what
follows each candidate, and gives a candidate up once its summed loss exceeds the best one's. The stream of all
windows is kept in host memory, and blocks are called with what the model itself calls them with.

Departs from the released code: the calibration is the run's own (`calib=matched`). `calib=as-published` takes some
lines at random, joins them by blank lines and cuts them into windows; its lines are the records of the run's
calibration text without the empty ones (of which WikiText-2 has many), so that the published number of lines gives more
text, and the window is the model's limit where that is shorter. Losses are means over tokens, not sums over windows:
the same order. Evaluation text is never looked at, and nothing depends on the name of the model's class.
"""

# Shape suffixes: B batch, T tokens, D hidden size, V vocabulary.

from __future__ import annotations

import csv
import dataclasses
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from methods import modeling
from methods.base import Batch, Budget, Calibration, Context, Method, Prediction
from methods.blocks import blocks_to_remove, predict_removal
from methods.errors import UserError, nothing_to_measure, overflow
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register
from methods.sharing import REUSED, alone, read_or, shared_folder, write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import Decoder


@register("sleb", title="SLEB", reference="https://arxiv.org/abs/2402.09025", family="depth")
@dataclass(frozen=True, kw_only=True)
class SLEB(Method):
    """Remove whole blocks, least missed first, and ask again after each."""

    streams: ClassVar[bool] = True
    idle = (({"calib": "matched"}, ("lines", "window")),)

    rescore: bool = True
    """Measure again after every removal; False: the losses of the first round decide."""
    early_barrier: int = 1
    """So many of the first blocks stay."""
    latter_barrier: int = 1
    """So many of the last blocks stay."""
    calib: Literal["matched", "as-published"] = "matched"
    """Text: the run's calibration windows, or random lines of its source."""
    lines: int = 128
    """Lines of `as-published` text."""
    window: int = 2048
    """Tokens per window of `as-published` text, at most the model's limit."""

    def __post_init__(self) -> None:
        least = {"early_barrier": 0, "latter_barrier": 0, "lines": 1, "window": 2}
        for field, limit in least.items():
            if (value := getattr(self, field)) < limit:
                raise UserError(f"sleb.{field} is {value}; the least is {limit}. Type --set sleb.{field}={limit}")

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """Blocks go whole: the size on the grid that is nearest to the ratio."""
        return predict_removal(self.name, shape, budget, self._most(shape))

    def _most(self, shape: DecoderShape) -> int:
        return max(shape.layers - max(self.early_barrier + self.latter_barrier, 1), 0)

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """Remove as many blocks of `model` as the budget asks, in place. Leaves their order in removals.csv."""
        if budget.ratio == 1:
            return model
        decoder = modeling.Decoder(model)
        self.predict(decoder.shape, budget)
        count = blocks_to_remove(decoder.shape, budget, self._most(decoder.shape))
        batches = self._batches(decoder, tokenizer, calibration, context)
        removals = self._removals(decoder, batches, count, calibration, context)
        if context.artifacts is not None:
            write(removals, context.artifacts)
        gone = {removal.block for removal in removals}
        return modeling.keep_layers(model, [block for block in range(decoder.shape.layers) if block not in gone])

    def _removals(
        self, decoder: Decoder, batches: Iterable[Batch], count: int, calibration: Calibration, context: Context
    ) -> list[Removal]:
        """The first so many removals. What is decided is kept after every round: a killed run goes on, and a smaller
        model begins where a larger one ended."""
        with shared_folder(context, calibration, "removals", **dataclasses.asdict(self)) as folder, alone(folder):
            known = folder / "removals.json"
            removals = [Removal(*removal) for removal in read_or(known, [])]
            if removals:
                context.note(REUSED.format("removals of blocks"))
            if len(removals) < count:
                for chosen in self.eliminate(decoder, batches, count, context, removals):
                    removals += chosen
                    write_whole(known, removals)
        return removals[:count]

    def eliminate(
        self, decoder: Decoder, batches: Iterable[Batch], count: int, context: Context, decided: Sequence[Removal] = ()
    ) -> Iterator[list[Removal]]:
        """The blocks to remove after those `decided`, round by round: one each, or without re-scoring all at once."""
        text, removals = [enter(decoder, batch) for batch in batches], [*decided]
        if not any(int(entered.targets_BT.sum()) for entered in text):
            raise nothing_to_measure()
        while len(removals) < count:
            gone = {removal.block for removal in removals}
            alive = [block for block in range(len(decoder.layers)) if block not in gone]
            candidates = alive[self.early_barrier : len(alive) - self.latter_barrier]
            losses = losses_without(decoder, text, alive, candidates, give_up=self.rescore)
            label = f"block {len(removals) + 1} of {count}"
            ranking = sorted(context.progress.track(losses, label, len(candidates)), key=lambda found: found.loss)
            finite = [removal for removal in ranking if math.isfinite(removal.loss)]
            chosen = finite[:1] if self.rescore else finite
            if len(chosen) < (1 if self.rescore else count):
                raise overflow()
            removals += chosen
            yield chosen

    def _batches(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, calibration: Calibration, context: Context
    ) -> Iterable[Batch]:
        if self.calib == "matched":
            return calibration.batches(context.batch_size)
        context.note(f"scored on {self.lines} random lines of the calibration text instead of its windows")
        lines = [line for lines in calibration.rows().values() for line in lines]
        random.Random(context.seed).shuffle(lines)
        window = min(self.window, decoder.shape.max_positions)
        windows = cut("\n\n".join(lines[: self.lines]), tokenizer, window)
        return [Batch(input_ids, None) for input_ids in windows.split(context.batch_size)]


class Removal(NamedTuple):
    """A block and what its absence costs."""

    block: int
    """Its number in the dense model."""
    loss: float
    """Mean next-token loss (nats) of the model without it and all blocks removed before; infinite where given up."""


class Entered(NamedTuple):
    """A batch of text at the entrance of the first block."""

    x_BTD: Tensor
    """The stream, in host memory."""
    keywords: list[dict[str, Any]]
    """What each block is called with beside the stream: kinds of attention may differ."""
    input_ids: Tensor
    """[B, T]"""
    targets_BT: Tensor
    """True where a real token is to be predicted from a real one before it."""


def cut(text: str, tokenizer: PreTrainedTokenizerBase, window: int) -> Tensor:
    """The whole windows of a text, shape [N, window].

    Raises:
        UserError: the text is shorter than one window.
    """
    encoded: Any = tokenizer(text, verbose=False)
    stream = torch.tensor(encoded["input_ids"], dtype=torch.long)
    if len(stream) < window:
        raise UserError(
            f"the lines that sleb takes have {len(stream)} tokens, less than one window of {window}. "
            f"Type --set sleb.lines=MORE or --set sleb.window={max(len(stream), 2)}, or use calib=matched."
        )
    return stream[: len(stream) // window * window].view(-1, window)


def enter(decoder: Decoder, batch: Batch) -> Entered:
    """Run the model once on a batch and take down what its blocks are called with."""
    device, keywords, first = decoder.model.device, [], []

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        x_BTD = args[0] if args else rest.pop("hidden_states")
        if not first:
            first.append(x_BTD.cpu())
        keywords.append(rest)

    handles = [layer.module.register_forward_pre_hook(hook, with_kwargs=True) for layer in decoder.layers]
    input_ids = batch.input_ids.to(device)
    mask_BT = torch.ones_like(input_ids, dtype=torch.bool) if batch.mask is None else batch.mask.bool().to(device)
    try:
        with torch.no_grad():
            mask = None if batch.mask is None else mask_BT
            decoder.model(input_ids=input_ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    targets_BT = mask_BT.clone()
    targets_BT[:, :1] = False
    targets_BT[:, 1:] &= mask_BT[:, :-1]
    return Entered(first[0], keywords, input_ids, targets_BT)


def losses_without(
    decoder: Decoder, text: Sequence[Entered], alive: Sequence[int], candidates: Sequence[int], *, give_up: bool
) -> Iterator[Removal]:
    """The loss without each candidate.

    Args:
        alive: the blocks that are left, ascending.
        candidates: some of them.
        give_up: stop at candidates that have lost more than an earlier one already.
    """
    streams, best = [entered.x_BTD for entered in text], math.inf
    targets = sum(int(entered.targets_BT.sum()) for entered in text)
    for position, block in enumerate(alive):
        if block in candidates:
            total = total_loss(decoder, text, streams, alive[position + 1 :], best if give_up else math.inf)
            best = min(best, total)
            yield Removal(block, total / targets)
        if block < max(candidates, default=0):
            for index, entered in enumerate(text):
                streams[index] = run(decoder, [block], streams[index], entered).cpu()


def total_loss(
    decoder: Decoder, text: Sequence[Entered], streams: Sequence[Tensor], blocks: Sequence[int], limit: float
) -> float:
    """The summed next-token loss of all text when the rest of the model is `blocks`; infinite beyond the limit."""
    total = 0.0
    for entered, x_BTD in zip(text, streams, strict=True):
        total += next_token_loss(decoder, run(decoder, blocks, x_BTD, entered), entered)
        if not total <= limit:  # so written that what is not a number is beyond it too
            return math.inf
    return total


def run(decoder: Decoder, blocks: Sequence[int], x_BTD: Tensor, entered: Entered) -> Tensor:
    """The stream after some more blocks, on the model's device."""
    layers, x_BTD = decoder.layers, x_BTD.to(decoder.model.device)
    with torch.no_grad():
        for block in blocks:
            x_BTD = layers[block].module(x_BTD, **entered.keywords[block])
    return x_BTD


def next_token_loss(decoder: Decoder, x_BTD: Tensor, entered: Entered) -> float:
    """Summed over the targets of a batch, one window's logits at a time: in fp32 per token, in fp64 their sum."""
    total = 0.0
    with torch.no_grad():
        for x_TD, ids_T, targets_T in zip(x_BTD, entered.input_ids, entered.targets_BT, strict=True):
            logits_TV = decoder.head(decoder.final_norm(x_TD))[:-1][targets_T[1:]]
            logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
            losses_T = torch.nn.functional.cross_entropy(logits_TV, ids_T[1:][targets_T[1:]], reduction="none")
            total += float(losses_T.double().sum())
    return total


def write(removals: Sequence[Removal], folder: Path) -> None:
    """The order of the removals, as removals.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "removals.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Removal._fields, *removals])
