"""What one cell measured serves the next: the same result, without measuring again, and never for other settings."""

import dataclasses
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import methods
from methods import modeling
from methods.base import Budget, Context, Method
from methods.sharing import alone, read_or, remembered, shared_folder, write_whole
from tests.methods.tiny import RandomCalibration, logits, tiny_model

CALIBRATION = RandomCalibration(samples=16, window=24)
SHARING: dict[str, dict[str, str]] = {
    "shortgpt": {},
    "shortgpt angular": {"metric": "angular"},
    "sleb": {},
    "sleb once": {"rescore": "false"},
    "llm-pruner": {"tokens": "12", "protect_first": "0", "protect_last": "0"},
    "llm-pruner in steps": {"tokens": "12", "iterative_steps": "2", "protect_first": "0", "protect_last": "0"},
    "llm-pruner channel": {"tokens": "12", "mode": "channel"},
    "modegpt": {},
    "moefication": {"experts": "E6", "epochs": "2"},
    "g-moefication": {"epochs": "2"},
    "g-moefication coactivation": {"router": "similarity", "split": "coactivation"},
    "llama-moe": {"split": "gradient"},
    "pruner-zero": {"pattern": "unstructured"},
}
RATIOS = (0.8, 0.6)


def method(case: str) -> Method:
    """The configured method of a case."""
    return methods.configure(case.partition(" ")[0], SHARING[case])


def compressed(case: str, ratio: float, scratch: Path, shared: Path | None) -> tuple[Any, Context]:
    """A compressed tiny model, and the context it was made in."""
    budget = Budget(ratio=ratio, basis="block", tolerance=0.2)
    context = Context(scratch=scratch, shared=shared)
    return method(case).compress(tiny_model("llama-gqa"), None, budget, CALIBRATION, context), context  # type: ignore[arg-type]


@pytest.mark.parametrize("case", SHARING)
def test_a_second_ratio_is_what_it_would_be_alone(case: str, tmp_path: Path) -> None:
    for number, ratio in enumerate(RATIOS):
        alone, _ = compressed(case, ratio, tmp_path / f"alone {ratio}", None)
        shared, context = compressed(case, ratio, tmp_path / f"cell {ratio}", tmp_path / "shared")
        assert logits(shared).equal(logits(alone))
        assert any("taken over" in note for note in context.notes) == (number > 0)


@pytest.mark.parametrize("case", [case for case in SHARING if "steps" not in case])
def test_a_second_ratio_runs_no_text_through_the_model(case: str, tmp_path: Path) -> None:
    """All but SLEB with re-scoring, which goes on where the larger model ended."""
    compressed(case, RATIOS[0], tmp_path / "cell", tmp_path / "shared")
    model = tiny_model("llama-gqa")
    budget = Budget(ratio=0.8 if case == "sleb" else RATIOS[1], basis="block", tolerance=0.2)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    model.register_forward_pre_hook(refuse)
    for layer in modeling.Decoder(model).layers:
        layer.module.register_forward_pre_hook(refuse)
    context = Context(scratch=tmp_path / "second", shared=tmp_path / "shared")
    with patch.object(CALIBRATION.__class__, "batches", lambda self, size: iter(())):
        method(case).compress(model, None, budget, CALIBRATION, context)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        {"calibration": dataclasses.replace(CALIBRATION, sha256="1" * 64)},
        {"calibration": dataclasses.replace(CALIBRATION, samples=8)},
        {"calibration": dataclasses.replace(CALIBRATION, window=8)},
        {"seed": 1},
        {"batch_size": 3},
        {"settings": {"metric": "other"}},
        {"name": "other"},
    ],
)
def test_what_would_differ_is_measured_again(other: dict[str, Any], tmp_path: Path) -> None:
    def result(value: int, name: str = "scores", **given: Any) -> Any:
        calibration, settings = given.pop("calibration", CALIBRATION), given.pop("settings", {"metric": "this"})
        context = Context(scratch=tmp_path / "cell", shared=tmp_path / "shared", **given)
        return remembered(context, calibration, name, lambda: value, **settings)

    assert [result(1), result(2), result(3, **other), result(4, **other)] == [1, 1, 3, 3]


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    numbers = [0.1 + 0.2, 1e-300, 3.0, -(2**53) - 1]
    context = Context(scratch=tmp_path, shared=tmp_path)
    for given in (numbers, None):
        assert remembered(context, CALIBRATION, "numbers", lambda given=given: given) == numbers


def test_without_a_place_nothing_is_shared(tmp_path: Path) -> None:
    """The next model may be another one."""
    context = Context(scratch=tmp_path)
    assert [remembered(context, CALIBRATION, "number", lambda n=n: n) for n in (1, 2)] == [1, 2]
    assert not [*tmp_path.iterdir()]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """The second one waits for the first, and takes what that one has made."""
    context, begun, made = Context(scratch=tmp_path, shared=tmp_path), threading.Event(), []

    def slow() -> str:
        begun.set()
        made.append(1)
        return "first"

    with shared_folder(context, CALIBRATION, "result") as folder, alone(folder):
        other = threading.Thread(target=lambda: remembered(context, CALIBRATION, "result", slow))
        other.start()
        assert not begun.wait(0.2)
        write_whole(folder / "result.json", "earlier")
    other.join()
    assert not made and remembered(context, CALIBRATION, "result", slow) == "earlier"


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(TypeError):
        write_whole(path, object())
    assert read_or(path, "none") == "none"


def test_a_note_is_told_once(tmp_path: Path) -> None:
    context = Context(scratch=tmp_path)
    context.note("so")
    context.note("so")
    assert context.notes == ["so"]
