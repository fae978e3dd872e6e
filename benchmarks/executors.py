"""Where cells run: in child processes (`process`, the default) or in this one (`inline`, for a debugger)."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace

from benchmarks import launch, record, sharing, store
from benchmarks.job import Job
from benchmarks.progress import Event, Show, Tracker, prefixed
from methods.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    job: Job
    """Which cell."""
    error: str | None
    """Why it failed, in one line; None if it did not."""


def execute(jobs: list[Job], *, executor: str, workers: int, fail_fast: bool, show: Show) -> list[Outcome]:
    """Run every job; with `fail_fast` none is started after the first failure."""
    if not jobs:
        return []
    outcomes = EXECUTORS[executor](jobs, workers, fail_fast, show)
    try:
        return list(Tracker(show).track(outcomes, "cells", len(jobs)))
    finally:
        sharing.remove(jobs)


def _inline(jobs: list[Job], workers: int, fail_fast: bool, show: Show) -> Iterator[Outcome]:
    """One after the other in this process; what a cell prints goes to its log all the same."""
    from benchmarks import cell

    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            error = cell.run(job, Tracker(prefixed(show, job.label)))
        yield Outcome(job, error)
        if error and (fail_fast or launch.processes() > 1):
            return


def _processes(jobs: list[Job], workers: int, fail_fast: bool, show: Show) -> Iterator[Outcome]:
    """`workers` child processes at a time, the processor's cores shared out among them."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    stop = threading.Event()

    def work(job: Job) -> Outcome | None:
        if stop.is_set():
            return None
        outcome = _child(job, threads, show)
        if outcome.error and fail_fast:
            stop.set()
        return outcome

    pool = ThreadPoolExecutor(workers)
    try:
        ends = (future.result() for future in as_completed([pool.submit(work, job) for job in jobs]))
        yield from (outcome for outcome in ends if outcome)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


EXECUTORS: dict[str, Callable[[list[Job], int, bool, Show], Iterator[Outcome]]] = {
    "inline": _inline,
    "process": _processes,
}


def _child(job: Job, threads: str, show: Show) -> Outcome:
    """Run one cell in a process of its own, and write its record where it could not do so itself."""
    try:
        ends, code = _run_child(job, threads, show)
        if ends:
            return Outcome(job, ends[-1])
        error = f"its process ended by {_reason(code)} without a word; see {job.log}"
        _write_failure(job, error)
        return Outcome(job, error)
    except UserError as error:
        return Outcome(job, str(error))
    except OSError as error:
        return Outcome(job, f"{job.folder}: {error.strerror}")


def _write_failure(job: Job, error: str) -> None:
    """The record of a cell whose process is gone; one that is finished, perhaps by another run, stays as it is."""
    with job.locked():
        if not replace(job, force=False).finished():
            store.write_record(job.record, record.assemble(job, error))


def _run_child(job: Job, threads: str, show: Show) -> tuple[list[str | None], int]:
    """What the child said at its end (nothing if it was killed), and its exit status.

    The child's standard output carries events and the outcome, its standard error is the log. Its standard input
    brings the job and then nothing: that ends when this process does, and the child with it. A group of its own keeps
    Ctrl-C on the terminal from it, so that an interrupted cell is not taken for a failed one.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.child"]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    with (
        open(job.log, "ab") as log,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, env=environment, text=True, process_group=0
        ) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):  # a child that is gone already is told by its exit status
            child.stdin.write(job.to_json() + "\n")
            child.stdin.flush()
        ends = list(_relay(child.stdout, prefixed(show, job.label)))
        return ends, child.wait()


def _relay(lines: Iterable[str], show: Show) -> Iterator[str | None]:
    """Show the events among a child's lines, and yield its outcome."""
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:  # the last line of a killed child may be cut short
            return
        if "error" in message:
            yield message["error"]
        else:
            show(Event(**message))


def _reason(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exit status {code}"
    hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
    return signal.Signals(-code).name + hint
