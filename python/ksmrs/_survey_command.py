"""`ksmrs survey -- COMMAND`: starts a program, waits until its memory is worth a look, surveys it and its descendants.

As the program's parent it may look where Yama lets nobody else (`ptrace_scope` 1). When it looks is said (`--after`), asked for
(SIGUSR1), or found out: once the memory of all of them has stopped growing. The program runs on meanwhile and afterwards; its
output and its exit status are its own, and Ctrl-C reaches it as always. Relies on psutil for the tree of processes. Stops and
kills nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from ksmrs._errors import ArgumentError

GLANCE_SECONDS = 0.1
STILL_SECONDS = 2.0
"""Memory that grew by less than `GROWTH` in so long has stopped growing."""
GROWTH = 0.01


def family(pid: int) -> list[int]:
    """A process and its descendants, those that ended apart."""
    try:
        parent = psutil.Process(pid)
        found = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [process.pid for process in found if _resident(process.pid)]


def _resident(pid: int) -> int:
    """Pages in RAM; none in a process that is ending."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0


class Growth:
    """Whether memory still grows, from sizes that come with their time."""

    def __init__(self) -> None:
        self._size, self._since = 0, float("-inf")

    def has_stopped(self, size: int, now: float) -> bool:
        """Take the next size in; true once it has not changed much for `STILL_SECONDS`."""
        if size == 0 or abs(size - self._size) > GROWTH * self._size:
            self._size, self._since = size, now
            return False
        return now - self._since >= STILL_SECONDS


def _exit_status(returncode: int) -> int:
    """As shells give it: 128 more than the number of the signal that ended it."""
    return 128 - returncode if returncode < 0 else returncode


@contextlib.contextmanager
def _signals(look: Callable[[], None]) -> Iterator[None]:
    """SIGUSR1 asks for a look; Ctrl-C and Ctrl-\\ are the program's, which gets them from the terminal itself."""
    before = {
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, lambda *_: look()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGQUIT: signal.signal(signal.SIGQUIT, lambda *_: None),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    command: Sequence[str], after: float | None, look: Callable[[list[int]], None], missed: Callable[[str], None]
) -> int:
    """Run a command, call `look` once with it and its descendants, or `missed` with the reason; the exit status to pass on.

    Raises `ArgumentError` where the command cannot be started.
    """
    asked = False

    def ask() -> None:
        nonlocal asked
        asked = True

    # Handlers rather than SIG_IGN, which the program would inherit.
    with _signals(ask):
        try:
            started = subprocess.Popen(command)
        except OSError as refused:
            raise ArgumentError(f"{command[0]} cannot be started: {refused.strerror}") from refused
        begun = time.monotonic()
        growth = Growth()
        while started.poll() is None:
            now = time.monotonic()
            due = now - begun >= after if after is not None else growth.has_stopped(_size(started.pid), now)
            if due or asked:
                pids = family(started.pid)
                if pids:
                    look(pids)
                    return _exit_status(started.wait())
            time.sleep(GLANCE_SECONDS if after is None else min(GLANCE_SECONDS, max(begun + after - now, 0.001)))
        lived = time.monotonic() - begun
    missed(
        f"the command ended after {lived:.1f} s, before it was looked at (with {_exit_status(started.returncode)}); "
        f"--after SECONDS looks earlier, and kill -USR1 {os.getpid()} would have asked for it"
    )
    return _exit_status(started.returncode)


def _size(pid: int) -> int:
    return sum(_resident(member) for member in family(pid))
