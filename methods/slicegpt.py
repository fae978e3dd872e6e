"""SliceGPT: rotate the residual stream onto its principal components and drop the small ones.

Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
https://arxiv.org/abs/2401.15024; facts of the released code from microsoft/TransformerCompression at 6b12cde.

1. `fold_norms` makes every norm a bare RMS norm without changing the function (the paper's computational invariance):
   gains and shifts go into the projections that read the norm, the mean that a LayerNorm subtracts into the embeddings
   and into the projections that write to the stream.
2. Layer by layer, on the network sliced so far, Q = eigenvectors of H = sum of x^T x (fp64, largest first) of the
   signal x entering each norm; the projections around it are rotated and cut to d columns, and the skip connection gets
   the shortcut matrix between the old basis and the new one.
3. The last MLP's output and the head are rotated but not cut.

The kept width d is solved for the asked share of *active parameters*, shortcuts and the untied head included.

Departs from the released code: the mean is subtracted from the embeddings of LayerNorm models only (for RMSNorm it is
not an invariance); norms keep the model's own epsilon; the random rotation is seeded; the damping of H is left out,
since adding a multiple of the identity changes no eigenvector.
"""

# Shape suffixes: B batch, T tokens, D hidden size, d kept width.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from methods import modeling
from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.errors import UserError
from methods.lazy import torch
from methods.linalg import Covariance
from methods.modeling.shape import DecoderShape
from methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import Decoder, DecoderLayer, Signals

CHUNK = 8192
"""Rows of a matrix that are held in fp64 at a time."""


