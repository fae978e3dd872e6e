"""The masks of DISP-LLM while they are learned: hypernetwork, masked forward pass, objective and training.

    z = W gelu(LayerNorm(GRU(noise)))       mask logits of all 5L sites, the GRU running over them in both directions
    y = sigmoid((z + g + 3) / tau)          soft gates, g Gumbel(0, 1) noise; hard ones are round(y)
    loss = CE(next token) + lambda |log(r / p)|         r = T(s) / T(1), of a second, hard draw

The dense model runs with masks multiplied in through hooks, so that every family's own forward pass runs.

The BOS between two texts is not predicted; the released code ignores it as well.
"""

# Shape suffixes: B batch, T tokens, D hidden size, F MLP channels, M width of a mask (D or F).

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.base import Budget, Calibration, Context
from methods.disp_llm import Kept, masked_size, prunable, whole
from methods.errors import UserError
from methods.modeling.content import Dense
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.shape import DecoderShape
from methods.training.data import Blocks
from methods.training.hypernetwork import HyperNetwork
from methods.training.loop import Group, Loop, LoopSettings
from methods.training.losses import next_token
from methods.training.recomputation import recomputed
from methods.training.seeding import seeded
from methods.training.straight_through import OFFSET, gumbel_sigmoid, probability_on, reinmax, st_gumbel_sigmoid

if TYPE_CHECKING:
    from methods.disp_llm import DispLLM

WIDTH = 128
"""Of the hypernetwork: both directions of the GRU together."""
FAR = 0.02
"""From here on r - p is told to the reader."""
WITHOUT_EFFECT = ("checkpointing", "tensorboard", "round_to")
"""Settings that do not change what is trained."""


class MaskNetwork(nn.Module):
    """Everything that is trained. In fp32 on the device of the model."""

    def __init__(self, shape: DecoderShape, generator: torch.Generator) -> None:
        super().__init__()
        widths = [width for _ in range(shape.layers) for width in whole(shape)]
        self.hypernetwork = HyperNetwork(len(widths), 1, WIDTH, generator)
        self.norm = nn.LayerNorm(WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, width, bias=False) for width in widths)

    def logits(self) -> list[Kept]:
        """z: per block, of every mask [M]."""
        embeddings_SE = gelu(self.norm(self.hypernetwork()[:, 0]))
        flat = iter([head(embedding_E) for head, embedding_E in zip(self.heads, embeddings_SE, strict=True)])
        return [Kept(*five) for five in zip(*[flat] * len(Kept._fields), strict=True)]


def draw(logits: Sequence[Kept], gate: Callable[[Tensor], Tensor]) -> list[Kept]:
    """Masks of all blocks, each by its logits."""
    return [Kept(*map(gate, block)) for block in logits]


def kept_fraction(masks: Sequence[Kept], shape: DecoderShape) -> Tensor:
    """r, with gradient."""
    sizes = [masked_size(Kept(*(mask_M.sum() for mask_M in block)), shape) for block in masks]
    return torch.stack(sizes).sum() / prunable(shape)


def regulariser(r: Tensor, p: float) -> Tensor:
    """|log(r / p)|, whose gradient vanishes at r = p."""
    aim = torch.full_like(r, p)
    return (torch.maximum(r, aim) / torch.minimum(r, aim)).log()


