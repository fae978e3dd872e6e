"""The recipe: its schedule, its rate, what can be set of it, and what is said without the package it needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from methods import recovery
from methods.errors import UserError
from methods.recovery import Recovery, configure, settings


def test_the_rate_rises_and_falls() -> None:
    recipe = Recovery(warmup=0.4)
    assert [recipe.share(step, 10) for step in range(10)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    )
    assert [Recovery(warmup=0).share(step, 4) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [Recovery(warmup=1).share(step, 2) for step in range(2)] == pytest.approx([0.5, 1])
    assert Recovery().share(0, 1) == 1


def test_the_highest_rate_is_the_published_one_at_its_width() -> None:
    assert Recovery().highest_rate(4096) == pytest.approx(1e-4)
    assert Recovery().highest_rate(192) == pytest.approx(1e-4 * 4096 / 192)
    assert Recovery().highest_rate(8) == 0.01
    assert Recovery(learning_rate=3e-4).highest_rate(8) == 3e-4


def test_fields_are_set_from_text() -> None:
    assert configure("lora", {"rank": "4", "merge": "false", "steps": "none"}) == Recovery(rank=4, merge=False)
    sliced = configure("lora", {"preset": "slicegpt", "rank": "16"})
    assert (sliced.rank, sliced.alpha, sliced.dropout, sliced.learning_rate) == (16, 10.0, 0.05, 2e-4)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"rnak": "4"}, "Did you mean rank"),
        ({"rank": "0"}, r"lora.rank is 0, which is not between 1 and 4096. Use --set lora.rank=VALUE"),
        ({"dropout": "1"}, "lora.dropout is 1"),
        ({"alpha": "nan"}, "lora.alpha is nan"),
        ({"rank": "many"}, "--set lora.rank=many"),
        ({"preset": "paper"}, "preset of lora.*slicegpt"),
    ],
)
def test_what_cannot_be_set(given: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        configure("lora", given)


def test_the_record_says_it_all() -> None:
    recipe = Recovery(rank=4, learning_rate=1e-3, merge=False)
    assert recipe.record()["kind"] in recovery.KINDS and recipe.record()["rank"] == 4
    assert Recovery.from_record(recipe.record()) == recipe


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: "here")
    recovery.require_package()
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package peft.*pip install '\.\[finetune\]'"):
        recovery.require_package()


def test_nothing_else_imports_the_package() -> None:
    code = "import sys, methods, benchmarks.cell, benchmarks.recovered; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
