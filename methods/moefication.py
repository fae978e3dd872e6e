"""MoEfication and G-MoEfication: experts of neurons with similar weights, and a small network that says which matter.

Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", https://arxiv.org/abs/2110.01786
(code: thunlp/MoEfication at 5bcbbdb); "Breaking ReLU Barrier: Generalized MoEfication for Dense Pretrained Models",
EMNLP 2024 (code: thnkinbtfly/G-MoEfication at 5c7af5d). With h_i what neuron i hands to down, S_j expert j's neurons:

    experts   balanced k-means of the neurons' normalised input rows
    router    B tanh(A x / |x|), from A = normalised centroids and B = 1, trained with binary cross-entropy against
              t_j / max over the batch of t, where  t_j = sum over S_j of |h_i|              (MoEfication)
                                                    t_j = sum over S_j of (h_i - mean h_i)^2 (G-MoEfication)
    output    y = sum over the k highest of Wdown[:, S_j] h[S_j]                             (MoEfication)
              and of the others Wdown[:, S_j] mean h[S_j], constants                         (G-MoEfication)

Both papers know `W2 act(W1 x)` only, MoEfication with ReLU. Ours for gated MLPs: rows of gate and up, each normalised,
side by side, of which the centroids' gate half starts the router; and |h_i| where the paper has relu(h_i), which is the
same for ReLU.

Departs from the code: parts differ by a neuron where their number does not divide F; k-means starts once; the epoch
that is kept is the best of all (code: the second best), by the share of t that a fifth of the experts has, those that
the router ranks highest for held-out tokens; the text is the run's.
"""

# Shape suffixes: S tokens of the text, D hidden size, F MLP neurons, N experts, B tokens of a training step.

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from methods import modeling
from methods.base import Calibration, Context
from methods.errors import UserError
from methods.expert_plans import ExpertMethod, Structure, router_size
from methods.experts import CHUNK, balanced_parts, hidden, input_rows, mlp_inputs
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register
from methods.sharing import remembered_tensors

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from methods.modeling import Decoder, DecoderLayer, MLPRouter


