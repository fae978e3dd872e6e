"""lm-eval tasks on a model in memory: what is refused before any forward pass, what is noted, what is never shared."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api import model as lm_eval_model
from lm_eval.caching import cache
from transformers import PreTrainedModel

from benchmarks import harness, samples
from benchmarks.metric import Evaluation
from benchmarks.models import load_tokenizer
from benchmarks.presets import PRESETS
from benchmarks.tasks import Task
from methods.base import Silent
from methods.errors import UserError
from tests.methods.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Toy = Callable[[str], Task]


def tiny(seed: int = 0) -> PreTrainedModel:
    return tiny_model("llama-gqa", dtype=torch.float32, vocab_size=257, max_position_embeddings=512, seed=seed)


def run(task: Task, inputs: Path, out: Path, model: Any = None, documents: int | None = 3) -> Evaluation:
    settings = replace(PRESETS["smoke"], documents=documents)
    return harness.evaluate(task, model or tiny(), load_tokenizer(inputs / "model"), settings, out, Silent())


def forbidden(*arguments: object, **options: object) -> None:
    raise AssertionError("not to be used")


@pytest.mark.parametrize("asked", ["toy_two@7shot", "toys_mixed@7shot"])
def test_more_solved_examples_than_there_are_is_refused_before_any_forward_pass(
    asked: str, toy: Toy, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "lm_evaluate", forbidden)
    with pytest.raises(UserError, match=rf"7 solved examples .* has 6 to draw from.*{asked[:-6]}@6shot"):
        run(toy(asked), inputs, tmp_path)


def test_all_solved_examples_that_there_are_can_be_asked_for(toy: Toy, inputs: Path, tmp_path: Path) -> None:
    assert run(toy("toy_two@6shot"), inputs, tmp_path).metrics["toy_two/acc@6shot"].n == 3


@pytest.mark.parametrize(("split", "most"), [("test", 5), ("train", 6)])
def test_a_question_is_never_its_own_example(split: str, most: int, toy: Toy, inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "definitions" / "two.yaml"
    file.write_text(file.read_text().replace("fewshot_split: train", f"fewshot_split: {split}"))
    with pytest.raises(UserError, match=f"has {most} to draw from"):
        harness.load(Task(name="t", kind="lm_eval", source="toy_two", shots=most + 1, forced=True))
    assert run(Task(name="t", kind="lm_eval", source="toy_two", shots=most, forced=True), inputs, tmp_path).metrics


@pytest.mark.parametrize(
    ("asked", "documents", "notes"),
    [
        ("toy_zero", 6, ()),
        ("toy_zero", None, ()),
        ("toy_zero", 9, ("toy_zero@0shot: asked for 9 documents, there are 6",)),
        ("toys_same", 9, ("toys_same@2shot: asked for 9 documents, there are 6 in 2 of 2 tasks",)),
    ],
)
def test_a_limit_larger_than_the_data_is_noted(
    asked: str, documents: int | None, notes: tuple[str, ...], toy: Toy, inputs: Path, tmp_path: Path
) -> None:
    found = run(toy(asked), inputs, tmp_path, documents=documents)
    assert found.notes == notes
    assert {metric.n for metric in found.metrics.values()} <= {6, 12}


def test_the_note_of_a_group_has_the_range() -> None:
    note = harness._shortage(Task(name="g@0shot", kind="lm_eval"), [30, 50, 25, 40], 40)
    assert note == ("g@0shot: asked for 40 documents, there are 25 to 30 in 2 of 4 tasks",)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("toy_zero", "greedy"), ("toy_written", "texts"), ("toy_filtered", "texts"), ("toy_rolling", "log_likelihoods")],
)
def test_samples_have_one_line_per_document_with_all_answers(
    name: str, kind: str, toy: Toy, inputs: Path, tmp_path: Path
) -> None:
    found = run(toy(name), inputs, tmp_path)
    kept = samples.read(tmp_path / f"{name}@0shot.jsonl.gz")
    assert [sample["id"] for sample in kept] == [0, 1, 2]
    for sample in kept:
        assert list(sample) == ["id", "hash", "correct", "log_likelihoods", "greedy", "texts"]
        assert len(sample[kind]) == (2 if name == "toy_zero" else 1)
        names = {f"{name}/{metric}@0shot" for metric in sample["correct"]}
        assert names == {metric for metric in found.metrics if "truncated" not in metric}


def test_damaged_samples_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    for content in (b"", b"no gzip", gzip.compress(b'{"id": 0')[:-4], gzip.compress(b'{"id": 0')):
        path.write_bytes(content)
        with pytest.raises(UserError, match="are damaged.*--force"):
            samples.read(path)


def test_samples_with_a_changed_byte_are_damaged_or_the_same(tmp_path: Path) -> None:
    path, kinds = tmp_path / "x.jsonl.gz", set()
    wanted = [{"id": number, "hash": f"{number:x}" * 9} for number in range(20)]
    samples.write(path, wanted)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert samples.read(path) == wanted
        except UserError as error:
            kinds.add("Error -3" in str(error))  # zlib's own
    assert kinds == {True, False}


@pytest.mark.parametrize("line", ["[]", "1", '{"id": 0}', '{"hash": "x"}', '{"id": [], "hash": "x"}'])
def test_lines_that_are_no_samples_are_damage(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(line.encode()))
    with pytest.raises(UserError, match="are damaged: a line has no id or no hash"):
        samples.read(path)


def test_no_answer_of_one_model_is_ever_another_s(
    toy: Toy, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own response cache does not know which model it is of."""
    monkeypatch.setattr(cache, "PATH", str(tmp_path / "cache"))
    monkeypatch.setattr(lm_eval_model.CachingLM, "__init__", forbidden)
    monkeypatch.setattr(cache, "save_to_cache", forbidden)
    tokenizer, answers = load_tokenizer(inputs / "model"), []
    for seed in (0, 1):
        model = tiny(seed)
        run(toy("toy_zero"), inputs, tmp_path / str(seed), model)
        sample = json.loads(
            gzip.decompress((tmp_path / str(seed) / "toy_zero@0shot.jsonl.gz").read_bytes().strip()).splitlines()[0]
        )
        ids = tokenizer("Is it so? yes", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        alone = log_probs.gather(1, ids[0, 1:, None])[-4:].sum()
        assert sample["log_likelihoods"][0] == pytest.approx(float(alone), rel=1e-5)
        answers.append(sample["log_likelihoods"])
    assert answers[0] != answers[1]
    assert not (tmp_path / "cache").exists() and not list(tmp_path.rglob("*.db"))
