"""Second moments of the activations of every block of a dense model, from one pass of the calibration text (MoDeGPT).

The pass goes block by block (`modeling.Signals`), so that one block's covariances are on the device at a time; those of
finished blocks lie in a folder, one safetensors file each (8 F^2 bytes and little more, half of that in fp32).
"""

# Shape suffixes: B batch, T tokens, D hidden size, F MLP channels, H query heads, J key (and value) heads,
# h head width, N real tokens.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from methods import modeling
from methods.base import Calibration, Context
from methods.errors import UserError
from methods.lazy import torch
from methods.linalg import Covariance, Precision, ridge_leverage
from methods.modeling.shape import DecoderShape
from methods.sharing import REUSED, read_or, write_whole
from methods.shortgpt import cosine, finite

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.modeling import DecoderLayer


class BlockStatistics(NamedTuple):
    """Means over the real tokens; fp64 but for the MLP's, which is as it was summed."""

    query_Hh: Tensor
    """Mean square of every query dimension before the rotation, bias included."""
    key_Jh: Tensor
    """Of every key dimension, likewise."""
    value_Jhh: Tensor
    """Uncentred covariance of every value head, without bias."""
    middle_FF: Tensor
    """Uncentred covariance of what the down projection reads."""
    leverage_F: Tensor
    """Ridge leverage of every MLP channel, [C (C + lam I)^-1]_ii of that covariance."""
    leverage_damping: Tensor
    """lam. Shape []."""
    energy: Tensor
    """Mean square of an entry of what attention reads: the mean eigenvalue of its covariance. Shape []."""


@dataclass(frozen=True)
class Statistics:
    """Of all blocks of one model on one calibration text."""

    folder: Path
    """Where the files are."""
    influence: list[float]
    """Block Influence."""
    tokens: int
    """Real tokens of the text."""
    device: torch.device
    """Where the model is."""

    def block(self, index: int) -> BlockStatistics:
        """Those of one block, on the device."""
        from safetensors.torch import load_file

        return BlockStatistics(**load_file(_file(self.folder, index), device=str(self.device)))


def _file(folder: Path, index: int) -> Path:
    return folder / f"block-{index}.safetensors"


def gathered(
    model: PreTrainedModel, calibration: Calibration, context: Context, folder: Path, precision: Precision, ridge: float
) -> Statistics:
    """What an earlier cell has left in the folder, or else `gather`."""
    found = read_or(folder / "index.json", None)
    if found is None:
        return gather(model, calibration, context, folder, precision, ridge)
    context.note(REUSED.format("block statistics"))
    return _checked(Statistics(folder, found["influence"], found["tokens"], model.device), model, context)


def gather(
    model: PreTrainedModel,
    calibration: Calibration,
    context: Context,
    folder: Path,
    precision: Precision = "float64",
    ridge: float = 1e-3,
) -> Statistics:
    """One pass of a dense model over the calibration text.

    Args:
        folder: exists; gets one file per block, and when all are there index.json.
        precision: in which the MLP's covariance is summed.
        ridge: of the leverages, as a share of the mean diagonal.

    Raises:
        UserError: no text, an overflow, or a device without fp64.
    """
    from safetensors.torch import save_file

    if model.device.type == "mps":
        raise UserError("these statistics need fp64, which this device does not have. Use --device cpu.")
    decoder, influence, tokens = modeling.Decoder(model), [], 0
    with torch.no_grad():
        signals = modeling.Signals.of(decoder, calibration, context.batch_size)
        for index, layer in enumerate(context.progress.track(decoder.layers, "gathering", len(decoder.layers))):
            observer = BlockObserver(layer, decoder.shape, model.device, precision)
            with observer.listening(), modeling.resident(layer.module, model.device):
                signals.update(observer.step)
            save_file(observer.statistics(ridge)._asdict(), _file(folder, index))
            influence.append(observer.influence())
            tokens = observer.tokens
    write_whole(folder / "index.json", {"influence": finite(influence), "tokens": tokens})
    return _checked(Statistics(folder, influence, tokens, model.device), model, context)


def _checked(statistics: Statistics, model: PreTrainedModel, context: Context) -> Statistics:
    """Tell the reader of a result that rests on too little text."""
    width = modeling.Decoder(model).shape.mlp_width
    if statistics.tokens < width:
        context.note(
            f"{statistics.tokens} calibration tokens for MLPs of {width} channels: their covariances are singular, and "
            "damping decides about what the text does not show"
        )
    return statistics


class BlockObserver:
    """Runs one block and adds up what passes through it."""

    def __init__(self, layer: DecoderLayer, shape: DecoderShape, device: torch.device, precision: Precision) -> None:
        self._layer = layer
        query, key, value = layer.attention_inputs
        self._modules = {"query": query, "key": key, "value": value, "down": layer.mlp_output}
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._heads = {
            name: Covariance(shape.head_dim, device, heads=heads)
            for name, heads in (("query", shape.heads), ("key", shape.kv_heads), ("value", shape.kv_heads))
        }
        self._middle = Covariance(shape.mlp_width, device, precision=precision)
        self._energy = torch.zeros((), dtype=torch.float64, device=device)
        self._cosines = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, inputs and outputs of the block's projections are seen."""

        def hook(name: str) -> Any:
            return lambda module, args, output: self._seen.__setitem__(name, (args[0], output))

        handles = [module.register_forward_hook(hook(name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def step(self, x_BTD: Tensor, keywords: dict[str, Any], mask_BT: Tensor | None) -> Tensor:
        """The block's output for one batch."""
        output = self._layer.module(x_BTD, **keywords)
        y_BTD = output[0] if isinstance(output, tuple) else output

        def real(z: Tensor) -> Tensor:
            return modeling.real_tokens(z.view(*x_BTD.shape[:2], -1), mask_BT)

        self._cosines += real(cosine(x_BTD, y_BTD)).double().sum().item()
        self._energy += real(self._seen["value"][0]).double().square().mean(1).sum()
        self._middle.add(real(self._seen["down"][0]))
        for name, covariance in self._heads.items():
            projected_ND = real(self._seen[name][1])
            bias = self._modules[name].bias
            if name == "value" and bias is not None:  # subtracting it would leave the rounding of the sum
                inputs_ND = real(self._seen[name][0])
                projected_ND = torch.nn.functional.linear(inputs_ND, self._modules[name].weight)
            covariance.add(projected_ND.view(len(projected_ND), len(covariance.sum), -1).transpose(0, 1))
        self._seen.clear()
        return y_BTD

    def statistics(self, ridge: float) -> BlockStatistics:
        """The means.

        Raises:
            UserError: no tokens, or an overflow.
        """
        middle_FF = self._middle.mean()
        query, key, value = (covariance.mean() for covariance in self._heads.values())
        query_Hh, key_Jh = (one.diagonal(dim1=-2, dim2=-1).contiguous() for one in (query, key))
        leverage_F, lam = ridge_leverage(middle_FF.double(), ridge)
        energy = self._energy / self._middle.tokens
        return BlockStatistics(
            query_Hh, key_Jh, value, middle_FF, leverage_F, torch.tensor(lam, dtype=torch.float64), energy
        )

    @property
    def tokens(self) -> int:
        """Real tokens so far."""
        return self._middle.tokens

    def influence(self) -> float:
        """Block Influence: 1 - the mean cosine of the block's input and output."""
        return 1 - self._cosines / self._middle.tokens
