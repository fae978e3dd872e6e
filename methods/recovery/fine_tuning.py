"""Training the adapters of a compressed model, and gates, on next-token loss; see `methods.recovery.settings`."""

# Shape suffixes: B sequences, T tokens, D hidden size.

from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.base import Calibration, Context
from methods.errors import UserError
from methods.modeling.content import Dense
from methods.modeling.decoder import Decoder
from methods.modeling.structures.choice_noise import without_noise
from methods.recovery import adapters, gates
from methods.recovery.settings import Recovery
from methods.training.data import Blocks
from methods.training.loop import Group, Loop, LoopSettings
from methods.training.losses import next_token
from methods.training.recomputation import recomputed
from methods.training.seeding import seeded


def recover(
    settings: Recovery,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    context: Context,
) -> dict[str, int]:
    """Fine-tune a compressed model, in place; resumes from `context.scratch`. Choices by chance are made without.

    Returns:
        What was spent: `tokens` trained on, `parameters` of adapters and gates, steps `skipped` for a loss that is no
            number.

    Raises:
        UserError: the text is shorter than a block, the checkpoint to resume from belongs to another run, or the loss
            stays non-finite.
    """
    if model.dtype == torch.float16:
        raise UserError("fine-tuning needs bfloat16 or float32: gradients vanish in float16. Type --dtype bfloat16.")
    blocks = Blocks(calibration.rows(), tokenizer, context.training.window, context.seed)
    identity = {"settings": settings.record(), "model": Dense(model.state_dict()).identity}
    with seeded(context.seed, context.device):
        adapted = adapters.attach(model, settings)
    gated = gates.trained_gates(model)
    loop = _loop(settings, model, adapted, gated, blocks, context, identity)
    with ExitStack() as stack:
        stack.enter_context(without_noise(model))
        if settings.checkpointing:
            stack.enter_context(recomputed(Decoder(model).layers))
        loop.run()
    gates.balance(model)
    model.eval()
    if loop.state.skipped:
        context.note(f"{loop.state.skipped} of {loop.settings.steps} steps of fine-tuning had a loss that is no number")
    if settings.merge:
        adapters.merge(model)
    return {
        "tokens": loop.settings.steps * loop.settings.sequences * context.training.window * loop.process.num_processes,
        "parameters": sum(parameter.numel() for parameter in (*adapted.values(), *gated.values())),
        "skipped": loop.state.skipped,
    }


def _loop(
    settings: Recovery,
    model: PreTrainedModel,
    adapted: dict[str, torch.nn.Parameter],
    gated: dict[str, torch.nn.Parameter],
    blocks: Blocks,
    context: Context,
    identity: dict[str, object],
) -> Loop:
    """The shared loop, with what is to fall and how fast."""
    steps, head = settings.steps or context.training.steps, Decoder(model).head
    rate = settings.highest_rate(model.config.hidden_size)

    def loss(step: int, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        gates.balance(model)  # by the step before; within a step blocks may run twice
        ids_BT, targets_T = batch[:, :-1], batch[:, 1:].flatten()
        hidden_TD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
        valid_T = blocks.predictable(targets_T)
        mean = next_token(hidden_TD[valid_T], targets_T[valid_T], head)
        return mean, {"loss": mean}

    plan = LoopSettings(
        name="recovery",
        label="fine-tuning",
        remedy=f"Use a smaller --set lora.learning_rate (it is {rate:g}), or --dtype float32.",
        steps=steps,
        sequences=context.training.sequences,
        seed=context.seed,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
    )
    identity = identity | {"budget": [steps, plan.sequences, context.training.window, context.seed]}
    groups = [Group(adapted), *([Group(gated, gates.RATE / rate)] if gated else [])]
    return Loop(
        plan,
        groups,
        loss,
        lambda step: rate * settings.share(step, steps),
        blocks,
        context,
        identity,
        constants=gates.balances(model),
    )
