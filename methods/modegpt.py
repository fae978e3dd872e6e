"""MoDeGPT: every module of a block is decomposed by the method that suits it.

Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", https://arxiv.org/abs/2408.09632.
One pass of the dense model gathers, per block, the Block Influence (see `methods.shortgpt`) and uncentred covariances
C = (1/n) sum of x^T x: of the MLP's middle activation (C_m), and per head of queries, keys and values. With x a row, J
what is kept, and widths from `methods.module_widths`:

    MLP (Nystroem)      J: the largest ridge leverages [C_m (C_m + lam I)^-1]_ii
                        Wdown' = Wdown[J] + (C_m[J,J] + delta I)^-1 C_m[J,rest] Wdown[rest]
    query, key (CR)     J: the largest C_q[i,i] C_k[i,i], summed over the query heads of a key head; rotary dimensions
                        in pairs, every key head its own; scale and frequencies are those of the dense head
    value, output (SVD) bo += sum of bv Wo, bv gone: exact, as rows of the softmax sum to one. Then per value head,
                        S = C_x^1/2, of S Wv [Wo_1 ... Wo_r] = U Sigma V^T (the query heads that read it, `joint`) or
                        of S Wv (`value`) the r largest: Wv' = S^-1 U_r, Wo' = Sigma_r V_r^T (or this times Wo)

The SVD needs no root of C_x [D, D]: with L L^T = Wv^T C_x Wv [h, h], the values' covariance, and L^T M = U Sigma V^T
for M = [Wo_1 ... Wo_r] or I, the same pair is Wv' = Wv M V_r Sigma_r^-1 and Wo' = U_r^T L^T Wo.

Departs from the paper: widths are solved for the asked share of active parameters, and rounded to the nearest instead
of down; ridges are shares of the mean diagonal; the Nystroem step is written as a correction of the kept rows, so that
delta > 0 pulls towards them instead of towards zero. Queries and keys that are normalised over the head (Qwen3) stay,
as every dimension enters the norm: the other modules lose more. Where query heads share a value head, `joint` is ours;
the published formula is `value`. Absent is what public reimplementations do otherwise: the narrower head's own softmax
scale, norms over kept dimensions only, the MLP's statistics from the gate alone, up projections that keep other rows.
"""

# Shape suffixes: D hidden size, F MLP channels, H query heads, J key (and value) heads, h head width, P rotary pairs,
# S dimensions that do not rotate, w kept channels or dimensions, r kept value dimensions, M columns.

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from methods import modeling
from methods.allocation import channel_size, highest
from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.block_statistics import BlockStatistics, Statistics, gathered
from methods.errors import UserError
from methods.lazy import torch
from methods.linalg import Precision, ridge_solve
from methods.modeling.shape import DecoderShape
from methods.module_widths import Widths, mean_sparsity, model_size, removable, sparsities, widths
from methods.registry import register
from methods.sharing import alone, shared_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import DecoderLayer