@register("slicegpt", title="SliceGPT", reference="https://arxiv.org/abs/2401.15024", family="width")
@dataclass(frozen=True, kw_only=True)
class SliceGPT(Method):
    """Delete the smallest principal components of the residual stream."""

    streams: ClassVar[bool] = True

    round_interval: int = 8
    """The kept width is a multiple of this."""
    orientation: Literal["random", "pca"] = "random"
    """Rotate the kept components among themselves at random (published default; spreads outliers), or not."""

    def __post_init__(self) -> None:
        if self.round_interval < 1:
            raise UserError(
                f"slicegpt.round_interval is {self.round_interval}; the least is 1, the published one is 8."
            )

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The size at the largest width that does not exceed the ratio."""
        if budget.ratio == 1:
            return Prediction(active_total=shape.total, active_block=shape.block)
        width, step = self.width(shape, budget), self.round_interval
        ratios = [budget.achieved(*sliced_size(shape, w), shape) for w in (width - step, width, width + step)]
        total, block = sliced_size(shape, width)
        grid_step = max(ratios[1] - ratios[0], ratios[2] - ratios[1])
        prediction = Prediction(active_total=total, active_block=block, grid_step=grid_step)
        budget.require(self.name, prediction, shape, ratios[1:] if width < shape.hidden else ratios[:2])
        return prediction

    def width(self, shape: DecoderShape, budget: Budget) -> int:
        """The largest multiple of `round_interval` whose size is within the ratio, or else the smallest one.

        Within means to four digits, so that a ratio copied from a table or a message finds the size it names.
        """
        widths = range(self.round_interval, shape.hidden + 1, self.round_interval)
        limit = budget.ratio + 5e-5
        fitting = [w for w in widths if budget.achieved(*sliced_size(shape, w), shape) <= limit]
        return max(fitting, default=min(widths, default=shape.hidden))

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """Fold, rotate and slice `model`; its tensors are used up."""
        if budget.ratio == 1:
            return model
        shape = modeling.Decoder(model).shape
        self.predict(shape, budget)
        return self.slice(model, self.width(shape, budget), calibration, context)

    def slice(self, model: PreTrainedModel, width: int, calibration: Calibration, context: Context) -> PreTrainedModel:
        """Slice to a given width d <= D (d = D is a change of basis and nothing else)."""
        if model.device.type == "mps":
            raise UserError("slicegpt computes in fp64, which this device does not have. Use --device cpu.")
        with torch.no_grad():
            decoder = modeling.Decoder(model)
            fold_norms(decoder)
            generator = torch.Generator().manual_seed(context.seed)
            slicer = Slicer(decoder.shape.hidden, width, generator if self.orientation == "random" else None)
            rotate_and_slice(decoder, slicer, modeling.Signals.of(decoder, calibration, context.batch_size), context)
        return modeling.rebuild(model, {"rotated_residual": {"width": width}}, tie_word_embeddings=False)


def sliced_size(shape: DecoderShape, width: int) -> tuple[int, int]:
    """(total, block) parameters after slicing to a width: closed form, equal to counting the tensors."""
    D, d, F, V = shape.hidden, width, shape.mlp_width, shape.vocabulary
    qkv, heads = shape.attention_width + 2 * shape.kv_width, shape.attention_width
    inputs, shift = 2 if shape.gated else 1, shape.layer_norm

    def layer(out: int) -> int:
        attention_out = out if shape.parallel else d
        readers = (qkv + inputs * F) * d + qkv * (shape.qkv_bias or shift) + inputs * F * (shape.mlp_bias or shift)
        writers = heads * attention_out + attention_out * shape.output_bias + F * out + out * shape.mlp_bias
        shortcuts = d * out + (0 if shape.parallel else d * d)
        return readers + writers + shortcuts + shape.head_norms

    block = (shape.layers - 1) * layer(d) + layer(D)
    head = V * D + V * (shape.head_bias or shift)
    return (V + shape.learned_positions) * d + block + head, block


def fold_norms(decoder: Decoder) -> None:
    """Step 1: after it, replacing every norm by a bare RMS norm leaves the logits as they are. Unties the head."""
    head = decoder.head
    head.weight = torch.nn.Parameter(head.weight.clone())
    for layer in decoder.layers:
        readers = layer.attention_inputs + (layer.mlp_inputs if layer.parallel else [])
        _fold(layer.attention_norm, readers)
        if not layer.parallel:
            _fold(layer.mlp_norm, layer.mlp_inputs)
    _fold(decoder.final_norm, [head])
    if decoder.shape.layer_norm:
        for table in decoder.embeddings:
            _subtract_mean(table.weight, 1)
        for layer in decoder.layers:
            for writer in (layer.attention_output, layer.mlp_output):
                _subtract_mean(writer.weight, 0)
                if writer.bias is not None:
                    _subtract_mean(writer.bias, 0)


def _subtract_mean(tensor: Tensor, axis: int) -> None:
    """Subtract the mean along an axis, in place, in fp64 and rounded once."""
    for part in tensor.split(CHUNK, 1 - axis) if tensor.ndim == 2 else [tensor]:
        exact = part.double()
        part.copy_(exact - exact.mean(axis, keepdim=True))


def _fold(norm: nn.Module, readers: list[nn.Linear]) -> None:
    """Move a norm's gain and shift into the linears that read it, in fp64 and rounded once."""
    gain, shift = norm.get_parameter("weight").double(), getattr(norm, "bias", None)
    for linear in readers:
        parts = linear.weight.split(CHUNK)
        if shift is not None:
            added = torch.cat([part.double() @ shift.double() for part in parts])
            old = 0 if linear.bias is None else linear.bias.double()
            linear.bias = torch.nn.Parameter((old + added).to(linear.weight.dtype))
        for part in parts:
            part.copy_(part.double() * gain)


@dataclass(frozen=True)
class Slicer:
    """Step 2's arithmetic: bases and cuts, in fp64."""

    hidden: int
    width: int
    generator: torch.Generator | None
    """Randomly orients the kept components; None leaves them as principal components."""

    def basis(self, signals: Signals) -> Tensor:
        """Q [D, D]: orthonormal columns, principal components of the signals, largest first."""
        covariance = Covariance(self.hidden, signals.device)
        for rows in signals.rows():
            covariance.add(rows)
        covariance.require_rank(self.width)
        Q = torch.linalg.eigh(covariance.sum)[1].flip(1)
        if self.generator is not None:
            gaussian = torch.randn(self.width, self.width, dtype=torch.float64, generator=self.generator)
            Q[:, : self.width] = Q[:, : self.width] @ torch.linalg.qr(gaussian)[0].to(Q.device)
        return Q

    def cut(self, x: Tensor, Q: Tensor) -> Tensor:
        """Rows of x in the basis Q, first d components: [..., D] to [..., d]."""
        return times(x, Q[:, : self.width])


