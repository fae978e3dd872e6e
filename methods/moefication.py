"""MoEfication and G-MoEfication: experts of neurons that belong together, and a guess at which of them matter.

Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", https://arxiv.org/abs/2110.01786
(code: thunlp/MoEfication at 5bcbbdb); "Breaking ReLU Barrier: Generalized MoEfication for Dense Pretrained Models",
EMNLP 2024 (code: thnkinbtfly/G-MoEfication at 5c7af5d). With h_i what neuron i hands to down, S_j expert j's neurons:

    t         t_j = sum over S_j of |h_i| (MoEfication), or of (h_i - mean h_i)^2 (G-MoEfication)

    split     parameters     balanced k-means of the neurons' normalised input rows
              coactivation   neurons are tied by the number of tokens at which both are active; the weakest ties cut,
                             METIS finds N parts, which are brought to their sizes
    router    mlp            B tanh(A x / |x|), from A = normalised centroids and B = 1, trained with binary
                             cross-entropy against t_j / max over the batch of t
              similarity     cosine of x and the centroid: A x, for |x| does not change the order
              ground-truth   t itself, an upper bound: it reads gate and up of all neurons, so that only down's share of
                             an expert is ever saved
    output    y = sum over the k highest of Wdown[:, S_j] h[S_j]                             (MoEfication)
              and of the others Wdown[:, S_j] mean h[S_j], constants                         (G-MoEfication)

Both papers know `W2 act(W1 x)` only, MoEfication with ReLU. Ours for gated MLPs: rows of gate and up, each normalised,
side by side, of which the centroids' gate half is compared with x; and |h_i| where the paper has relu(h_i), which is
the same for ReLU. Ours for other activations, where nothing is exactly zero: active are the tenth of a token's neurons
with the largest |h_i|, the part of t's mass that experts are to hold together, as CMoE profiles SwiGLU.

Departs from the code: parts differ by a neuron where their number does not divide F; k-means starts once; the epoch
that is kept is the best of all (code: the second best), by the share of t that a fifth of the experts has, those that
the router ranks highest for held-out tokens; similarity is the paper's cosine (code: the distance of x / |x| from the
mean of the normalised rows, whose length then matters); the text is the run's. Of the co-activation graph: ties weigh
their counts (code: of products h_i h_j, capped within batches, in whole multiples of the threshold); the threshold is
0.99 times the first decile of all pairs that is not zero, and there is none where nine are (code: the maximum); of
parts that METIS made too large, the neurons least tied to them go where there is room (code: by lot).
"""

# Shape suffixes: S tokens of the text, D hidden size, F MLP neurons, N experts, B tokens of a training step.

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from methods import modeling
from methods.base import AnyBut, Calibration, Context
from methods.errors import UserError
from methods.expert_plans import ExpertMethod, Structure, router_size
from methods.experts import (
    CHUNK,
    balanced_parts,
    coactivations,
    finite,
    graph_parts,
    hidden,
    input_rows,
    thinned,
)
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register
from methods.sharing import remembered_tensors

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from methods.modeling import Decoder, DecoderLayer, MLPRouter


TRAINING = ("epochs", "learning_rate", "batch")
"""Settings that only a router with something to learn has."""
UNTRAINED = (
    *(({"router": router}, TRAINING) for router in ("similarity", "ground-truth")),
    ({"epochs": 0}, ("learning_rate", "batch")),
)
"""Where they have no effect."""


