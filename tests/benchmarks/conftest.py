"""Fixtures of the tests of runs."""

import shutil
from pathlib import Path

import pytest

from tests.benchmarks import small_run


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
