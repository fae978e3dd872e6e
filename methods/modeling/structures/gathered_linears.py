"""Structure: projections that read some of their inputs and write some of their outputs (DISP-LLM, LLM Surgeon).

With C the kept columns and R the kept rows, y[R] = W[R, C] x[C] + b[R], and y is zero elsewhere: a projection whose
other rows (bias included) and columns are zero, of which only W[R, C] is stored. Where a projection reads the residual
stream this is a gather from it, and where it writes it a scatter, so every block can have a subset of its own.
"""

# Shape suffixes: I inputs, O outputs, c kept columns, r kept rows; `...` any leading axes.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.errors import UserError
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.structures.linears import keep_columns, keep_rows

NAME = "gathered_linears"


class GatheredLinear(nn.Module):
    """What is left of a projection, from [..., I] to [..., O] as before."""

    column_index: Tensor | None
    """The inputs that are read, ascending, int32 [c]; None: all."""
    row_index: Tensor | None
    """The outputs that are written, ascending, int32 [r]; None: all."""

    def __init__(self, linear: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> None:
        """Args:
        linear: the projection [O, I], which is cut in place.
        rows, columns: what is kept of it, int64; None: all.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if rows is not None:
            keep_rows(linear, rows)
        if columns is not None:
            keep_columns(linear, columns)
        self.linear = linear
        self.register_buffer("column_index", None if columns is None else columns.int())
        self.register_buffer("row_index", None if rows is None else rows.int())

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        y = self.linear(x if self.column_index is None else x.index_select(-1, self.column_index))
        if self.row_index is None:
            return y
        return y.new_zeros(*y.shape[:-1], self.out_features).index_add_(-1, self.row_index, y)

    def extra_repr(self) -> str:
        """The outer sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def gather_linear(layer: DecoderLayer, name: str, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep some rows and columns of one projection of a block, in place; no effect where all are kept.

    Args:
        name: of the projection relative to the block, for example `layer.family.query`.
        rows, columns: ascending numbers among the present ones, int64, at least one; None: all.

    Raises:
        UserError: nothing would be left, or the projection is gathered already.
    """
    linear = layer.module.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise UserError(f"{name} is gathered or replaced already, so it cannot be gathered. Give the dense model.")
    rows = _some(rows, linear.out_features, f"rows of {name}", linear.weight)
    columns = _some(columns, linear.in_features, f"columns of {name}", linear.weight)
    if rows is not None or columns is not None:
        layer.module.set_submodule(name, GatheredLinear(linear, rows, columns))


def _some(kept: Tensor | None, of: int, what: str, like: Tensor) -> Tensor | None:
    """Checked numbers on the right device; None where all are kept."""
    if kept is None:
        return None
    numbers = kept.tolist()
    if not numbers or numbers != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < of:
        raise UserError(f"the kept {what} must be at least one, each once, ascending, of 0 to {of - 1}.")
    return None if len(numbers) == of else kept.to(like.device)


def gathered_record(model: PreTrainedModel) -> dict[str, Any]:
    """The record of a model whose projections are gathered."""
    return {"layers": [_sizes(layer) for layer in Decoder(model).layers]}


def _sizes(layer: DecoderLayer) -> dict[str, dict[str, int | None]]:
    return {
        name: {
            "rows": None if part.row_index is None else len(part.row_index),
            "columns": None if part.column_index is None else len(part.column_index),
        }
        for name, part in layer.module.named_modules()
        if isinstance(part, GatheredLinear)
    }


def apply(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a model this structure's modules and shapes, in place; the values are to be loaded afterwards.

    Args:
        record: `{"layers": [{name: {"rows": r or None, "columns": c or None}, ...}, ...]}`.
    """
    for layer, projections in zip(Decoder(model).layers, record["layers"], strict=True):
        for name, kept in projections.items():
            linear = layer.module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            sizes = (None if size is None else torch.arange(size) for size in (kept["rows"], kept["columns"]))
            layer.module.set_submodule(name, GatheredLinear(linear, *sizes))
