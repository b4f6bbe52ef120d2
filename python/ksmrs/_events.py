"""What happened to pages, as events: how far each counter rose between two looks.

Relies on the counters of this process and of its domain, which only rise; it adds none of its own, so nothing is counted that
`process_stats()` and `stats()` would not show, and nothing gets lost between two looks however far apart they are. Never starts
a broker, and runs no thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from ksmrs._engine import process_stats, stats
from ksmrs._errors import ArgumentError, KsmrsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

Kind = Literal["merged", "broken", "skipped", "refused"]

PROCESS: dict[str, Kind] = {"merges": "merged", "breaks": "broken"}
"""Counters of `ProcessStats`, and what it is that they count."""
DOMAIN: dict[str, Kind] = {
    "merges": "merged",
    "cow_ksm": "broken",
    "pages_skipped": "skipped",
    "pages_unmerged_by_budget": "refused",
    "pages_unmerged_in_huge_pages": "refused",
    "pages_disbelieved": "refused",
}
"""Counters of `Stats` likewise: of all processes of the domain, this one among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to `count` pages between two looks."""

    kind: Kind
    """`merged`; `broken`: written and given memory of their own again; `skipped` by smart scan; `refused`: left unmerged."""
    whose: Literal["process", "domain"]
    """Whose pages. What happens in this process is counted in its domain once more."""
    counter: str
    """The counter that rose, or `not_merging`."""
    count: int
    """How far; with `not_merging` 1, for memory and not for pages."""
    seconds: float
    """Between the two looks."""
    reason: str = ""
    """With `not_merging` why, as `process_stats().not_merging` says it."""


class Events:
    """The events of this process and its domain, in an endless iteration; see `ksmrs.events`."""

    def __init__(self, interval: float) -> None:
        if not (math.isfinite(interval) and interval > 0):
            raise ArgumentError(f"interval {interval}: must be a number of seconds, more than 0")
        self._interval = interval
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._pending: deque[Event] = deque()
        self._seen_at = time.monotonic()
        self._process: Mapping[str, int] = dict.fromkeys(PROCESS, 0)
        self._domain: Mapping[str, int] = dict.fromkeys(DOMAIN, 0)
        self._reasons: frozenset[str] = frozenset()
        self._look()
        self._pending.clear()

    def close(self) -> None:
        """Look for the last time. Who iterates gets what is left, then the end; also from another thread."""
        with self._lock:
            if not self._closed.is_set():
                self._look()
                self._closed.set()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """Wait for the next event."""
        while True:
            with self._lock:
                if self._pending:
                    return self._pending.popleft()
                if self._closed.is_set():
                    raise StopIteration
            if not self._closed.wait(self._interval):
                with self._lock:
                    if not self._closed.is_set():
                        self._look()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look(self) -> None:
        now = time.monotonic()
        seconds, self._seen_at = now - self._seen_at, now
        try:
            own, everyones = process_stats(), stats()
        except KsmrsError:
            # No answer from a broker that is ending: the next look counts from the last one on.
            return
        process = {name: getattr(own, name) for name in PROCESS}
        domain = {name: getattr(everyones, name) for name in DOMAIN}
        self._pending.extend(
            Event(kind=PROCESS[name], whose="process", counter=name, count=count, seconds=seconds)
            for name, count in rises(self._process, process).items()
        )
        self._pending.extend(
            Event(kind="refused", whose="process", counter="not_merging", count=1, seconds=seconds, reason=reason)
            for reason in own.not_merging
            if reason not in self._reasons
        )
        self._pending.extend(
            Event(kind=DOMAIN[name], whose="domain", counter=name, count=count, seconds=seconds)
            for name, count in rises(self._domain, domain).items()
        )
        self._process, self._domain, self._reasons = process, domain, frozenset(own.not_merging)


def rises(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """How far each counter rose, without those that did not; if one fell, another broker counts, which began at 0."""
    anew = any(after[name] < before[name] for name in after)
    risen = {name: count if anew else count - before[name] for name, count in after.items()}
    return {name: count for name, count in risen.items() if count}


def events(interval: float = 1.0) -> Events:
    """Iterate over what happens to pages of this process and its domain from now on, looking every `interval` seconds.

        with ksmrs.events() as seen:
            work()
        for event in seen:  # what happened within the block, summed up
            print(event.whose, event.kind, event.count)

    Without a `with`, or within it, the iteration waits for events until `close` is called. Each event is the rise of one
    counter between two looks, so the counts of many events add up to what the counter rose, but their order between two looks
    is not known. A write to a private region is an event once a scan found it. What a broker had counted after the last look
    is lost with it if it dies. Raises `ArgumentError` for an interval that is no time.
    """
    return Events(interval)
