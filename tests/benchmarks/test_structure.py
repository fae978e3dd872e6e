"""structure.json: what is beside a record says what the model is made of and where tokens go."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import small_run


@pytest.fixture(scope="module")
def structures(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """structure.json by method."""
    out = tmp_path_factory.mktemp("structure")
    settings = ("--set", "tomoe.steps=2", "--set", "tomoe.experts=3", "--set", "tomoe.embedding=2")
    assert small_run.run(inputs, "--methods", "tomoe", *settings, out=str(out)) == 0
    return {path.parents[2].name: json.loads(path.read_text()) for path in out.glob("*/*/*/*/structure.json")}


def test_of_a_mixture(structures: dict[str, Any]) -> None:
    told = structures["tomoe"]
    keys = ["model_type", "num_hidden_layers", "compression", "removed_layers", "rotated_width", "narrow_width"]
    assert list(told) == [*keys, "layers", "loads"]
    assert told["model_type"] == "tomoe_bench_llama" and told["num_hidden_layers"] == len(told["layers"]) == 4
    assert told["compression"]["structures"]["moe_mlp"]["layers"][0]["experts"] == 3
    for layer, shares in zip(told["layers"], told["loads"]["calibration"], strict=True):
        assert 0 < layer["mlp"]["kept"] <= layer["mlp"]["full"] == 48
        assert 0 < layer["mixture"]["union_share"] <= 1 and len(layer["mixture"]["raw_widths"]) == 3
        assert [row[i] for i, row in enumerate(layer["mixture"]["cosine"])] == pytest.approx([1, 1, 1])
        assert len(shares) == 3 and sum(shares) == pytest.approx(1)


def test_of_a_dense_model(structures: dict[str, Any]) -> None:
    told = structures["dense"]
    assert told["compression"] is None and told["loads"] == {}
    assert [layer["mixture"] for layer in told["layers"]] == [None] * 4
