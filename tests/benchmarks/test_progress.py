"""Events, and the three ways to show them."""

import io
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.progress import Event, Tracker, display, line, prefixed, sender, throttled


def track(items: object, total: int | None = None) -> list[Event]:
    """The events of passing `items` through a tracker."""
    events: list[Event] = []
    assert list(Tracker(events.append).track(items, "work", total)) == [0, 1]  # type: ignore[arg-type]
    return events


def test_items_are_counted_and_their_length_found() -> None:
    seen = [(event.done, event.total, event.finished) for event in track(range(2))]
    assert seen == [(0, 2, False), (1, 2, False), (2, 2, False), (2, 2, True)]
    assert {event.total for event in track(iter(range(2)))} == {None}
    assert {event.total for event in track(iter(range(2)), total=2)} == {2}


def test_work_that_breaks_off_is_finished_too() -> None:
    events: list[Event] = []
    with pytest.raises(RuntimeError):
        for _ in Tracker(events.append).track(range(9), "work"):
            raise RuntimeError
    assert events[-1] == Event("work", 0, 9, finished=True)


@given(st.lists(st.floats(0, 30), min_size=1, max_size=20))
def test_throttling_keeps_first_and_last_and_a_distance(gaps: list[float]) -> None:
    now, shown = [0.0], []
    show = throttled(lambda event: shown.append((now[0], event)), 10, clock=lambda: now[0])
    for done, gap in enumerate(gaps):
        show(Event("work", done, None))
        now[0] += gap
    show(Event("work", len(gaps), None, finished=True))
    times = [time for time, _ in shown[:-1]]
    assert times[0] == 0 and shown[-1][1].finished
    assert all(later - earlier >= 10 for earlier, later in pairwise(times))


def test_labels_are_throttled_apart() -> None:
    shown: list[Event] = []
    show = throttled(shown.append, 10, clock=lambda: 0.0)
    for label in ("a", "b", "a"):
        show(Event(label, 0, None))
    assert [event.label for event in shown] == ["a", "b"]


def test_lines_say_rate_and_time_left() -> None:
    assert line(Event("work", 0, 10), 0.0) == "work: 0/10"
    assert line(Event("work", 4, 10), 2.0) == "work: 4/10, 2/s, 3 s left"
    assert line(Event("work", 4, None), 2.0) == "work: 4, 2/s"
    assert line(Event("work", 10, 10, finished=True), 5.0) == "work: 10/10, done in 5 s"


def test_without_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    with display(stream) as show:
        list(Tracker(prefixed(show, "cell")).track(range(100), "work"))
    assert stream.getvalue().splitlines() == ["cell: work: 0/100", "cell: work: 100/100, done in 0 s"]


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with display(stream) as show:
        for _ in Tracker(show).track(range(3), "odd [label]"):
            pass
        show(Event("other", 1, 2))
    assert "other" in stream.getvalue() and "1/2" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")  # the bars are wiped, the cursor is back


def test_events_travel_as_json_lines() -> None:
    stream = io.StringIO()
    list(Tracker(sender(stream)).track(range(2), "wörk\n"))
    sent = [Event(**json.loads(text)) for text in stream.getvalue().splitlines()]
    assert sent == [Event("wörk\n", 0, 2), Event("wörk\n", 2, 2, finished=True)]
