"""LLaMA-MoE: the MLP split into equal experts behind a gate that further pre-training is to teach.

Zhu et al., "LLaMA-MoE: Building Mixture-of-Experts from LLaMA with Continual Pre-training",
https://arxiv.org/abs/2406.16554; facts of the released code from pjlab-sys4nlp/llama-moe at b17aff4. With E experts S_j
of equal size, of which a token gets A, and a gate z(x):

    y = sum over the A highest z_j of s softmax(z over these)_j Wdown[:, S_j] h[S_j],      s = E / A

    random       neurons by lot (the released models)
    clustering   balanced k-means of normalised rows of up
    gradient     the text is grouped into E kinds; v_j[i] = mean over tokens of kind j of |h_i dL/dh_i|; the highest
                 remaining v_j[i] gives neuron i to expert j, until all are handed out ("independent")
    sharing      expert j has its own highest neurons: experts overlap, and neurons may be in none ("inner sharing")

**Only the initialisation is here.** The paper trains the result on 200 billion tokens. Without training the gate
chooses at random, and a perplexity of 3e5 is reported for such a model: the row is a starting point for fine-tuning,
and no result of the paper. The third use of gradients, a shared part and disjoint experts ("inter sharing"), is what
`llama-moe-v2` does. How many neurons experts that overlap have together, and so a token at most, only the text tells:
`sharing` predicts no size, makes as many experts active as come nearest to the neurons of those that the ratio asks for
were they disjoint, and misses ratios for which all that is in any expert is too little.

Departs from the paper: the text is grouped by balanced k-means of its windows' mean token embeddings (theirs: sentence
embeddings of the pre-training corpus); k-means takes at most 100 rounds (500); sizes differ by a neuron where E does
not divide F; the training noise of the gate and its balance loss are left to whoever trains. Absent: clusters of rows
of gate or by cosine, the code's other importances (`feature_change`, `l1_norm`, `sample`), and the co-activation split
that its authors advise against (`moefication` has one).
"""

# Shape suffixes: D hidden size, F MLP neurons, N experts, W windows of the text.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from methods import modeling
from methods.base import Budget, Calibration, Context, Prediction
from methods.errors import UserError
from methods.expert_plans import ExpertMethod, Structure, router_size
from methods.experts import balanced_parts, best_parts, cluster, greedy_parts, neuron_importance, random_parts, windows
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register
from methods.sharing import remembered_tensors

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from methods.modeling import Decoder