class MaskedBlocks:
    """A dense model whose blocks apply `masks`; while these are None it is the dense one."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.masks: Sequence[Kept] | None = None

    @contextmanager
    def attached(self) -> Iterator[MaskedBlocks]:
        """While open, the hooks are in the model."""
        handles = [handle for index, layer in enumerate(self.decoder.layers) for handle in self._attach(index, layer)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, index: int, layer: DecoderLayer) -> list[Any]:
        mlp = layer.mlp_inputs[0] if layer.mlp is None else layer.mlp
        return [
            layer.attention.register_forward_pre_hook(self._reading(index, "attention_in"), with_kwargs=True),
            layer.attention_output.register_forward_hook(self._writing(index, "attention_out")),
            mlp.register_forward_pre_hook(self._reading(index, "mlp_in"), with_kwargs=True),
            layer.mlp_output.register_forward_pre_hook(
                self._reading(index, "neurons", len(layer.mlp_inputs)), with_kwargs=True
            ),
            layer.mlp_output.register_forward_hook(self._writing(index, "mlp_out")),
        ]

    def _mask(self, index: int, name: str, x: Tensor, power: int = 1) -> Tensor:
        assert self.masks is not None
        return x * (getattr(self.masks[index], name) ** power).to(x.dtype)

    def _reading(self, index: int, name: str, power: int = 1) -> Callable[..., Any]:
        """A hook that masks what a module reads: its first argument, or `hidden_states`."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if self.masks is None:
                return None
            if args:
                return (self._mask(index, name, args[0], power), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": self._mask(index, name, kwargs["hidden_states"], power)}

        return hook

    def _writing(self, index: int, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output if self.masks is None else self._mask(index, name, output)

        return hook


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first step."""

    steps: int
    sequences: int
    window: int
    target: float
    """p."""
    seed: int


def train(
    settings: DispLLM,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget,
    calibration: Calibration,
    context: Context,
) -> MaskNetwork:
    """The trained network; resumes from `context.scratch`.

    Raises:
        UserError: the target is out of reach, the text is shorter than a block, the checkpoint to resume from belongs
            to another run, or the loss stays non-finite.
    """
    trainer = Trainer(settings, model, tokenizer, budget, calibration, context)
    trainer.run()
    return trainer.network


class Trainer:
    """One training run; `run` brings it to its end."""

    def __init__(
        self,
        settings: DispLLM,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> None:
        if model.dtype == torch.float16:
            raise UserError(
                "disp-llm trains in bfloat16 or float32: gradients vanish in float16. Type --dtype bfloat16."
            )
        self.settings, self.model, self.context = settings, model, context
        self.decoder = Decoder(model)
        self.shape, granted = self.decoder.shape, context.training
        self.plan = Plan(
            steps=settings.steps or granted.steps,
            sequences=granted.sequences,
            window=min(granted.window, self.shape.max_positions),
            target=settings.target(self.shape, budget),
            seed=context.seed,
        )
        generator = torch.Generator().manual_seed(context.seed)
        with seeded(context.seed, context.device):
            self.network = MaskNetwork(self.shape, generator).to(model.device)
        self.masked = MaskedBlocks(self.decoder)
        self.blocks = Blocks(calibration.rows(), tokenizer, self.plan.window, context.seed)
        self.loop = self._loop(calibration)

    def _loop(self, calibration: Calibration) -> Loop:
        settings, plan = self.settings, self.plan
        mathematics = {k: v for k, v in asdict(settings).items() if k not in WITHOUT_EFFECT}
        identity = {"settings": mathematics, "budget": asdict(plan), "model": Dense(self.model.state_dict()).identity}
        how = LoopSettings(
            name="disp-llm",
            label="training masks",
            remedy=f"Use --set disp-llm.learning_rate=VALUE below {settings.learning_rate:g}, or --dtype float32.",
            steps=plan.steps,
            sequences=plan.sequences,
            seed=plan.seed,
            weight_decay=settings.weight_decay,
            tensorboard=settings.tensorboard,
        )
        return Loop(
            how,
            [Group(dict(self.network.named_parameters()))],
            self._loss,
            lambda step: settings.learning_rate,
            self.blocks,
            self.context,
            identity | {"calibration": calibration.sha256},
            dict(self.network.named_buffers()),
        )

    def run(self) -> None:
        """Train to the last step, from the latest checkpoint if there is one."""
        self.model.requires_grad_(False)
        layers = self.decoder.layers if self.settings.checkpointing else []
        with self.masked.attached(), recomputed(layers):
            self.loop.run()
        self._report()

    @torch.no_grad()
    def _report(self) -> None:
        """Tell the reader when the masks are far from the size they are cut to."""
        r = kept_fraction(draw(self.network.logits(), self._chance), self.shape).item()
        if abs(r - self.plan.target) > FAR:
            self.context.note(
                f"disp-llm: training ended with {r:.3f} of the weights on where {self.plan.target:.3f} was the target, "
                "so the rest was decided by logits that had not settled. Give it more steps (--budget, or "
                "--set disp-llm.steps=N)."
            )

    def _chance(self, logits_M: Tensor) -> Tensor:
        """That a mask is on in one draw."""
        if self.settings.estimator == "reinmax":
            return torch.sigmoid(logits_M + OFFSET)
        return probability_on(logits_M)

    def _gate(self, logits_M: Tensor) -> Tensor:
        """A mask of the training pass."""
        if self.settings.estimator == "soft":
            return gumbel_sigmoid(logits_M, self.settings.tau)
        return self._hard(logits_M)

    def _hard(self, logits_M: Tensor) -> Tensor:
        """A mask that is counted."""
        if self.settings.estimator == "reinmax":
            return reinmax(logits_M)
        return st_gumbel_sigmoid(logits_M, self.settings.tau)

    def _loss(self, step: int, batch: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The objective on some blocks [sequences, window + 1], and what the log gets of it."""
        logits = self.network.logits()
        self.masked.masks = draw(logits, self._gate)
        language = self._language(batch[:, :-1], batch[:, 1:].flatten())
        counted = draw(logits, self._hard)
        r = kept_fraction(counted, self.shape)
        distance = regulariser(r, self.plan.target)
        loss = language + self.settings.lam * distance
        told = {"target": self.plan.target, "loss": loss, "lm": language, "regulariser": distance, "fraction": r}
        widths = {
            f"{name}.{index}": m.sum() for index, kept in enumerate(counted) for name, m in kept._asdict().items()
        }
        return loss, told | widths

    def _language(self, ids: Tensor, targets_T: Tensor) -> Tensor:
        """Mean cross-entropy (nats) with the next token."""
        hidden_TD = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        valid_T = self.blocks.predictable(targets_T)
        return next_token(hidden_TD[valid_T], targets_T[valid_T], self.decoder.head)