@dataclass(frozen=True, kw_only=True)
class TrainedRouters(ExpertMethod):
    """What both have in common."""

    streams: ClassVar[bool] = True

    tokens: int = 16384
    """Of the calibration text, at most, on which routers are trained."""
    epochs: int = 30
    """Passes over nine tenths of them; the others choose the epoch."""
    learning_rate: float = 0.01
    """Adam's."""
    batch: int = 512
    """Tokens of a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tokens, self.batch) < 1 or self.epochs < 0 or not self.learning_rate > 0:
            raise UserError(
                f"{self.name} cannot train routers with tokens={self.tokens}, batch={self.batch}, epochs={self.epochs} "
                f"and learning_rate={self.learning_rate}: at least 1, 1, 0 and more than 0. Published ones are 512, 30 "
                "and 0.01."
            )

    def convert(
        self, decoder: Decoder, structure: Structure, blocks: range, calibration: Calibration, context: Context
    ) -> None:
        """All blocks, by what `measure` finds; it serves every ratio with as many experts."""
        settings = {**asdict(self), "experts": structure.experts}
        found = remembered_tensors(
            context,
            calibration,
            f"{self.name} experts",
            lambda: self.measure(decoder, structure, calibration, context),
            **settings,
        )
        hidden_size, sizes = decoder.shape.hidden, structure.sizes(decoder.shape.mlp_width)
        for index, layer in enumerate(decoder.layers):
            neurons, inner, outer = (found[f"{index}.{name}"] for name in ("neurons", "inner", "outer"))
            router = modeling.MLPRouter(hidden_size, len(sizes), cosine=True)
            router.load_state_dict({"inner.weight": inner, "outer.weight": outer})
            experts, constants_ND = neurons.split(sizes), found.get(f"{index}.constants")
            modeling.convert_mlp(layer, router, experts, active=structure.active, constants=constants_ND)

    def measure(
        self, decoder: Decoder, structure: Structure, calibration: Calibration, context: Context
    ) -> dict[str, Tensor]:
        """Of every block its experts, router and constants, on what the dense model's MLPs read."""
        generator, found = torch.Generator().manual_seed(context.seed), {}
        sizes = structure.sizes(decoder.shape.mlp_width)
        for index, (layer, x_SD) in enumerate(mlp_inputs(decoder, calibration, context, self.tokens)):
            with torch.no_grad():
                rows_FD = input_rows(layer)
                experts = balanced_parts(rows_FD, sizes, context.seed)
                targets_SN, constants_ND = self.targets(layer, x_SD, experts)
                router = first_router(rows_FD, experts, x_SD.shape[1])
            router = self.trained(router, x_SD.float(), targets_SN, generator)
            block = {"neurons": torch.cat(experts), "inner": router.inner.weight, "outer": router.outer.weight}
            block |= {} if constants_ND is None else {"constants": constants_ND}
            found |= {f"{index}.{name}": tensor.detach().cpu().contiguous() for name, tensor in block.items()}
        return found

    @abstractmethod
    def targets(self, layer: DecoderLayer, x_SD: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """t, [S, N], and what stands in for experts that are not chosen, [N, D]."""

    def trained(self, router: MLPRouter, x_SD: Tensor, targets_SN: Tensor, generator: Generator) -> MLPRouter:
        """The router at its best epoch."""
        held_out = max(1, len(x_SD) // 10)
        order = torch.randperm(len(x_SD), generator=generator)
        test, rest = order[:held_out], order[held_out:]
        optimizer = torch.optim.Adam(router.parameters(), lr=self.learning_rate)
        best, kept = captured(router, x_SD[test], targets_SN[test]), copy.deepcopy(router)
        for _ in range(self.epochs):
            for rows in rest[torch.randperm(len(rest), generator=generator)].split(self.batch):
                self._step(router, optimizer, x_SD[rows], targets_SN[rows])
            share = captured(router, x_SD[test], targets_SN[test])
            if share > best:
                best, kept = share, copy.deepcopy(router)
        return kept

    def _step(self, router: nn.Module, optimizer: torch.optim.Optimizer, x_BD: Tensor, targets_BN: Tensor) -> None:
        with torch.enable_grad():
            wanted_BN = targets_BN / targets_BN.max().clamp_min(torch.finfo(targets_BN.dtype).tiny)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(router(x_BD), wanted_BN)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()


@register("moefication", title="MoEfication", reference="https://arxiv.org/abs/2110.01786", family="moe")
@dataclass(frozen=True, kw_only=True)
class MoEfication(TrainedRouters):
    """Neurons outside a token's experts count as zero."""

    expert_neurons: int = 32
    """Of an expert, where `experts` does not say how many there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_neurons < 1:
            raise UserError(f"moefication.expert_neurons is {self.expert_neurons}; the least is 1, the usual one 32.")

    def default_experts(self, shape: DecoderShape) -> int:
        """As many as give experts of that size."""
        return max(1, round(shape.mlp_width / self.expert_neurons))

    def added(self, shape: DecoderShape, structure: Structure) -> int:
        """The router."""
        return router_size(shape, structure, mlp=True)

    def targets(self, layer: DecoderLayer, x_SD: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Sums of |h|."""
        return sums(layer, x_SD, experts, 0.0, 1), None


@register(
    "g-moefication", title="G-MoEfication", reference="https://github.com/thnkinbtfly/G-MoEfication", family="moe"
)
@dataclass(frozen=True, kw_only=True)
class GMoEfication(TrainedRouters):
    """Neurons outside a token's experts count as their mean."""

    def default_experts(self, shape: DecoderShape) -> int:
        """As in the paper."""
        return 64

    def added(self, shape: DecoderShape, structure: Structure) -> int:
        """The router, the sum of all constants, and those of the chosen experts."""
        constants = min(structure.routed, structure.active + 1) * shape.hidden
        return router_size(shape, structure, mlp=True) + constants

    def targets(self, layer: DecoderLayer, x_SD: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Sums of squared differences from the mean, and what the means amount to."""
        total_F = torch.stack([hidden(layer, x).double().sum(0) for x in x_SD.split(CHUNK)]).sum(0)
        mean_F = (total_F / len(x_SD)).float()
        down_FD = layer.mlp_output.weight.T.float()
        constants_ND = torch.stack([mean_F[part] @ down_FD[part] for part in experts])
        return sums(layer, x_SD, experts, mean_F, 2), constants_ND


def sums(layer: DecoderLayer, x_SD: Tensor, experts: Sequence[Tensor], centre: Tensor | float, power: int) -> Tensor:
    """For each token and expert, the sum over its neurons of |h - centre|^power, fp32 [S, N]."""
    found = []
    for x_TD in x_SD.split(CHUNK):
        distance_TF = (hidden(layer, x_TD).float() - centre).abs().pow(power)
        found.append(torch.stack([distance_TF[:, part].sum(1) for part in experts], 1))
    return torch.cat(found)


def first_router(rows_FD: Tensor, experts: Sequence[Tensor], hidden_size: int) -> MLPRouter:
    """The router that says the tanh of each centroid's cosine with the token.

    Args:
        rows_FD: what was clustered, of which the first `hidden_size` columns are compared with tokens.
    """
    centroids_ND = torch.stack([rows_FD[part, :hidden_size].mean(0) for part in experts])
    router = modeling.MLPRouter(hidden_size, len(experts), cosine=True, device=rows_FD.device)
    router.inner.weight.copy_(torch.nn.functional.normalize(centroids_ND, dim=1))
    torch.nn.init.eye_(router.outer.weight)
    return router


def captured(router: nn.Module, x_SD: Tensor, targets_SN: Tensor) -> float:
    """The share of t that the fifth of the experts has which the router ranks highest."""
    with torch.no_grad():
        chosen = router(x_SD).topk(-(-targets_SN.shape[1] // 5), 1).indices
    return float(targets_SN.gather(1, chosen).sum() / targets_SN.sum().clamp_min(torch.finfo(torch.float32).tiny))