@dataclass(frozen=True, kw_only=True)
class RankedExperts(ExpertMethod):
    """What both have in common: how neurons are grouped, and how a token's groups are found."""

    streams: ClassVar[bool] = True
    idle = UNTRAINED
    power: ClassVar[int]
    """Of the distance from the stand-in that t sums up."""

    split: Literal["parameters", "coactivation"] = "parameters"
    """Whether neurons of an expert have similar weights, or are active at the same tokens."""
    router: Literal["mlp", "similarity", "ground-truth"] = "mlp"
    """What ranks experts: a trained network, the cosine with their centroids, or what they really amount to."""
    tokens: int = 16384
    """Of the calibration text, at most, at which neurons are looked at."""
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

    def added(self, shape: DecoderShape, structure: Structure) -> int:
        """The router."""
        return 0 if self.router == "ground-truth" else router_size(shape, structure, mlp=self.router == "mlp")

    def spared(self, shape: DecoderShape) -> int:
        """Of a neuron that the ground truth is read off, its share of down."""
        return shape.hidden if self.router == "ground-truth" else super().spared(shape)

    @property
    def reads(self) -> bool:
        """Whether it looks at text."""
        return self.router == "mlp" or self.split == "coactivation"

    def told_apart(self, tokens: int) -> int:
        """One each, and what is trained needs one to learn from beside one to be judged by."""
        return 0 if self.router == "mlp" and tokens < 2 else tokens

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
        sizes = structure.sizes(decoder.shape.mlp_width)
        for index, layer in enumerate(decoder.layers):
            block = {key.partition(".")[2]: tensor for key, tensor in found.items() if key.startswith(f"{index}.")}
            experts, constants_ND = block.pop("neurons").split(sizes), block.pop("constants", None)
            router = self._router(block)
            modeling.convert_mlp(layer, router, experts, active=structure.active, constants=constants_ND)

    def _router(self, block: dict[str, Tensor]) -> Tensor | nn.Module:
        """Of what `rank` has found for a block."""
        if self.router == "similarity":
            return block["centroids"]
        if self.router == "ground-truth":
            return modeling.OracleRouter(block.get("centre"))
        router = modeling.MLPRouter(block["inner.weight"].shape[1], len(block["inner.weight"]), cosine=True)
        router.load_state_dict(block)
        return router

    def measure(
        self, decoder: Decoder, structure: Structure, calibration: Calibration, context: Context
    ) -> dict[str, Tensor]:
        """Of every block its experts, router and constants, on what the dense model's MLPs read."""
        generator, found = torch.Generator().manual_seed(context.seed), {}
        sizes = structure.sizes(decoder.shape.mlp_width)
        for index, (layer, x_SD) in enumerate(self._seen(decoder, structure, calibration, context)):
            with torch.no_grad():
                experts = self.parts(layer, x_SD, sizes, context.seed)
                block = {"neurons": torch.cat(experts), **self.rank(layer, x_SD, experts, generator)}
            found |= {f"{index}.{name}": tensor.detach().cpu().contiguous() for name, tensor in block.items()}
        return found

    def _seen(
        self, decoder: Decoder, structure: Structure, calibration: Calibration, context: Context
    ) -> Iterator[tuple[DecoderLayer, Tensor]]:
        """Blocks with what their MLPs read, [S, D], nothing where nobody asks."""
        if self.reads:
            yield from self.inputs(decoder, structure, calibration, context, self.tokens)
        else:
            for layer in context.progress.track(decoder.layers, "cutting experts", len(decoder.layers)):
                yield layer, layer.mlp_output.weight.new_empty(0, decoder.shape.hidden)

    def parts(self, layer: DecoderLayer, x_SD: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
        """The neurons of every expert."""
        if self.split == "coactivation":
            return graph_parts(thinned(coactivations(layer, x_SD)), sizes, seed)
        return balanced_parts(input_rows(layer), sizes, seed)

    def rank(
        self, layer: DecoderLayer, x_SD: Tensor, experts: Sequence[Tensor], generator: Generator
    ) -> dict[str, Tensor]:
        """The values of the router, and `constants` [N, D] that stand in for experts that are not chosen."""
        centre_F = self.centre(layer, x_SD)
        found = {} if centre_F is None else {"constants": stand_ins(layer, centre_F, experts)}
        if self.router == "ground-truth":
            return found if centre_F is None else {**found, "centre": centre_F}
        centroids_ND = centroids(input_rows(layer), experts, x_SD.shape[1])
        if self.router == "similarity":
            return {**found, "centroids": centroids_ND}
        targets_SN = self.targets(layer, x_SD, experts, centre_F)
        router = self.trained(first_router(centroids_ND), x_SD.float(), targets_SN, generator)
        return {**found, **router.state_dict()}

    @abstractmethod
    def centre(self, layer: DecoderLayer, x_SD: Tensor) -> Tensor | None:
        """What stands in for neurons of experts that are not chosen, fp32 [F]; None: zero."""

    def targets(self, layer: DecoderLayer, x_SD: Tensor, experts: Sequence[Tensor], centre_F: Tensor | None) -> Tensor:
        """t, fp32 [S, N]."""
        found = []
        for x_TD in x_SD.split(CHUNK):
            h_TF = hidden(layer, x_TD).float()
            size_TF = (h_TF if centre_F is None else h_TF - centre_F).abs().pow(self.power)
            found.append(torch.stack([size_TF[:, part].sum(1) for part in experts], 1))
        return finite(torch.cat(found))  # squares of h may not be, where h is

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
class MoEfication(RankedExperts):
    """Neurons outside a token's experts count as zero."""

    idle = (
        *UNTRAINED,
        ({"router": "similarity", "split": "parameters"}, ("tokens",)),
        ({"router": "ground-truth", "split": "parameters"}, ("tokens",)),
        ({"experts": AnyBut("auto")}, ("expert_neurons",)),
    )
    power: ClassVar[int] = 1

    expert_neurons: int = 32
    """Of an expert, where `experts` does not say how many there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_neurons < 1:
            raise UserError(f"moefication.expert_neurons is {self.expert_neurons}; the least is 1, the usual one 32.")

    def default_experts(self, shape: DecoderShape) -> int:
        """As many as give experts of that size."""
        return max(1, round(shape.mlp_width / self.expert_neurons))

    def centre(self, layer: DecoderLayer, x_SD: Tensor) -> Tensor | None:
        """Zero."""
        return None


@register(
    "g-moefication", title="G-MoEfication", reference="https://github.com/thnkinbtfly/G-MoEfication", family="moe"
)
@dataclass(frozen=True, kw_only=True)
class GMoEfication(RankedExperts):
    """Neurons outside a token's experts count as their mean."""

    power: ClassVar[int] = 2

    def default_experts(self, shape: DecoderShape) -> int:
        """As in the paper."""
        return 64

    def added(self, shape: DecoderShape, structure: Structure) -> int:
        """The router, the sum of all constants, and those of the chosen experts."""
        constants = min(structure.routed, structure.active + 1) * shape.hidden
        return super().added(shape, structure) + constants

    @property
    def reads(self) -> bool:
        """For the means, always."""
        return True

    def centre(self, layer: DecoderLayer, x_SD: Tensor) -> Tensor | None:
        """The mean of h."""
        total_F = torch.stack([hidden(layer, x_TD).double().sum(0) for x_TD in x_SD.split(CHUNK)]).sum(0)
        return (total_F / len(x_SD)).float()


def stand_ins(layer: DecoderLayer, centre_F: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """What down makes of the stand-ins of each expert's neurons, fp32 [N, D]."""
    down_FD = layer.mlp_output.weight.T.float()
    return finite(torch.stack([centre_F[part] @ down_FD[part] for part in experts]))


def centroids(rows_FD: Tensor, experts: Sequence[Tensor], hidden_size: int) -> Tensor:
    """The directions in which experts' input rows point, unit rows [N, D].

    Args:
        rows_FD: normalised ones, of which the first `hidden_size` columns are compared with tokens.
    """
    means_ND = torch.stack([rows_FD[part, :hidden_size].mean(0) for part in experts])
    return torch.nn.functional.normalize(means_ND, dim=1)


def first_router(centroids_ND: Tensor) -> MLPRouter:
    """The router that says the tanh of each centroid's cosine with the token."""
    count, hidden_size = centroids_ND.shape
    router = modeling.MLPRouter(hidden_size, count, cosine=True, device=centroids_ND.device)
    with torch.no_grad():
        router.inner.weight.copy_(centroids_ND)
    torch.nn.init.eye_(router.outer.weight)
    return router


def captured(router: nn.Module, x_SD: Tensor, targets_SN: Tensor) -> float:
    """The share of t that the fifth of the experts has which the router ranks highest."""
    with torch.no_grad():
        chosen = router(x_SD).topk(-(-targets_SN.shape[1] // 5), 1).indices
    return float(targets_SN.gather(1, chosen).sum() / targets_SN.sum().clamp_min(torch.finfo(torch.float32).tiny))