@register("modegpt", title="MoDeGPT", reference="https://arxiv.org/abs/2408.09632", family="width")
@dataclass(frozen=True, kw_only=True)
class MoDeGPT(Method):
    """Decompose MLPs, queries and keys, values and outputs, more of the less influential blocks."""

    streams: ClassVar[bool] = True

    epsilon: float = 0.1
    """How evenly blocks are compressed: the temperature of the softmax over Block Influence; inf: all alike."""
    max_sparsity: float = 0.8
    """The largest share of a block that may go."""
    leverage_ridge: float = 1e-3
    """lam, as a share of the mean diagonal of C_m."""
    solve_ridge: float = 1e-6
    """delta, as a share of the mean diagonal of C_m[J,J]; ten times more as often as the factorization fails."""
    value_ridge: float = 1e-5
    """Added to the eigenvalues of C_x, as a share of their mean."""
    vo: Literal["joint", "value"] = "joint"
    """What the SVD keeps best: the output of all query heads of a value head, or the value."""
    pair_score: Literal["products", "energies"] = "products"
    """Of a rotary pair: the sum of its dimensions' scores (published), or half the product of the pair's energies,
    which no rotation changes."""
    precision: Precision = "float64"
    """In which the MLP's covariance is summed; float32 halves its memory."""

    def __post_init__(self) -> None:
        ridges = (self.leverage_ridge, self.solve_ridge, self.value_ridge)
        if not (self.epsilon > 0 and 0 < self.max_sparsity < 1):
            raise UserError(
                f"modegpt.epsilon is {self.epsilon} and modegpt.max_sparsity {self.max_sparsity}: the first must be "
                "above 0, the second between 0 and 1. Published ones are 0.05 to 0.15, and 0.8 or 0.95: "
                "--set modegpt.epsilon=0.1 modegpt.max_sparsity=0.8"
            )
        if not all(0 <= ridge <= 1 for ridge in ridges) or self.leverage_ridge == 0:
            raise UserError(
                f"modegpt's ridges are {ridges} (leverage, solve, value): shares of a mean diagonal between 0 and 1, "
                "the first above 0. Use --set modegpt.leverage_ridge=0.001"
            )

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The size with all blocks alike; influence moves it by less than a channel while max_sparsity is up to 0.9."""
        if budget.ratio == 1:
            return Prediction(active_total=shape.total, active_block=shape.block)
        mean = mean_sparsity(shape, budget)
        if mean > self.max_sparsity:
            least = 1 - self.max_sparsity * shape.layers * removable(shape) / budget.dense(shape)
            hint = math.ceil(least * 1e4) / 1e4
            raise UserError(
                f"ratio {budget.ratio:g} is not reachable for {self.name}: {mean:.0%} of every block would have to go "
                f"and modegpt.max_sparsity is {self.max_sparsity:g}. Use --ratios {hint:g}, or a higher "
                "--set modegpt.max_sparsity=VALUE below 1."
            )
        return self._checked(shape, budget, widths(shape, budget, [mean] * shape.layers))

    def _checked(self, shape: DecoderShape, budget: Budget, kept: list[Widths]) -> Prediction:
        total, block = model_size(shape, kept)
        step = channel_size(shape) / budget.dense(shape)
        prediction = Prediction(active_total=total, active_block=block, grid_step=step)
        budget.require(self.name, prediction, shape, [budget.achieved(total, block, shape)])
        return prediction

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """Gather and decompose, in place; statistics lie on disk meanwhile, F^2 numbers per block."""
        if budget.ratio == 1:
            return model
        self.predict(modeling.Decoder(model).shape, budget)
        what = {"precision": self.precision, "ridge": self.leverage_ridge}
        with shared_folder(context, calibration, "block statistics", **what) as folder:
            with alone(folder):
                statistics = gathered(model, calibration, context, folder, **what)
            return self.decompose(model, budget, statistics, context)

    def decompose(
        self, model: PreTrainedModel, budget: Budget, statistics: Statistics, context: Context
    ) -> PreTrainedModel:
        """Decompose `model`, whose tensors are used up, by what `gather` found on it: for several ratios of one pass.

        The widths and dampings of all blocks go to `modegpt.json` among the artifacts.
        """
        decoder = modeling.Decoder(model)
        shape, influence = decoder.shape, statistics.influence
        shares = sparsities(influence, mean_sparsity(shape, budget), self.epsilon, self.max_sparsity)
        kept = widths(shape, budget, shares)
        self._checked(shape, budget, kept)
        damping = []
        with torch.no_grad():
            for index, layer in enumerate(context.progress.track(decoder.layers, "decomposing", shape.layers)):
                with modeling.resident(layer.module, model.device):
                    damping.append(self._decompose_block(layer, shape, kept[index], statistics.block(index)))
        rows = zip(influence, shares, kept, damping, strict=True)
        _report(context, [{"influence": i, "sparsity": s, **w._asdict(), **d} for i, s, w, d in rows], asdict(self))
        structures = {
            "narrow_attention": modeling.attention_record(model),
            "narrow_mlp": {"layers": [one.mlp for one in kept]},
        }
        return modeling.rebuild(model, structures)

    def _decompose_block(
        self, layer: DecoderLayer, shape: DecoderShape, kept: Widths, found: BlockStatistics
    ) -> dict[str, float]:
        """MLP, query and key, value and output, each where it is to be narrower; the dampings that the MLP took."""
        damping: dict[str, float] = {}
        if kept.mlp < shape.mlp_width:
            damping = self._decompose_mlp(layer, kept.mlp, found)
        if kept.qk < shape.head_dim:
            pairs, singles = self.scores(found, shape)
            modeling.narrow_qk(layer, shape, choose_dimensions(pairs, singles, kept.qk))
        if kept.vo < shape.head_dim:
            modeling.fold_value_bias(layer)
            self._decompose_values(layer, shape, kept.vo, found)
        return damping

    def _decompose_mlp(self, layer: DecoderLayer, width: int, found: BlockStatistics) -> dict[str, float]:
        neurons = highest(found.leverage_F, width)
        down_Dw, delta = nystroem(found.middle_FF.double(), layer.mlp_output.weight, neurons, self.solve_ridge)
        modeling.narrow_mlp(layer, neurons)
        layer.mlp_output.weight.copy_(down_Dw)
        _require_finite(layer.mlp_output.weight)
        return {"leverage_damping": found.leverage_damping.item(), "solve_damping": delta}

    def scores(self, found: BlockStatistics, shape: DecoderShape) -> tuple[Tensor, Tensor]:
        """What rotary pairs [J, P] and other dimensions [J, S] are worth to every key head."""
        query_Jh = found.query_Hh.view(shape.kv_heads, -1, shape.head_dim).sum(1)
        key_Jh, rotary = found.key_Jh, shape.rotary
        products_Jh = query_Jh * key_Jh
        if self.pair_score == "products":
            return products_Jh[:, :rotary].unflatten(1, (2, -1)).sum(1), products_Jh[:, rotary:]
        query_JP, key_JP = (energy[:, :rotary].unflatten(1, (2, -1)).sum(1) for energy in (query_Jh, key_Jh))
        return query_JP * key_JP / 2, products_Jh[:, rotary:]

    def _decompose_values(self, layer: DecoderLayer, shape: DecoderShape, r: int, found: BlockStatistics) -> None:
        """The first r dimensions of every head become the new ones, then only they are kept."""
        h, readers = shape.head_dim, shape.heads // shape.kv_heads
        value_JhD = layer.attention_inputs[2].weight.view(shape.kv_heads, h, -1)
        output_DJRh = layer.attention_output.weight.view(-1, shape.kv_heads, readers, h)
        for j in range(shape.kv_heads):
            rows_hD, columns_DRh = value_JhD[j].double(), output_DJRh[:, j].double()
            C_hh = found.value_Jhh[j] + self.value_ridge * found.energy * (rows_hD @ rows_hD.T)
            M_hM = columns_DRh.flatten(0, 1).T if self.vo == "joint" else torch.eye(h).to(C_hh)
            inward_hr, outward_rh = value_basis(C_hh, M_hM, r)
            value_JhD[j, :r] = (inward_hr.T @ rows_hD).to(value_JhD.dtype)
            output_DJRh[:, j, :, :r] = (columns_DRh @ outward_rh.T).to(output_DJRh.dtype)
        modeling.narrow_vo(layer, shape, range(r))
        _require_finite(value_JhD, output_DJRh)


def nystroem(C_FF: Tensor, down_DF: Tensor, neurons: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The weight [D, w] with which some neurons do best what all did, in fp64, and the damping that it took."""
    gone = torch.ones(len(C_FF), dtype=torch.bool, device=C_FF.device)
    gone[neurons] = False
    down_DF, C_wF = down_DF.double(), C_FF[neurons]
    correction_wD, delta = ridge_solve(C_wF[:, neurons], C_wF[:, gone] @ down_DF[:, gone].T, ridge)
    return down_DF[:, neurons] + correction_wD.T, delta


