"""Second moments of a block's activations against plain hooks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from methods import modeling
from methods.base import Context
from methods.block_statistics import gather
from tests.methods.test_floor import dense_shape
from tests.methods.tiny import (
    RandomCalibration,
    logits,
    tiny_model,
)

CALIBRATION = RandomCalibration()


class Seen(dict[str, torch.Tensor]):
    """Inputs and outputs of a block's projections on the calibration text, rows of fp64, by plain hooks."""

    def __init__(self, model: PreTrainedModel, index: int) -> None:
        layer = modeling.Decoder(model).layers[index]
        names = ("q", "k", "v", "down")
        linears = [*layer.attention_inputs, layer.mlp_output]

        def hook(name: str) -> Any:
            return lambda module, args, output: self.update({name: output.flatten(0, -2), "to " + name: args[0]})

        handles = [m.register_forward_hook(hook(name)) for m, name in zip(linears, names, strict=True)]
        logits(model, next(CALIBRATION.batches(99)).input_ids)
        for handle in handles:
            handle.remove()


def test_statistics_against_plain_hooks_and_padding_does_not_count(tmp_path: Path) -> None:
    for name in ("llama-gqa", "phi", "opt"):
        model, shape = tiny_model(name), dense_shape(name)
        found, seen = (
            gather(model, CALIBRATION, Context(scratch=tmp_path, batch_size=5), tmp_path).block(2),
            Seen(model, 2),
        )
        Z, X = seen["to down"].flatten(0, -2), seen["to v"].flatten(0, -2)
        torch.testing.assert_close(found.middle_FF, Z.T @ Z / len(Z))
        torch.testing.assert_close(found.energy, X.square().mean())
        torch.testing.assert_close(found.query_Hh.flatten(), seen["q"].square().mean(0))
        torch.testing.assert_close(found.key_Jh.flatten(), seen["k"].square().mean(0))
        bias = modeling.Decoder(model).layers[2].attention_inputs[2].bias
        v = (seen["v"] - (0 if bias is None else bias)).view(len(Z), shape.kv_heads, -1)
        for j in range(shape.kv_heads):
            torch.testing.assert_close(found.value_Jhh[j], v[:, j].T @ v[:, j] / len(Z))

    gather(tiny_model("llama-gqa"), CALIBRATION, Context(scratch=tmp_path), tmp_path, "float32")
    assert load_file(tmp_path / "block-2.safetensors")["middle_FF"].dtype == torch.float32

    class Cut(RandomCalibration):
        def batches(self, size: int):
            for batch in RandomCalibration(window=24, padded=6).batches(size):
                yield type(batch)(batch.input_ids[:, :18], None)

    model = tiny_model("qwen2")
    padded = gather(model, RandomCalibration(window=24, padded=6), Context(scratch=tmp_path), tmp_path)
    padded_block = padded.block(3)
    plain = gather(model, Cut(), Context(scratch=tmp_path), tmp_path)
    assert padded.influence == pytest.approx(plain.influence)
    for one, other in zip(padded_block, plain.block(3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
