"""Curvature of the loss in the weights of linears, F ~ G kron A for each, from gradients on a text (K-FAC).

With a what a linear reads at a token (1 appended where it has a bias) and g the gradient there, by what it writes, of
the cross-entropy of all next tokens of the token's window (empirical Fisher), and sums over all tokens of all windows:

    independent (K-FAC)   G = sum g g^T                A = sum a a^T
    nearest               G <- sum (a^T A a) g g^T     A <- sum (g^T G g) a a^T     (those on the right of norm 1)

The second is the power iteration for the product nearest to sum (g g^T) kron (a a^T), from A = I; every step is one
pass over the text. The product is the Fisher matrix but for a factor (N^2 for the first, N for the second, of N
tokens), and factors do not matter: choices and updates of `methods.kronecker_surgery` are the same for all multiples of
G and A, as damping is a share of each mean diagonal. So they are not rescaled to equal norms either.

One window goes through the model at a time. Sums are of the model's dtype, R^2 + C^2 numbers per linear.
"""

# Shape suffixes: N tokens, W width of a factor, R rows (outputs), C columns (inputs, and the bias where there is one).

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from methods import modeling
from methods.errors import overflow
from methods.gradients import next_token_loss
from methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    See = Callable[[int, Tensor, Tensor], None]


class Factors(NamedTuple):
    """Of one linear."""

    outputs_RR: Tensor
    """G."""
    inputs_CC: Tensor
    """A; its last row and column are the bias's where there is one."""


class Curvature:
    """Gathers the factors of some linears of a model, which must hold its weights in fp32 or better."""

    def __init__(self, model: PreTrainedModel, linears: Sequence[nn.Linear], device: torch.device) -> None:
        """Args:
        device: where the sums lie.
        """
        self._model, self._linears, self._device = model, linears, device
        self.loss = 0.0
        """Mean next-token cross-entropy (nats) of the last pass."""

    def independent(self, texts: Iterable[Tensor]) -> list[Factors]:
        """K-FAC, from one pass over texts [T]."""
        found = [self._zeros(linear) for linear in self._linears]

        def see(index: int, a_NC: Tensor, g_NR: Tensor) -> None:
            _add(found[index].outputs_RR, g_NR)
            _add(found[index].inputs_CC, a_NC)

        self._pass(texts, see)
        return [_checked(factors) for factors in found]

    def nearest(self, passes: Sequence[Iterable[Tensor]]) -> list[Factors]:
        """The nearest Kronecker products after half as many rounds as there are passes, which is an even number."""
        found = [self._zeros(linear) for linear in self._linears]
        for _, inputs_CC in found:
            inputs_CC.diagonal().fill_(1)
        for number, texts in enumerate(passes):
            found = self._half_round(texts, found, of=number % 2)
        return found

    def _half_round(self, texts: Iterable[Tensor], found: list[Factors], of: int) -> list[Factors]:
        """The factors with the outputs' (of=0) or the inputs' (of=1) made anew by the other one."""
        by = [_unit(factors[1 - of]) for factors in found]
        new = [torch.zeros_like(factors[of]) for factors in found]

        def see(index: int, a_NC: Tensor, g_NR: Tensor) -> None:
            mine_NW, other_NW = (a_NC, g_NR) if of else (g_NR, a_NC)
            weight_N = ((other_NW @ by[index].to(other_NW.device)) * other_NW).sum(1)
            _add(new[index], mine_NW, weight_N)

        self._pass(texts, see)
        pairs = zip(by, new, strict=True)
        return [_checked(Factors(other, mine) if of else Factors(mine, other)) for other, mine in pairs]

    def _zeros(self, linear: nn.Linear) -> Factors:
        R, C = linear.weight.shape
        widths = (R, C + (linear.bias is not None))
        return Factors(*(torch.zeros(W, W, dtype=linear.weight.dtype, device=self._device) for W in widths))

    def _pass(self, texts: Iterable[Tensor], see: See) -> None:
        """Show `see` the inputs and the gradients of every linear, once per text."""
        losses, tokens = 0.0, 0
        with torch.enable_grad(), _listening(self._model, self._linears, see):
            for ids_T in texts:
                predicted = len(ids_T) - 1
                loss = next_token_loss(self._model, ids_T.to(self._model.device)) * predicted
                if not loss.isfinite():
                    raise overflow()
                loss.backward()
                losses, tokens = losses + loss.item(), tokens + predicted
        self.loss = losses / tokens


@contextmanager
def _listening(model: PreTrainedModel, linears: Sequence[nn.Linear], see: See) -> Iterator[None]:
    """While open, a backward pass through the model calls `see(i, a_NC, g_NR)` for linear i."""
    tokens_in = modeling.Decoder(model).embeddings[0]

    def hook(index: int) -> Callable[..., None]:
        def called(linear: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            a_NC = args[0].detach().flatten(0, -2)
            output.register_hook(lambda g: see(index, _with_bias(a_NC, linear), g.flatten(0, -2)))

        return called

    with ExitStack() as hooks:
        # No weight takes part in the gradient, so it must start at the first block's input.
        hooks.callback(tokens_in.register_forward_hook(lambda module, args, output: output.requires_grad_()).remove)
        for index, linear in enumerate(linears):
            hooks.callback(linear.register_forward_hook(hook(index)).remove)
        yield


def _with_bias(a_NC: Tensor, linear: nn.Linear) -> Tensor:
    return a_NC if linear.bias is None else torch.nn.functional.pad(a_NC, (0, 1), value=1.0)


def _add(total_WW: Tensor, x_NW: Tensor, weight_N: Tensor | None = None) -> None:
    """Add the (weighted) sum of x x^T over tokens; the total may lie elsewhere."""
    left_NW = x_NW if weight_N is None else x_NW * weight_N[:, None]
    total_WW += (left_NW.mT @ x_NW).to(total_WW.device)


def _unit(factor_WW: Tensor) -> Tensor:
    """The factor with norm 1; zero stays zero."""
    return factor_WW / factor_WW.norm().clamp_min(torch.finfo(factor_WW.dtype).tiny)


def _checked(factors: Factors) -> Factors:
    if not all(factor.isfinite().all() for factor in factors):
        raise overflow()
    return factors