@register("llama-moe", title="LLaMA-MoE", reference="https://arxiv.org/abs/2406.16554", family="moe")
@dataclass(frozen=True, kw_only=True)
class LLaMAMoE(ExpertMethod):
    """Equal experts and an untrained gate."""

    idle = (({"split": "random"}, ("samples",)), ({"split": "clustering"}, ("samples",)))

    split: Literal["random", "clustering", "gradient", "sharing"] = "random"
    """How neurons are handed out."""
    router: Literal["mlp", "linear"] = "mlp"
    """Two layers with a tanh between them, drawn at random; or one, zero, so that all tokens get the first experts."""
    scale: float | None = None
    """s; None: E / A."""
    samples: int = 1024
    """Windows of the text, at most, of which gradients are taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or (self.scale is not None and not self.scale > 0):
            raise UserError(
                f"llama-moe.samples is {self.samples} and llama-moe.scale {self.scale}: at least 1, and above 0. "
                "Use --set llama-moe.scale=none for experts / active experts."
            )

    def default_experts(self, shape: DecoderShape) -> int:
        """As in the released 4/16 and 2/16 models."""
        return 16

    def added(self, shape: DecoderShape, structure: Structure) -> int:
        """The gate."""
        return router_size(shape, structure, mlp=self.router == "mlp")

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction | None:
        """None for experts that overlap: how much, only the text tells."""
        overlapping = self.split == "sharing" and budget.ratio < 1
        if overlapping and self.asked[1]:
            return None
        prediction = super().predict(shape, budget)  # refuses what not even disjoint experts reach
        return None if overlapping else prediction

    def convert(
        self, decoder: Decoder, structure: Structure, blocks: range, calibration: Calibration, context: Context
    ) -> None:
        """Split every block, and draw its gate."""
        generator = torch.Generator().manual_seed(context.seed)
        splits = self.splits(decoder, structure, calibration, context, generator)
        if self.split == "sharing":
            splits = [*splits]
            structure = self.solved(splits, structure, decoder.shape.mlp_width, context)
        scale = structure.experts / structure.active if self.scale is None else self.scale
        for layer, experts in zip(decoder.layers, splits, strict=True):
            router = self._router(decoder.shape.hidden, structure.experts, generator)
            modeling.convert_mlp(layer, router, experts, active=structure.active, gate="softmax", scale=scale)

    def solved(self, splits: Sequence[Sequence[Tensor]], asked: Structure, width: int, context: Context) -> Structure:
        """With as many experts active as come nearest to the neurons of those asked for, unless these are given."""
        unions = [len(torch.cat([*experts]).unique()) for experts in splits]

        def used(active: int) -> float:
            most = replace(asked, active=active).used_neurons(width)
            return sum(min(most, union) for union in unions) / len(unions)

        wanted = asked.used_neurons(width)
        choices = range(asked.active, asked.active + 1 if self.asked[1] else asked.experts + 1)
        active = min(choices, key=lambda number: abs(used(number) - wanted))
        self._note(used(active) / width, wanted / width, sum(unions) / len(unions) / width, context)
        return replace(asked, active=active)

    def _note(self, used: float, wanted: float, union: float, context: Context) -> None:
        """Shares of the MLP neurons: what a token gets at most, what it was to get, and what is in any expert."""
        if union < 1:
            context.note(f"{1 - union:.1%} of the MLP neurons are among the highest of no expert, and gone")
        if used != wanted:
            context.note(
                f"experts overlap: a token gets at most {used:.1%} of the MLP neurons, not {wanted:.1%} as asked"
            )

    def splits(
        self,
        decoder: Decoder,
        structure: Structure,
        calibration: Calibration,
        context: Context,
        generator: Generator,
    ) -> Iterable[list[Tensor]]:
        """The experts of every block."""
        width = decoder.shape.mlp_width
        sizes = structure.sizes(width)
        if self.split == "random":
            return (random_parts(sizes, generator) for _ in decoder.layers)
        if self.split == "clustering":
            rows = (layer.mlp_inputs[-1].weight.detach().float() for layer in decoder.layers)
            return (balanced_parts(torch.nn.functional.normalize(up_FD), sizes, context.seed) for up_FD in rows)
        scores_LNF = self._importance(decoder, structure.experts, calibration, context)
        if self.split == "sharing":
            return (best_parts(scores_NF, sizes) for scores_NF in scores_LNF)
        return (greedy_parts(scores_NF, torch.arange(width), sizes) for scores_NF in scores_LNF)

    def _importance(self, decoder: Decoder, groups: int, calibration: Calibration, context: Context) -> Tensor:
        """v of every block, [L, N, F]."""

        def measure() -> dict[str, Tensor]:
            texts = windows(calibration, context, self.samples)
            if len(texts) < groups:
                raise UserError(
                    f"{len(texts)} windows of text cannot be grouped into the kinds of {groups} experts. "
                    f"Use --calibration NAME:{groups}x512 or more windows, or --set llama-moe.split=random."
                )
            kinds_W = text_kinds(decoder.embeddings[0].weight.detach(), texts, groups, context.seed)

            def group(place: int, number: int, x_TD: Tensor) -> Tensor:
                return kinds_W[number].expand(len(x_TD))

            scores_LNF, _ = neuron_importance(decoder.model, decoder.layers, texts, group, groups, context)
            return {"scores": scores_LNF}

        settings = {"groups": groups, "samples": self.samples}
        return remembered_tensors(context, calibration, "neuron importances", measure, **settings)["scores"]

    def _router(self, hidden: int, experts: int, generator: Generator) -> Tensor | nn.Module:
        """Zero, or as torch draws linear layers: evenly between -1/sqrt(in) and 1/sqrt(in)."""
        if self.router == "linear":
            return torch.zeros(experts, hidden)
        router = modeling.MLPRouter(hidden, experts, cosine=False)
        for parameter in router.parameters():
            bound = parameter.shape[1] ** -0.5
            parameter.data = (2 * torch.rand(parameter.shape, generator=generator) - 1) * bound
        return router


def text_kinds(embeddings: Tensor, texts: list[Tensor], kinds: int, seed: int) -> Tensor:
    """Which of some equally large groups of alike windows each belongs to, [W]."""
    means_WD = torch.stack([embeddings[ids_T.to(embeddings.device)].float().mean(0) for ids_T in texts])
    least = len(texts) // kinds
    return cluster(means_WD, kinds, least, least + (len(texts) % kinds > 0), seed)
