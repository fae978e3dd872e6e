"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere, JSON lines out of a child.

Whoever works calls `Tracker.track`; what becomes of the events is the business of the function the tracker was given:

    with display(sys.stderr) as show:
        for batch in Tracker(show).track(batches, "calibrating", total=128): ...
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """How far one piece of work has come."""

    label: str
    """What is being done; names the bar."""
    done: int
    """Items finished."""
    total: int | None
    """Items altogether; None while not known."""
    finished: bool = False
    """The last event of this label."""


Show = Callable[[Event], None]


@dataclass(frozen=True)
class Tracker:
    """Counts items as they pass; satisfies `methods.base.Progress`."""

    show: Show
    """Receives every event."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield `items`, telling `show` before the first and after each; `total` defaults to their length."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        done = 0
        self.show(Event(label, 0, total))
        try:
            for item in items:
                yield item
                done += 1
                self.show(Event(label, done, total))
        finally:
            self.show(Event(label, done, total, finished=True))


def prefixed(show: Show, prefix: str) -> Show:
    """The same `show`, each label led by `prefix` (which cell it is)."""
    return lambda event: show(replace(event, label=f"{prefix}: {event.label}"))


def throttled(show: Show, seconds: float, clock: Callable[[], float] = time.monotonic) -> Show:
    """Pass on the first and the last event of every label, and between them at most one per `seconds`."""
    shown: dict[str, float] = {}
    lock = threading.Lock()

    def pass_on(event: Event) -> None:
        with lock:
            due = clock() - shown.get(event.label, float("-inf")) >= seconds
            if event.finished:
                shown.pop(event.label, None)
            elif due:
                shown[event.label] = clock()
            if due or event.finished:
                show(event)

    return pass_on


def sender(stream: TextIO) -> Show:
    """Write events as JSON lines to `stream`, at most five a second and label."""

    def send(event: Event) -> None:
        stream.write(json.dumps(asdict(event)) + "\n")
        stream.flush()

    return throttled(send, 0.2)


@contextmanager
def display(stream: TextIO) -> Iterator[Show]:
    """A live bar per label if `stream` is a terminal, else a line at the start, at the end and every ten seconds."""
    if not stream.isatty():
        yield throttled(_lines(stream), 10)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*_columns(), console=Console(file=stream), transient=True) as bars:
        yield _bars(bars)


def _lines(stream: TextIO) -> Show:
    started: dict[str, float] = {}

    def show(event: Event) -> None:
        seconds = time.monotonic() - started.setdefault(event.label, time.monotonic())
        if event.finished:
            del started[event.label]
        stream.write(line(event, seconds) + "\n")
        stream.flush()

    return show


def line(event: Event, seconds: float) -> str:
    """One plain line: count, and once something is done the rate and the time left."""
    count = f"{event.done}/{event.total}" if event.total is not None else f"{event.done}"
    if event.finished:
        return f"{event.label}: {count}, done in {seconds:.0f} s"
    if not event.done or not seconds:
        return f"{event.label}: {count}"
    rate = event.done / seconds
    left = f", {(event.total - event.done) / rate:.0f} s left" if event.total is not None else ""
    return f"{event.label}: {count}, {rate:.3g}/s{left}"


def _columns() -> "tuple[ProgressColumn, ...]":
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.3g}/s" if task.speed else "")

    label = TextColumn("{task.description}", markup=False)
    return label, BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()


def _bars(bars: "Progress") -> Show:
    shown: dict[str, TaskID] = {}

    def show(event: Event) -> None:
        if event.label not in shown:
            shown[event.label] = bars.add_task(event.label, total=event.total)
        bars.update(shown[event.label], completed=event.done, total=event.total)
        if event.finished:
            bars.remove_task(shown.pop(event.label))

    return show
