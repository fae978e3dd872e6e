"""The folders in which cells leave each other what all ratios need, and their end. Needs no torch."""

import fcntl
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from benchmarks.job import Job


@contextmanager
def used(job: Job) -> Iterator[None]:
    """While open, no run removes the folder that this cell shares."""
    with _opened(job) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def remove(jobs: Iterable[Job]) -> None:
    """Remove the folders of some cells, but for those that cells of another run use."""
    for job in {job.shared: job for job in jobs}.values():
        if job.shared.exists():
            with _opened(job) as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(job.shared)
    for root in {job.shared.parent for job in jobs}:
        with suppress(OSError):  # not there, or still in use
            root.rmdir()


def _opened(job: Job) -> IO[bytes]:
    path = Path(job.out, ".locks", f"shared-{job.shared.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "wb")
