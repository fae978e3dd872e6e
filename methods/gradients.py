"""Gradients of the next-token loss on a few short samples, in fp32, for methods that score weights by them.

    g = mean over samples s of g_s        g_s = d (mean next-token cross-entropy of s) / d w
    f = mean over samples of g_s^2        (the diagonal of the empirical Fisher matrix)

One sample goes through the model at a time, so that activations stay small; beside the model, which is held in fp32
meanwhile, there is room for g and, where asked for, f.
"""

# Shape suffixes: N samples, T tokens of each, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from methods.base import Calibration, Progress
from methods.errors import nothing_to_measure, overflow
from methods.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel


class Moments(NamedTuple):
    """Of the gradient of one parameter, over samples; shapes of the parameter."""

    mean: Tensor
    square: Tensor | None
    """None where it was not asked for."""


def real_texts(calibration: Calibration, batch_size: int) -> list[Tensor]:
    """The real tokens of every calibration window that has two or more, int64 [T], in the sample's order.

    Raises:
        UserError: no window has two tokens.
    """
    texts: list[Tensor] = []
    for batch in calibration.batches(batch_size):
        texts += batch.input_ids if batch.mask is None else map(torch.masked_select, batch.input_ids, batch.mask.bool())
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise nothing_to_measure()
    return texts


def snippets(calibration: Calibration, count: int, length: int, batch_size: int, generator: Generator) -> Tensor:
    """Random stretches of random calibration windows, int64 [count, length].

    No window serves twice before each has once. Where all windows are shorter, so are the stretches.

    Raises:
        UserError: no window has two tokens.
    """
    texts = real_texts(calibration, batch_size)
    length = min(length, max(map(len, texts)))
    texts = [text for text in texts if len(text) >= length]
    order = torch.randperm(len(texts), generator=generator).tolist()
    picked = [texts[order[number % len(order)]] for number in range(count)]
    starts = [int(torch.randint(len(text) - length + 1, (), generator=generator)) for text in picked]
    return torch.stack([text[start : start + length] for text, start in zip(picked, starts, strict=True)])


def gradient_moments(
    model: PreTrainedModel, parameters: Sequence[Parameter], ids_NT: Tensor, progress: Progress, *, squares: bool
) -> dict[Parameter, Moments]:
    """g, and f if asked for, of some parameters of a model, which is left as it was.

    Raises:
        UserError: a loss is not a number.
    """

    def zeros(parameter: Parameter) -> Tensor:
        return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))

    moments = {p: Moments(zeros(p), zeros(p) if squares else None) for p in parameters}

    def take(parameter: Parameter, gradient: Tensor) -> None:
        mean, square = moments[parameter]
        mean.add_(gradient, alpha=1 / len(ids_NT))
        if square is not None:
            square.addcmul_(gradient, gradient, value=1 / len(ids_NT))

    visit_gradients(model, parameters, list(ids_NT), progress, take)
    return moments


def visit_gradients(
    model: PreTrainedModel,
    parameters: Sequence[Parameter],
    samples: Sequence[Tensor],
    progress: Progress,
    take: Callable[[Parameter, Tensor], None],
) -> None:
    """Call `take(w, g_s)` for every sample s, token ids [T], and all of some parameters w that its loss depends on.

    The model is left as it was.

    Raises:
        UserError: a loss is not a number.
    """

    def visit(parameter: Parameter) -> None:
        assert parameter.grad is not None
        take(parameter, parameter.grad)
        parameter.grad = None

    with full_precision(model), only_gradients_of(model, parameters), ExitStack() as hooks:
        for parameter in parameters:
            hooks.callback(parameter.register_post_accumulate_grad_hook(visit).remove)
        for ids_T in progress.track(samples, "gradients", len(samples)):
            loss = next_token_loss(model, ids_T.to(model.device))
            if not loss.isfinite():
                raise overflow()
            loss.backward()


def next_token_loss(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of the tokens of one text [T], each given those before it; a scalar with gradient."""
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits_TV, ids_T[1:])


@contextmanager
def full_precision(model: PreTrainedModel) -> Iterator[None]:
    """While open, parameters are at least fp32. Going there and back changes none; buffers are left alone."""
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    try:
        yield
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def only_gradients_of(model: PreTrainedModel, parameters: Sequence[Parameter]) -> Iterator[None]:
    """While open, these parameters require a gradient and the others none."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
