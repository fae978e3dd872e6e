"""What a record says of where its numbers come from."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import record


def git(root: Path, *arguments: str) -> None:
    """Run git in a repository of the test's own."""
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)


def dirty(root: Path, *written: str | None) -> bool | None:
    """Asked afresh."""
    return record.git_state.__wrapped__(root, written)[1]


def test_results_do_not_make_the_code_dirty(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "m")
    commit, state = record.git_state.__wrapped__(tmp_path, ())
    assert commit and len(commit) == 40 and state is False
    for folder in ("results", "runs [1]"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "record.json").write_text("{}")
    assert dirty(tmp_path) is True
    assert dirty(tmp_path, str(tmp_path / "runs [1]"), None) is False
    (tmp_path / "code.py").write_text("2")
    assert dirty(tmp_path, str(tmp_path / "runs [1]"), str(tmp_path)) is True


def test_without_a_repository_nothing_is_known(tmp_path: Path) -> None:
    assert record.git_state(tmp_path, ()) == (None, None)


def test_one_gpu_is_named_as_the_driver_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_output", lambda command: command[command.index("-i") + 1])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert record.device.__wrapped__("cuda:1") == "cuda:1: 1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-x")
    assert record.device.__wrapped__("cuda:1") == "cuda:1: GPU-x" and record.device.__wrapped__("cuda") == "cuda: 4"
