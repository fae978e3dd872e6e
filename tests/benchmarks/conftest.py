"""Fixtures of the tests of runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import tasks
from benchmarks.tasks import Task
from tests.benchmarks import small_run, toys


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny `model` and a `text.txt`; not to be written to."""
    folder = tmp_path_factory.mktemp("inputs")
    small_run.make_model(folder / "model")
    small_run.make_text(folder / "text.txt")
    return folder


@pytest.fixture
def workplace(inputs: Path, tmp_path: Path) -> Path:
    """A copy of `inputs` of one's own."""
    return shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Task]:
    """The tasks of `toys` by name, in place of this repository's own."""
    monkeypatch.setattr(tasks, "OWN_TASKS", toys.write(tmp_path / "definitions"))
    return tasks.lm_task
