"""routes.json: which experts the tokens of the example texts met, and how sure the router was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import models, routes
from methods import modeling
from tests.benchmarks import small_run

SETTINGS = ("--set", "tomoe.steps=2", "--set", "tomoe.experts=3", "--set", "tomoe.embedding=2")


@pytest.fixture(scope="module")
def cells(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("routes")
    assert small_run.run(inputs, "--methods", "tomoe", *SETTINGS, "--checkpoints", str(out), out=str(out)) == 0
    return out


@pytest.fixture(scope="module")
def told(cells: Path) -> dict[str, Any]:
    (path,) = cells.glob("*/tomoe/*/*/routes.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_only_models_with_experts_have_routes(cells: Path) -> None:
    assert len(list(cells.glob("*/*/*/*/structure.json"))) == 2
    assert len(list(cells.glob("*/*/*/*/routes.json"))) == 1


def test_every_token_of_every_layer_has_its_experts(told: dict[str, Any]) -> None:
    assert told["probability"] == "softmax over the router's logits, rounded to 4 digits"
    assert [text["name"] for text in told["texts"]] == ["encyclopaedic", "mathematical", "code"]
    for text in told["texts"]:
        assert len(text["tokens"]) == 128  # the model's limit; its tokenizer makes a token of every byte
        assert [layer["layer"] for layer in text["layers"]] == [0, 1, 2, 3]
        for layer in text["layers"]:
            assert len(layer["experts"]) == len(layer["probabilities"]) == 128


def test_choices_and_probabilities_are_the_model_s(cells: Path, told: dict[str, Any]) -> None:
    """Against the checkpoint loaded anew, its routers called on what its blocks were given."""
    (folder,) = cells.glob("*/tomoe/*/*/checkpoint")
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), models.load_tokenizer(folder)
    ids = tokenizer((routes.TEXTS / "code.txt").read_text(), return_tensors="pt")["input_ids"][:, :128]
    inputs: list[torch.Tensor] = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids)
        logits = [block.mlp.router(seen[0]) for block, seen in zip(model.model.layers, inputs, strict=True)]
    chosen = modeling.expert_ids(model, ids)[:, 0]
    for n, layer in enumerate(told["texts"][2]["layers"]):
        assert layer["of"] == 3 and layer["experts"] == chosen[n, :, None].tolist()
        odds = torch.exp(logits[n]) / torch.exp(logits[n]).sum(-1, keepdim=True)
        expected = [[pytest.approx(float(odds[t, chosen[n, t]]), abs=6e-5)] for t in range(128)]
        assert layer["probabilities"] == expected


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-phi"])
def test_texts_are_as_long_as_promised(name: str) -> None:
    tokenizer = models.load_tokenizer(models.resolve(name).prepare())
    for text in routes.NAMES:
        content = (routes.TEXTS / f"{text}.txt").read_text(encoding="utf-8")
        ids = tokenizer(content)["input_ids"]
        assert 80 <= len(ids) <= routes.MAX_TOKENS
        assert "".join(routes.pieces(tokenizer, ids)) == content


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", codec="utf-8"), max_size=20))
def test_pieces_add_up_to_the_text(text: str) -> None:
    tokenizer = models.load_tokenizer(models.resolve("tiny-llama").prepare())
    ids = tokenizer(text)["input_ids"]
    found = routes.pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == text


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    tokenizer = models.load_tokenizer(models.resolve("tiny-llama").prepare())
    *firsts, last = routes.pieces(tokenizer, tokenizer("模")["input_ids"])
    assert last == "模" and firsts and not any(firsts)
