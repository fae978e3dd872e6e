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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from methods import modeling
from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import Decoder, DecoderLayer

BATCH_SIZE = 8


@register("slicegpt", title="SliceGPT", reference="https://arxiv.org/abs/2401.15024", family="width")
@dataclass(frozen=True, kw_only=True)
class SliceGPT(Method):
    """Delete the smallest principal components of the residual stream."""

    round_interval: int = 8
    """The kept width is a multiple of this."""
    orientation: Literal["random", "pca"] = "random"
    """Rotate the kept components among themselves at random (published default; spreads outliers), or not."""

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The size at the largest width that does not exceed the ratio."""
        width = self.width(shape, budget)
        step = self.round_interval
        sizes = [sliced_size(shape, w) for w in (width, width + step) if w <= shape.hidden]
        ratios = [budget.achieved(total, block, shape) for total, block in sizes]
        smaller = sliced_size(shape, max(width - step, 0))
        grid_step = abs(ratios[0] - budget.achieved(*smaller, shape))
        prediction = Prediction(active_total=sizes[0][0], active_block=sizes[0][1], grid_step=grid_step)
        budget.require(self.name, prediction, shape, ratios)
        return prediction

    def width(self, shape: DecoderShape, budget: Budget) -> int:
        """The largest multiple of `round_interval` whose size is within the ratio, or else the smallest one."""
        widths = range(self.round_interval, shape.hidden + 1, self.round_interval)
        fitting = [w for w in widths if budget.achieved(*sliced_size(shape, w), shape) <= budget.ratio]
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
        with torch.no_grad():
            decoder = modeling.Decoder(model)
            fold_norms(decoder)
            calls = list(modeling.layer_calls(decoder, calibration.batches(BATCH_SIZE)))
            masks = [batch.mask for batch in calibration.batches(BATCH_SIZE)]
            generator = torch.Generator().manual_seed(context.seed)
            slicer = Slicer(decoder.shape.hidden, width, generator if self.orientation == "random" else None)
            rotate_and_slice(decoder, slicer, Signals(calls, masks), context)
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
        return readers + writers + shortcuts

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
            table.weight.sub_(table.weight.mean(1, keepdim=True))
        for layer in decoder.layers:
            for writer in (layer.attention_output, layer.mlp_output):
                writer.weight.sub_(writer.weight.mean(0))
                if writer.bias is not None:
                    writer.bias.sub_(writer.bias.mean())


def _fold(norm: nn.Module, readers: list[nn.Linear]) -> None:
    """Move a norm's gain and shift into the linears that read it, in fp64."""
    gain, shift = norm.get_parameter("weight").double(), getattr(norm, "bias", None)
    for linear in readers:
        weight = linear.weight.double()
        if shift is not None:
            old = 0 if linear.bias is None else linear.bias.double()
            linear.bias = torch.nn.Parameter((old + weight @ shift.double()).to(linear.weight.dtype))
        linear.weight.copy_(weight * gain)


@dataclass
class Signals:
    """The residual stream at one point of the network, for all calibration batches, on the CPU."""

    calls: list[tuple[Tensor, dict[str, Any]]]
    """Per batch: signal [B, T, D or d], and the keywords that every block is called with."""
    masks: list[Tensor | None]

    def update(self, function: Any) -> None:
        """Replace each batch's signal x by function(x, keywords)."""
        self.calls = [(function(x_BTD, kwargs), kwargs) for x_BTD, kwargs in self.calls]

    def rows(self) -> Iterator[Tensor]:
        """Per batch, the signal of the real tokens, shape [tokens, D]."""
        for (x_BTD, _), mask_BT in zip(self.calls, self.masks, strict=True):
            yield x_BTD.flatten(0, 1) if mask_BT is None else x_BTD[mask_BT.bool().to(x_BTD.device)]


@dataclass(frozen=True)
class Slicer:
    """Step 2's arithmetic: bases and cuts, in fp64."""

    hidden: int
    width: int
    generator: torch.Generator | None
    """Randomly orients the kept components; None leaves them as principal components."""

    def basis(self, signals: Signals) -> Tensor:
        """Q [D, D]: orthonormal columns, principal components of the signals, largest first."""
        H = torch.zeros(self.hidden, self.hidden, dtype=torch.float64)
        for rows in signals.rows():
            rows = rows.double()
            H = H.to(rows.device) + rows.T @ rows
        Q = torch.linalg.eigh(H)[1].flip(1)
        if self.generator is not None:
            gaussian = torch.randn(self.width, self.width, dtype=torch.float64, generator=self.generator)
            Q[:, : self.width] = Q[:, : self.width] @ torch.linalg.qr(gaussian)[0].to(Q.device)
        return Q

    def cut(self, x: Tensor, Q: Tensor) -> Tensor:
        """Rows of x in the basis Q, first d components: [..., D] to [..., d]."""
        return (x.double() @ Q[:, : self.width]).to(x.dtype)


def read_in_basis(linears: list[nn.Linear], Q: Tensor, width: int) -> None:
    """W <- (W Q)[:, :d] for linears that read the stream."""
    for linear in linears:
        linear.weight = torch.nn.Parameter((linear.weight.double() @ Q[:, :width]).to(linear.weight.dtype))
        linear.in_features = width


def write_in_basis(linear: nn.Linear, Q: Tensor, width: int) -> None:
    """W <- (Q^T W)[:d], b <- (Q^T b)[:d] for a linear that writes to the stream."""
    dtype = linear.weight.dtype
    linear.weight = torch.nn.Parameter((Q[:, :width].T @ linear.weight.double()).to(dtype))
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter((Q[:, :width].T @ linear.bias.double()).to(dtype))
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
        Q = step(layer, Q, slicer, signals, out)
    modeling.replace_norm(decoder.model, decoder.family.final_norm, slicer.hidden)
    read_in_basis([decoder.head], Q, slicer.hidden)


def slice_sequential(layer: DecoderLayer, Q: Tensor, slicer: Slicer, signals: Signals, out: int) -> Tensor:
    """One sequential block; returns the basis of its output. `signals` enter and leave in the full, unrotated width."""
    d, dtype = slicer.width, layer.mlp_output.weight.dtype
    block: Any = modeling.convert_layer(layer, slicer.hidden)

    read_in_basis(layer.attention_inputs, Q, d)
    block.shortcut_attention = torch.nn.Parameter(Q[:, :d].T.to(dtype).contiguous())
    signals.update(lambda x, kwargs: block.attention_half(slicer.cut(x, Q), **kwargs))
    Q_mid = slicer.basis(signals)
    write_in_basis(layer.attention_output, Q_mid, d)
    block.shortcut_attention = torch.nn.Parameter((Q[:, :d].T @ Q_mid[:, :d]).to(dtype))

    read_in_basis(layer.mlp_inputs, Q_mid, d)
    block.shortcut_mlp = torch.nn.Parameter(Q_mid[:, :d].T.to(dtype).contiguous())
    signals.update(lambda h, kwargs: block.mlp_half(slicer.cut(h, Q_mid)))
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
    signals.update(lambda x, kwargs: block(slicer.cut(x, Q), **kwargs))
    Q_out = slicer.basis(signals)
    write_in_basis(layer.attention_output, Q_out, out)
    write_in_basis(layer.mlp_output, Q_out, out)
    block.shortcut_mlp = torch.nn.Parameter((Q[:, :d].T @ Q_out[:, :out]).to(dtype))
    return Q_out
