"""What the parent does with a cell's process, shown with stand-ins for it, and the inline executor's contract."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import executors, plan, record, store
from benchmarks.executors import Outcome, execute
from benchmarks.job import Job
from benchmarks.progress import Event
from tests.benchmarks.test_plan import request


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Three cells of a model that no stand-in ever loads."""
    return plan.jobs(request("--ratios", "0.5", "--methods", "shortgpt", "slicegpt", "--out", str(tmp_path)))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let a shell script play the cell's process; `$job` is what it is to do."""

    def install(script: str) -> None:
        path = tmp_path / "stand-in"
        path.write_text(f"#!/bin/sh\nread -r job\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


def run(jobs: list[Job], *, workers: int = 1, fail_fast: bool = False, events: list[Event] | None = None):
    """Outcomes by method."""
    show = (events if events is not None else []).append
    outcomes = execute(jobs, executor="process", workers=workers, fail_fast=fail_fast, show=show)
    return {outcome.job.cell.method: outcome.error for outcome in outcomes}


def test_outcomes_events_and_the_log(jobs: list[Job], stand_in) -> None:
    event = json.dumps({"label": "work", "done": 1, "total": 2, "finished": False})
    stand_in(f"""echo '{event}'; echo "to the log" >&2; echo '{{"error": null}}'""")
    events: list[Event] = []
    assert run(jobs, workers=3, events=events) == {"dense": None, "shortgpt": None, "slicegpt": None}
    assert Event("llama2-7b dense 1 seed 0: work", 1, 2) in events
    assert events[-1] == Event("cells", 3, 3, finished=True)
    assert jobs[0].log.read_text() == "to the log\n"
    assert not jobs[0].scratch.exists()  # the child's alone: another run's child removes it once it is done


def test_a_killed_cell_gets_a_failed_record_and_the_others_go_on(jobs: list[Job], stand_in) -> None:
    stand_in("""case "$job" in *'"method": "shortgpt"'*) kill -9 $$; esac\necho '{"error": null}'""")
    outcomes = run(jobs)
    assert outcomes["dense"] is None and outcomes["slicegpt"] is None
    assert "SIGKILL (often: out of memory)" in str(outcomes["shortgpt"])
    found = store.read_record(jobs[1].record)
    assert found and found["status"] == "failed" and found["error"] == outcomes["shortgpt"]
    assert not jobs[1].finished()


@pytest.mark.parametrize("force", [False, True])
def test_a_killed_cell_never_replaces_a_finished_record(force: bool, jobs: list[Job], stand_in) -> None:
    done = record.assemble(jobs[0], None)
    done["provenance"]["task_versions"] = {task.name: "1" for task in jobs[0].missing()}
    store.write_record(jobs[0].record, done)
    before = jobs[0].record.read_bytes()
    stand_in("kill -9 $$")
    assert "SIGKILL" in str(run([replace(jobs[0], force=force)])["dense"])
    assert jobs[0].record.read_bytes() == before


def test_fail_fast_starts_no_other_cell(jobs: list[Job], stand_in) -> None:
    stand_in("""echo '{"error": "broken"}'; exit 1""")
    assert run(jobs, fail_fast=True) == {"dense": "broken"}
    assert set(run(jobs).values()) == {"broken"}


def test_threads_are_shared_out(jobs: list[Job], stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("""echo "{\\"error\\": \\"$OMP_NUM_THREADS\\"}" """)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert set(run(jobs, workers=2).values()) == {"5"}
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert set(run(jobs, workers=2).values()) == {"4"}


def test_a_folder_that_cannot_be_written_fails_its_cell_only(jobs: list[Job], stand_in) -> None:
    stand_in("""echo '{"error": null}'""")
    jobs[1].folder.parent.parent.parent.mkdir(parents=True, exist_ok=True)
    jobs[1].folder.parent.parent.write_text("a file where a folder should be")
    outcomes = run(jobs)
    assert outcomes["dense"] is None and "Not a directory" in str(outcomes["shortgpt"])


def test_no_cells_no_progress() -> None:
    events: list[Event] = []
    assert run([], events=events) == {} and events == []


def test_exit_statuses_in_words() -> None:
    assert executors._reason(3) == "exit status 3"
    assert executors._reason(-11) == "SIGSEGV"


def test_relay_tells_events_from_the_end() -> None:
    lines = io.StringIO('{"label": "x", "done": 0, "total": null, "finished": false}\n{"error": "e"}\n')
    events: list[Event] = []
    assert list(executors._relay(lines, events.append)) == ["e"] and events == [Event("x", 0, None)]
    assert list(executors._relay(['{"label": "x", "do'], events.append)) == []


def test_inline_stops_early_too(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import cell

    monkeypatch.setattr(cell, "run", lambda job, progress: print("said") or "broken")
    outcomes = execute(jobs, executor="inline", workers=1, fail_fast=True, show=lambda event: None)
    assert outcomes == [Outcome(jobs[0], "broken")] and jobs[0].log.read_text() == "said\n"
