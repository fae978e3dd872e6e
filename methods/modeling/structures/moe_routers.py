"""Routers: from a token to a number per expert.

linear       R x                                  (ToMoE, LLaMA-MoE)
mlp          B tanh(A x)                          (LLaMA-MoE)
cosine mlp   B tanh(A x / |x|)                    (MoEfication)
analytic     |act(G x) * (V x)|, or |act(V x)|    rows of the dense MLP's gate and up, one per expert (CMoE)
oracle       sum over the expert's neurons of |h_i|, h what goes into down ("ground truth" of MoEfication)
oracle of deviation    of (h_i - c_i)^2, c constant (G-MoEfication)

An oracle computes what it is to choose from: nothing is saved but down, and no router chooses better by that measure.
"""

# Shape suffixes: T tokens, D hidden size, N experts, U neurons of all experts.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from methods.modeling.structures.moe_layout import Layout, RouterKind


class MLPRouter(nn.Module):
    """Two matrices and a tanh."""

    def __init__(self, hidden: int, experts: int, cosine: bool, **options: Any) -> None:
        super().__init__()
        self.kind: RouterKind = "cosine mlp" if cosine else "mlp"
        self.inner = nn.Linear(hidden, experts, bias=False, **options)
        self.outer = nn.Linear(experts, experts, bias=False, **options)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, N]."""
        x_TD = normalize(x_TD, dim=-1) if self.kind == "cosine mlp" else x_TD
        return self.outer(self.inner(x_TD).tanh())


class AnalyticRouter(nn.Module):
    """What one neuron per expert says of the token."""

    kind: RouterKind = "analytic"

    def __init__(self, rows: Sequence[Tensor], activation: Callable[[Tensor], Tensor]) -> None:
        """Args:
        rows: of gate (if there is one) and up, [N, D] each.
        """
        super().__init__()
        self.rows = nn.ParameterList(rows)
        self._activation = (activation,)  # in a tuple, or it would be a module of this one

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, N]."""
        first_TN, *others = (linear(x_TD, weight_ND) for weight_ND in self.rows)
        scores_TN = self._activation[0](first_TN)
        for other_TN in others:
            scores_TN = scores_TN * other_TN
        return scores_TN.abs()


Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From tokens [T, D] to what their neurons say [T, U], and each expert's neurons as 0 and 1 [N, U]."""


class OracleRouter(nn.Module):
    """What the experts really amount to, read off the mixture's own projections. It has nothing to learn."""

    centre: Tensor | None
    """c: [U]; in the order of the dense MLP until `convert_mlp` lays the neurons out. None: an oracle of |h|."""

    def __init__(self, centre: Tensor | None = None, look: Look | None = None) -> None:
        """Args:
        look: of the mixture it is to be the router of; a method of it, which makes it no module of this one.
        """
        super().__init__()
        self.kind: RouterKind = "oracle" if centre is None else "oracle of deviation"
        self.register_buffer("centre", centre)
        self._look = look

    @torch.no_grad()
    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, N]; summed in fp32, and as large as the tokens' dtype can say at most."""
        assert self._look is not None, "an oracle answers within a mixture only"
        hidden_TU, mask_NU = self._look(x_TD)
        exact = torch.promote_types(x_TD.dtype, torch.float32)
        hidden_TU = hidden_TU.to(exact)
        sizes_TU = hidden_TU.abs() if self.centre is None else (hidden_TU - self.centre).square()
        return (sizes_TU @ mask_NU.to(exact).T).clamp(max=torch.finfo(x_TD.dtype).max).to(x_TD.dtype)


def make_router(
    layout: Layout, weights: Sequence[Tensor], activation: Callable[[Tensor], Tensor], look: Look
) -> nn.Module:
    """The router of a mixture, its values undefined.

    Args:
        weights: of gate (if there is one) and up, [U, D], whose device and dtype it gets.
        look: the mixture's, for an oracle.
    """
    hidden, options = weights[0].shape[1], {"device": weights[0].device, "dtype": weights[0].dtype}
    if layout.router == "linear":
        return nn.Linear(hidden, layout.experts, bias=False, **options)
    if layout.router == "analytic":
        return AnalyticRouter([weight.new_zeros(layout.experts, hidden) for weight in weights], activation)
    if layout.oracular:
        return OracleRouter(None if layout.router == "oracle" else weights[0].new_zeros(layout.neurons), look)
    return MLPRouter(hidden, layout.experts, layout.router == "cosine mlp", **options)
