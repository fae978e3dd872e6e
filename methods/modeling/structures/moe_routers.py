"""Routers: from a token to a number per expert.

linear       R x                                  (ToMoE, LLaMA-MoE)
mlp          B tanh(A x)                          (LLaMA-MoE)
cosine mlp   B tanh(A x / |x|)                    (MoEfication)
analytic     |act(G x) * (V x)|, or |act(V x)|    rows of the dense MLP's gate and up, one per expert (CMoE)
"""

# Shape suffixes: T tokens, D hidden size, N experts.

from collections.abc import Callable, Sequence
from typing import Any

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


def make_router(layout: Layout, weights: Sequence[Tensor], activation: Callable[[Tensor], Tensor]) -> nn.Module:
    """The router of a mixture, its values undefined.

    Args:
        weights: of gate (if there is one) and up, [..., D], whose device and dtype it gets.
    """
    hidden, options = weights[0].shape[1], {"device": weights[0].device, "dtype": weights[0].dtype}
    if layout.router == "linear":
        return nn.Linear(hidden, layout.experts, bias=False, **options)
    if layout.router == "analytic":
        return AnalyticRouter([weight.new_zeros(layout.experts, hidden) for weight in weights], activation)
    return MLPRouter(hidden, layout.experts, layout.router == "cosine mlp", **options)
