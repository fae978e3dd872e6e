"""A run killed at random moments ends where an uninterrupted one does, bit for bit."""

from pathlib import Path

from benchmarks import store
from tests.benchmarks import killing, small_run


def test_killed_runs_end_like_uninterrupted_ones(workplace: Path) -> None:
    text = f"ppl:{workplace / 'text.txt'}"
    tasks = ("--tasks", text, f"{text}@64", f"{text}@32", "speed")
    killing.finish(small_run.arguments(workplace, *tasks, out="whole", executor="inline"))
    arguments = small_run.arguments(workplace, *tasks, "--workers", "2", out="killed", executor="process")
    killing.finish_with_kills(arguments, kills=3, longest=1.0, seed=0)
    whole, killed = (killing.results(workplace / out) for out in ("whole", "killed"))
    assert len(whole) == 2 and killed == whole
    assert not list((workplace / "killed").rglob("*.tmp")) and not list((workplace / "killed").rglob("scratch"))
    assert all(len(record["metrics"]) > 3 for record in store.records(workplace / "killed"))
