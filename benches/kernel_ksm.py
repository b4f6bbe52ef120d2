"""Kernel Samepage Merging, the rival of the benches and the oracle of the tests: its knobs, its counters, its CPU time.

Relies on root and /sys/kernel/mm/ksm, and on nobody else's memory being registered there. Every knob is put back,
whatever happens: while any is turned, a process stands by that does it should this one be killed (this file run as a program).
A lock on /sys/kernel/mm/ksm/run, which that process shares, keeps others of its kind from taking turned knobs for the
machine's. No scenario of its own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PAGE = 4096
KSM = Path("/sys/kernel/mm/ksm")
KNOBS = (
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
    "pages_to_scan",
    "sleep_millisecs",
    "smart_scan",
    "use_zero_pages",
    "max_page_sharing",
    "merge_across_nodes",
    "stable_node_chains_prune_millisecs",
    "advisor_mode",
    "run",
)
"""All that can be turned, in the order in which it can be: pages_to_scan is the advisor's once that is on."""
SECONDS_TO_LET_GO = 10
"""How long a process that has just ended may still map what was merged."""
SECONDS_TO_WAIT = 600
"""How long somebody else may use kernel KSM before this program gives up."""
MADV_MERGEABLE = 12
READY, DONE = b"ready\n", b"done\n"
"""What a guard says, and what it is told."""
WITHOUT = "KSMRS_BENCH_WITHOUT_KERNEL"
"""Set in the environment of a bench that is to leave kernel KSM alone."""


def opt_in(array: np.ndarray[Any, Any]) -> None:
    """Give the whole pages of an array to the kernel's KSM."""
    advise(array, MADV_MERGEABLE)


def advise(array: np.ndarray[Any, Any], advice: int) -> None:
    """Give the kernel advice about the whole pages of an array."""
    first = -(-array.ctypes.data // PAGE) * PAGE
    end = (array.ctypes.data + array.nbytes) // PAGE * PAGE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice):
        raise OSError(ctypes.get_errno(), f"madvise(..., {advice})")


def unavailable() -> str | None:
    """Why the kernel's KSM cannot be had for oneself here, or None."""
    if os.environ.get(WITHOUT):
        return f"{WITHOUT} says to leave it alone"
    if not KSM.is_dir():
        return "this kernel has no /sys/kernel/mm/ksm"
    if os.geteuid() != 0 or not os.access(KSM / "run", os.W_OK):
        return "turning kernel KSM on needs root"
    others = registered()
    if others:
        return f"somebody else's pages are registered with kernel KSM: processes {others}"
    return None


def registered() -> list[int]:
    """The processes with memory that is advised MADV_MERGEABLE. The counters do not tell: they are 0 until somebody scans."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            smaps = (folder / "smaps").read_bytes()
        except OSError:
            continue
        if any(b" mg" in line for line in smaps.splitlines() if line.startswith(b"VmFlags:")):
            found.append(int(folder.name))
    return sorted(found)


def counter(name: str) -> int:
    """Read one counter."""
    return int((KSM / name).read_text())


def ksmd_seconds() -> float:
    """CPU time of ksmd, to the nanosecond."""
    for task in Path("/proc").glob("[0-9]*/comm"):
        try:
            if task.read_text().strip() == "ksmd":
                return int((task.parent / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue
    raise RuntimeError("no ksmd, though there is /sys/kernel/mm/ksm")


def knob(name: str) -> str:
    """The value of a knob; of one that lists its choices, the one in brackets."""
    text = (KSM / name).read_text()
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()


def turn(name: str, value: int | str) -> None:
    """Turn one knob; the kernel's refusal is an OSError, which names the knob."""
    try:
        (KSM / name).write_text(str(value))
    except OSError as refusal:
        raise OSError(refusal.errno, f"{refusal.strerror}: {name}={value}", str(KSM / name)) from None


def _turn_when_free(name: str, value: int | str) -> None:
    """Turn a knob that is refused while a frame is mapped, as one is until the kernel is done with a process that ended."""
    until = time.monotonic() + SECONDS_TO_LET_GO
    while True:
        try:
            return turn(name, value)
        except OSError as refusal:
            if refusal.errno != errno.EBUSY or time.monotonic() > until:
                raise
        time.sleep(0.005)


def _turn_all(values: Mapping[str, int | str]) -> None:
    """Turn knobs, each one even if another is refused: what is merged is unmerged first, and the advisor told to wait."""
    turns: list[tuple[str, int | str]] = [
        ("run", 2),
        ("advisor_mode", "none"),
        *((name, values[name]) for name in KNOBS if name in values),
    ]
    with ExitStack() as last_first:
        for name, value in reversed(turns):
            if (KSM / name).exists():
                last_first.callback(_turn_when_free, name, value)


def _lock() -> int:
    """A descriptor that holds kernel KSM for this process and those it gives the descriptor to."""
    lock = os.open(KSM / "run", os.O_RDONLY | os.O_CLOEXEC)
    until = time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(lock)
                why = f"another program measures with kernel KSM, still after {SECONDS_TO_WAIT} s; `lslocks` names it"
                raise OSError(errno.EBUSY, why, str(KSM / "run")) from None
            time.sleep(0.02)
        else:
            return lock


class _Guard:
    """A process in a session of its own that puts the knobs back when this process dies before it did so itself."""

    def __init__(self, before: Mapping[str, str], lock: int) -> None:
        died = os.pidfd_open(os.getpid())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__, json.dumps(before), str(died)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(died, lock),
                start_new_session=True,
            )
        finally:
            os.close(died)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != READY:
            raise RuntimeError("nobody stands by to put kernel KSM's knobs back: nothing was turned")

    def dismiss(self) -> None:
        self._process.communicate(DONE)


def _stand_by(before: Mapping[str, str], died: int) -> None:
    """What the guard does; SIGKILL alone ends it sooner."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.write(1, READY)
    said, ended = select.poll(), select.poll()
    said.register(0, select.POLLIN)
    ended.register(died, select.POLLIN)
    either = select.poll()
    either.register(0, select.POLLIN)
    either.register(died, select.POLLIN)
    either.poll()
    # Asked first, not read: a child of the dead process may hold the other end of the pipe open.
    if said.poll(0) and os.read(0, len(DONE)) == DONE:
        return
    ended.poll()
    _turn_all(before)


@contextmanager
def turned(wanted: Mapping[str, int | str]) -> Iterator[None]:
    """With these knobs, and afterwards with all of them as they were, whatever was turned meanwhile.

    What is merged is unmerged before and after. Knobs that this kernel does not have are left out. One at a time on a
    machine: a second one waits, also within this process.
    """
    lock = _lock()
    try:
        before = knobs()
        guard = _Guard(before, lock)
        try:
            _turn_all({**before, **wanted})
            yield
        finally:
            # Should this fail or be interrupted, the guard, which holds the lock too, tries again when this process ends.
            _turn_all(before)
            guard.dismiss()
            # Children that were forked meanwhile may hold the descriptor longer.
            fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def knobs() -> dict[str, str]:
    """All knobs that this kernel has; none where it has no KSM."""
    return {name: knob(name) for name in KNOBS if (KSM / name).exists()}


def tuned_to_the_maximum() -> AbstractContextManager[None]:
    """KSM at its fastest."""
    return turned(
        {
            "advisor_mode": "none",
            "smart_scan": 0,
            "sleep_millisecs": 0,
            "pages_to_scan": 100_000,
            "use_zero_pages": 0,
            "run": 1,
        }
    )


if __name__ == "__main__":
    _stand_by(json.loads(sys.argv[1]), int(sys.argv[2]))
