"""Whether a model fits on a device is asked of what it takes when it runs."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import methods
from benchmarks import checkpoint
from methods.errors import UserError
from tests.methods.test_sparsity import pruned
from tests.methods.tiny import tiny_model


def test_the_matrices_of_a_sparse_model_need_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama-gqa", dtype=torch.float32)
    matrices = sum(
        4 * part.weight.numel() for part in dense.model.layers.modules() if isinstance(part, torch.nn.Linear)
    )
    small, _ = pruned("magnitude", dense, tmp_path / "scratch")
    small.save_pretrained(tmp_path / "model")
    need = 1.2 * (small.get_memory_footprint() + matrices)
    job: Any = SimpleNamespace(cell=SimpleNamespace(dtype="float32", model="m"), device="cpu", title="t")
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: need + 1)
    checkpoint.load_model(tmp_path / "model", job, whole=True)
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: need - 1)
    with pytest.raises(UserError, match="needs all of m on cpu") as refused:
        checkpoint.load_model(tmp_path / "model", job, whole=True)
    listed = re.search(r"block by block \((.*)\)", str(refused.value))
    assert listed and {"cmoe", "g-moefication", "slicegpt"} <= {*listed[1].split(", ")}
    assert {methods.get(name).streams for name in listed[1].split(", ")} == {True}
