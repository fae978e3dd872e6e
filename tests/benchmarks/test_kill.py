"""A run killed at random moments ends where an uninterrupted one does, bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import selfcheck, store
from tests.benchmarks import small_run


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bits depend on the number of threads, which is the same here and in the child processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_runs_end_like_uninterrupted_ones(workplace: Path) -> None:
    text = f"ppl:{workplace / 'text.txt'}"
    tasks = ("--tasks", text, f"{text}@32")
    assert small_run.run(workplace, *tasks, out="whole") == 0
    arguments = small_run.arguments(workplace, *tasks, "--workers", "2", out="killed", executor="process")
    selfcheck.finish_with_kills(arguments, workplace / "killed", times=2, longest=4.0, seed=0)
    whole, killed = (selfcheck.results(workplace / out) for out in ("whole", "killed"))
    assert len(whole) == 2 and killed == whole
    assert not list((workplace / "killed").rglob("*.tmp")) and not list((workplace / "killed").rglob("scratch"))
    assert all(len(record["metrics"]) == 2 for record in store.records(workplace / "killed"))