def choose_dimensions(pairs_JP: Tensor, singles_JS: Tensor, width: int) -> Tensor:
    """The `width` dimensions of highest score of every head, ascending, shape [J, width].

    All heads keep equally many pairs: the number for which the sum of all scores is highest.
    """
    P, S = pairs_JP.shape[1], singles_JS.shape[1]

    def worth(pairs: int) -> float:
        chosen = pairs_JP.topk(pairs).values.sum() + singles_JS.topk(width - 2 * pairs).values.sum()
        return chosen.item()

    pairs = max(range(max(0, (width - S + 1) // 2), min(P, width // 2) + 1), key=worth)
    kept = []
    for pair_P, single_S in zip(pairs_JP, singles_JS, strict=True):
        first, rest = highest(pair_P, pairs), highest(single_S, width - 2 * pairs)
        kept.append(torch.cat([first, first + P, rest + 2 * P]))
    return torch.stack(kept)


def value_basis(C_hh: Tensor, M_hM: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A [h, r], B [r, h]): the pair of rank r for which the mean square of v A B M - v M is least.

    Args:
        C_hh: covariance of v; it may be singular.
        M_hM: what v is multiplied with.
    """
    eigenvalues, vectors = torch.linalg.eigh(C_hh)
    rounding = eigenvalues[-1] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    root_hh = vectors * torch.where(eigenvalues > rounding, eigenvalues, 0).sqrt()
    U, sigma, Vh = torch.linalg.svd(root_hh.T @ M_hM, full_matrices=False)
    noise = sigma[0] * len(sigma) * torch.finfo(sigma.dtype).eps
    inverse_r = torch.where(sigma > noise, 1 / sigma, 0)[:r]  # directions that carry nothing stay empty
    return M_hM @ Vh[:r].T * inverse_r, U[:, :r].T @ root_hh.T


def _require_finite(*weights: Tensor) -> None:
    """Refuse what the model's dtype cannot hold."""
    if not all(weight.isfinite().all() for weight in weights):
        raise UserError(
            f"a decomposed weight does not fit {weights[0].dtype}. Use --dtype bfloat16 or float32, or larger ridges "
            "(--set modegpt.value_ridge=1e-5 is the default)."
        )


def _report(context: Context, blocks: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    if context.artifacts is not None:
        context.artifacts.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": settings, "blocks": blocks}, indent=1)
        (context.artifacts / "modegpt.json").write_text(content + "\n", encoding="utf-8")