def times(x: Tensor, Q: Tensor) -> Tensor:
    """x Q, computed in fp64 and rounded once; a few rows at a time, since a vocabulary's fp64 copy is gigabytes."""
    return torch.cat([(rows.double() @ Q).to(x.dtype) for rows in x.split(CHUNK)])


def read_in_basis(linears: list[nn.Linear], Q: Tensor, width: int) -> None:
    """W <- (W Q)[:, :d] for linears that read the stream."""
    for linear in linears:
        linear.weight = torch.nn.Parameter(times(linear.weight, Q[:, :width]))
        linear.in_features = width


def write_in_basis(linear: nn.Linear, Q: Tensor, width: int) -> None:
    """W <- (Q^T W)[:d], b <- (Q^T b)[:d] for a linear that writes to the stream."""
    linear.weight = torch.nn.Parameter(times(linear.weight.T, Q[:, :width]).T.contiguous())
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(times(linear.bias[None], Q[:, :width])[0])
    linear.out_features = width


def rotate_and_slice(decoder: Decoder, slicer: Slicer, signals: Signals, context: Context) -> None:
    """Steps 2 and 3, in place: every layer becomes a rotated block of its final shape."""
    Q = slicer.basis(signals)
    for table in decoder.embeddings:
        table.weight = torch.nn.Parameter(slicer.cut(table.weight, Q))
    layers = decoder.layers
    for index, layer in enumerate(context.progress.track(layers, "slicing layers", len(layers))):
        out = slicer.hidden if index == len(layers) - 1 else slicer.width
        step = slice_parallel if layer.parallel else slice_sequential
        with modeling.resident(layer.module, signals.device):
            Q = step(layer, Q, slicer, signals, out)
    modeling.replace_norm(decoder.model, decoder.family.final_norm, slicer.hidden)
    read_in_basis([decoder.head], Q, slicer.hidden)


def slice_sequential(layer: DecoderLayer, Q: Tensor, slicer: Slicer, signals: Signals, out: int) -> Tensor:
    """One sequential block; returns the basis of its output. `signals` enter and leave in the full, unrotated width."""
    d, dtype = slicer.width, layer.mlp_output.weight.dtype
    block: Any = modeling.convert_layer(layer, slicer.hidden)

    read_in_basis(layer.attention_inputs, Q, d)
    block.shortcut_attention = torch.nn.Parameter(Q[:, :d].T.to(dtype).contiguous())
    signals.update(lambda x, kwargs, mask: block.attention_half(slicer.cut(x, Q), **kwargs))
    Q_mid = slicer.basis(signals)
    write_in_basis(layer.attention_output, Q_mid, d)
    block.shortcut_attention = torch.nn.Parameter((Q[:, :d].T @ Q_mid[:, :d]).to(dtype))

    read_in_basis(layer.mlp_inputs, Q_mid, d)
    block.shortcut_mlp = torch.nn.Parameter(Q_mid[:, :d].T.to(dtype).contiguous())
    signals.update(lambda h, kwargs, mask: block.mlp_half(slicer.cut(h, Q_mid)))
    Q_out = slicer.basis(signals)
    write_in_basis(layer.mlp_output, Q_out, out)
    block.shortcut_mlp = torch.nn.Parameter((Q_mid[:, :d].T @ Q_out[:, :out]).to(dtype))
    return Q_out


def slice_parallel(layer: DecoderLayer, Q: Tensor, slicer: Slicer, signals: Signals, out: int) -> Tensor:
    """One parallel block: attention and MLP share both bases and the shortcut."""
    d, dtype = slicer.width, layer.mlp_output.weight.dtype
    block: Any = modeling.convert_layer(layer, slicer.hidden)
    read_in_basis(layer.attention_inputs + layer.mlp_inputs, Q, d)
    block.shortcut_mlp = torch.nn.Parameter(Q[:, :d].T.to(dtype).contiguous())
    signals.update(lambda x, kwargs, mask: block(slicer.cut(x, Q), **kwargs))
    Q_out = slicer.basis(signals)
    write_in_basis(layer.attention_output, Q_out, out)
    write_in_basis(layer.mlp_output, Q_out, out)
    block.shortcut_mlp = torch.nn.Parameter((Q[:, :d].T @ Q_out[:, :out]).to(dtype))
    return Q_out
