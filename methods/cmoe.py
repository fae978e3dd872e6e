"""CMoE: experts from activation patterns, chosen by one neuron each, without training.

"Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis", https://arxiv.org/abs/2502.04416; facts of the
released code from github.com/JarvisPei/CMoE at 42dfc94. Block by block, each behind the blocks converted so far, with
h(x) what goes into down at q calibration tokens and m neurons per part (`SxAyEz`: S shared, A chosen of E - S):

    profile   a_t[i] = 1 for the `top` largest |h_i(x_t)| of token t, else 0; x and the rows of gate and up normalised
    shared    the S m neurons of highest rate mu_i = mean_t a_t[i]
    routed    columns c_i = a[:, i] of the others; centroids start at those of highest rate; every neuron gets a
              centroid with room for it so that the sum of distances is least (linear assignment); centroids are means
    router    s_j = |act(x g_j) * (x u_j)|, g_j and u_j the normalised rows of the member nearest to centroid j
    gate      of softmax(s) + b the A highest; weight 1 + softmax(s)_j u_j, with u = b = 0 until they are trained

A plain MLP has act(x u_j) for both products; biases go with their neurons and enter neither the normalised profile nor
the router. u is a parameter and b a buffer, which training moves (`moe_gates`).

Departs from the released code: parts differ by a neuron where E does not divide F (the code drops what is left over), u
can train (the code's is frozen), and the profile is of the first `tokens` of the run's text.
"""

# Shape suffixes: q tokens, D hidden size, F MLP neurons, R routed experts, n routed neurons, T tokens of a chunk.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from methods import modeling
from methods.base import Calibration, Context
from methods.errors import UserError
from methods.expert_plans import ExpertMethod, Structure
from methods.experts import CHUNK, hidden, largest
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from methods.modeling import Decoder, DecoderLayer


@register("cmoe", title="CMoE", reference="https://arxiv.org/abs/2502.04416", family="moe")
@dataclass(frozen=True, kw_only=True)
class CMoE(ExpertMethod):
    """Shared and routed experts by how often and how alike neurons are active; half of the active parts are shared."""

    streams: ClassVar[bool] = True
    with_shared: ClassVar[bool] = True

    top: int = 10
    """K_a: neurons of a token that count as active."""
    tokens: int = 16384
    """Of the calibration text, at most (published: 8 windows of 2,048)."""
    profile: Literal["normalised", "plain"] = "normalised"
    """Whether tokens and rows are normalised before neurons are compared (the code), or not (the paper)."""
    distance: Literal["l1", "l2"] = "l1"
    """Between columns and centroids: that of the code, or the paper's."""
    iterations: int = 1
    """Rounds of assigning neurons and moving centroids (one in the code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.top, self.tokens, self.iterations) < 1:
            raise UserError(
                f"cmoe.top is {self.top}, cmoe.tokens {self.tokens} and cmoe.iterations {self.iterations}; the least "
                "of each is 1, the published ones are 10, 16384 and 1."
            )

    def default_experts(self, shape: DecoderShape) -> int:
        """As in the paper's tables."""
        return 8

    def divided(self, parts: int, experts: int) -> Structure:
        """Half of the parts shared, as in all published structures."""
        return Structure(parts // 2, parts - parts // 2, experts)

    def added(self, shape: DecoderShape, structure: Structure) -> int:
        """The router's rows, and u."""
        return structure.routed * ((1 + shape.gated) * shape.hidden + 1)

    def convert(
        self, decoder: Decoder, structure: Structure, blocks: range, calibration: Calibration, context: Context
    ) -> None:
        """One block after the other."""
        for layer, x_qD in self.inputs(decoder, structure, calibration, context, self.tokens, sequential=True):
            with torch.no_grad():
                shared, experts, representatives = self.carve(self.activity(layer, x_qD), structure)
                rows = [unit_rows(linear.weight)[representatives] for linear in layer.mlp_inputs]
                modeling.convert_mlp(
                    layer,
                    modeling.AnalyticRouter(rows, layer.mlp_activation),
                    experts,
                    shared=shared,
                    active=structure.active,
                    gate="scaled",
                )

    def activity(self, layer: DecoderLayer, x_qD: Tensor) -> Tensor:
        """A: whether a neuron is among the most active of a token, bool [q, F] on the CPU."""
        found = []
        for x_TD in x_qD.split(CHUNK):
            h_TF = hidden(layer, x_TD) if self.profile == "plain" else self._normalised(layer, x_TD)
            found.append(largest(h_TF, self.top).cpu())
        return torch.cat(found)

    def _normalised(self, layer: DecoderLayer, x_TD: Tensor) -> Tensor:
        x_TD = unit_rows(x_TD)
        first, *others = (x_TD @ unit_rows(linear.weight).T for linear in layer.mlp_inputs)
        h_TF = layer.mlp_activation(first)
        for other in others:
            h_TF = h_TF * other
        return h_TF

    def carve(self, active_qF: Tensor, structure: Structure) -> tuple[Tensor, list[Tensor], Tensor]:
        """Shared neurons, those of each expert, and each expert's representative, [R]."""
        order = active_qF.sum(0).argsort(descending=True, stable=True)
        count, sizes = structure.shared_neurons(len(order)), structure.sizes(len(order))[structure.shared :]
        routed = order[count:]
        columns_nq = active_qF[:, routed].T.float()
        labels_n, nearest_R = assign(columns_nq, sizes, 1 if self.distance == "l1" else 2, self.iterations)
        return order[:count], [routed[labels_n == j] for j in range(len(sizes))], routed[nearest_R]


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their norms."""
    return torch.nn.functional.normalize(rows, dim=-1)


def assign(columns_nq: Tensor, sizes: list[int], norm: int, iterations: int) -> tuple[Tensor, Tensor]:
    """The cluster of each point, [n], of which cluster j has `sizes[j]`, and the member nearest to each centre, [R].

    Args:
        columns_nq: points; the first ones are the first centres.
        norm: 1 or 2, of the distance.
    """
    from scipy.optimize import linear_sum_assignment

    centres_Rq = columns_nq[: len(sizes)]
    labels_n = torch.empty(0)
    for _ in range(iterations):
        cost_nR = torch.cdist(columns_nq, centres_Rq, p=norm)
        places = torch.tensor(sizes)
        owners = torch.arange(len(sizes)).repeat_interleave(places)
        _, chosen = linear_sum_assignment(cost_nR.double()[:, owners].numpy())
        before, labels_n = labels_n, owners[torch.from_numpy(chosen)]
        centres_Rq = torch.stack([columns_nq[labels_n == j].mean(0) for j in range(len(sizes))])
        if labels_n.equal(before):
            break
    cost_nR = torch.cdist(columns_nq, centres_Rq, p=norm)
    cost_nR[labels_n[:, None] != torch.arange(len(sizes))] = torch.inf
    return labels_n, cost_nR.argmin(0)
