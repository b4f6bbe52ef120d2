"""The freeze as system calls meet it: how long it lasts, how often it is met, what a reader that is not pinned loses.

    python benches/freeze_window.py [--seconds 5] [--mb 1] [--rounds 300] [--json]

While a run of pages is compared with frames the kernel refuses to write into it. First, how long: one byte is read into the
middle of a run again and again while that run merges; what is timed is the time from the first EFAULT to the next success, and
the slowest call of all, since a call may also wait within the kernel for a remapping. Then, how often: a file, a TCP
connection and datagrams are read into an array that merges: not at all, in the background by the default knobs, without
pause, and without pause but pinned. All that is read is what a twin holds already, so that every page that was read merges
again: the worst that can be. Each call that fails is repeated at once; datagrams are sent again. Every byte is verified. As
much memory as will be used is touched and freed first. On two processors a freeze may last as long as the scheduler lets the
others run.
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import ksmrs
from merge_equal import warm
from write_wait import percentiles

PAGE = 4096
MIB = 1 << 20
EXTENT = 2 * MIB
PIECE = 8 * PAGE
"""What one call asks for; a datagram holds that much."""
RUNS = (16, 64, 512)
"""Pages; the last is the longest run there is."""
MODES = ("at rest", "background", "without pause", "pinned")
PATIENCE_SECONDS = 10


def small_pages(content: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A private array of these bytes, opted in, at the start of an extent and of small pages."""
    memory = mmap.mmap(-1, content.nbytes + EXTENT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    array = whole[-whole.ctypes.data % EXTENT :][: content.nbytes]
    array[:] = content
    ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    return array


class Twins:
    """Two private arrays of equal bytes, each at the start of an extent, so that a run of 512 pages stays one."""

    def __init__(self, nbytes: int) -> None:
        self.content = np.random.default_rng(7).integers(1, 256, nbytes, np.uint8)
        self.ours, self._twin = (small_pages(self.content) for _ in range(2))
        ksmrs.merge()
        if ksmrs.process_stats().ksm_merging_pages < 2 * nbytes // PAGE:
            raise SystemExit(f"not everything merged: {ksmrs.process_stats()}")

    def check(self) -> None:
        if not all((array == self.content).all() for array in (self.ours, self._twin)):
            raise SystemExit("a byte is wrong: this benchmark has no figures")


def probe(view: memoryview, file: int, at: int, merged: threading.Event) -> tuple[int, int]:
    """Nanoseconds from the first EFAULT to the next success (0: none was met), and those of the slowest call."""
    clock, read, views = time.perf_counter_ns, os.preadv, [view]
    closed = slowest = 0
    while True:
        over = merged.is_set()
        began = clock()
        try:
            read(file, views, at)
        except OSError as refused:
            if refused.errno != errno.EFAULT:
                raise
            closed = closed or began
            slowest = max(slowest, clock() - began)
            continue
        ended = clock()
        slowest = max(slowest, ended - began)
        if closed:
            return ended - closed, slowest
        if over:
            return 0, slowest


def at_rest(view: memoryview, file: int, at: int, seconds: float = 1) -> dict[str, float]:
    """The same calls while nothing merges, to tell what the scheduler does."""
    took = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter_ns()
        os.preadv(file, [view], at)
        took.append(time.perf_counter_ns() - began)
    return percentiles(took)


def windows(pages: int, rounds: int) -> dict[str, Any]:
    """How long freezes of runs of so many pages last, from outside."""
    twins = Twins(pages * PAGE)
    file = os.memfd_create("content")
    os.write(file, twins.content.tobytes())
    at = pages // 2 * PAGE
    view = memoryview(twins.ours)[at : at + 1]
    ksmrs.tunables.run = 0
    rest = at_rest(view, file, at)
    ksmrs.tunables.run = 1
    took: list[int] = []
    calls: list[int] = []
    for _ in range(rounds):
        merges = ksmrs.process_stats().merges
        twins.ours[:] = twins.content  # private again, and equal again: the whole run merges
        merged = threading.Event()

        def merge(merged: threading.Event = merged) -> None:
            ksmrs.merge(PATIENCE_SECONDS)
            merged.set()

        thread = threading.Thread(target=merge)
        thread.start()
        window, slowest = probe(view, file, at, merged)
        thread.join()
        if ksmrs.process_stats().merges - merges < pages // 2:
            raise SystemExit(f"a run did not merge: {ksmrs.stats()}")
        calls.append(slowest)
        if window:
            took.append(window)
    twins.check()
    os.close(file)
    if not took:
        raise SystemExit(f"no freeze of {pages} pages was met in {rounds} merges")
    return {
        "merges": rounds,
        "met": len(took),
        "window": percentiles(took),
        "slowest call": max(calls) / 1e3,
        "rest": rest,
    }


@contextmanager
def merging(mode: str) -> Iterator[None]:
    ksmrs.tunables.run = 0 if mode == "at rest" else 1
    stop = threading.Event()

    def merge() -> None:
        while not stop.is_set():
            ksmrs.merge(5)

    thread = threading.Thread(target=merge)
    if mode in ("without pause", "pinned"):
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
        ksmrs.tunables.run = 1


class Source:
    """Where bytes come from: `put` makes a piece available where it is not yet, `take` is the system call."""

    def __init__(self, kind: str, content: np.ndarray[Any, Any], directory: str) -> None:
        self.content = memoryview(content)
        self.loses = kind == "datagrams"
        self.closes: list[Any] = []
        self.put: Callable[[int], object]
        self.take: Callable[[memoryview, int], int]
        if kind == "file":
            path = Path(directory, "content")
            path.write_bytes(self.content)
            self.file = path.open("rb", buffering=0)
            self.closes = [self.file]
            self.put = self.file.seek
            self.take = lambda view, _: self.file.readinto(view)
            return
        sort = socket.SOCK_DGRAM if self.loses else socket.SOCK_STREAM
        with socket.socket(socket.AF_INET, sort) as server:
            server.bind(("127.0.0.1", 0))
            theirs = socket.socket(socket.AF_INET, sort)
            if self.loses:
                ours = server.dup()
                theirs.connect(ours.getsockname())
            else:
                server.listen()
                theirs.connect(server.getsockname())
                ours = server.accept()[0]
        self.closes = [ours, theirs]
        ours.settimeout(PATIENCE_SECONDS)
        self.put = lambda at: theirs.sendall(self.content[at : at + PIECE])
        self.take = lambda view, _: ours.recv_into(view, 0, 0 if self.loses else socket.MSG_WAITALL)

    def close(self) -> None:
        for each in self.closes:
            each.close()


def read(source: Source, twins: Twins, seconds: float, pin: bool) -> dict[str, float]:
    counts: Counter[str] = Counter()
    view = memoryview(twins.ours)
    longest = 0
    merges = ksmrs.process_stats().merges
    began = time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        for start in range(0, len(view), PIECE):
            source.put(start)
            counts["pieces"] += 1
            at, failed = start, 0
            while at < start + PIECE:
                wanted = view[at : start + PIECE]
                counts["calls"] += 1
                try:
                    with ksmrs.pinned(wanted) if pin else nullcontext():
                        got = source.take(wanted, at)
                except OSError as refused:
                    if refused.errno != errno.EFAULT:
                        raise
                    got = 0
                if got < len(wanted):
                    if not failed:
                        failed = time.perf_counter_ns()
                        counts["short" if got else "EFAULT"] += 1
                    if source.loses:
                        counts["lost"] += 1
                        source.put(start)
                at += got
            if failed:
                longest = max(longest, time.perf_counter_ns() - failed)
    twins.check()
    pieces = counts["pieces"]
    return {
        "pieces": pieces,
        "calls": counts["calls"],
        "merges": ksmrs.process_stats().merges - merges,
        "EFAULT per million": counts["EFAULT"] / pieces * 1e6,
        "short per million": counts["short"] / pieces * 1e6,
        "lost per million": counts["lost"] / pieces * 1e6,
        "longest until whole, us": longest / 1e3,
        "MiB/s": pieces * PIECE / MIB / took,
    }


def loops(kind: str, nbytes: int, seconds: float, directory: str) -> dict[str, dict[str, float]]:
    twins = Twins(nbytes)
    source = Source(kind, twins.content, directory)
    figures = {}
    for mode in MODES:
        with merging(mode):
            figures[mode] = read(source, twins, seconds, mode == "pinned")
    source.close()
    if figures["without pause"]["merges"] == 0:
        raise SystemExit("nothing merged meanwhile: this benchmark has no figures")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="for each way of reading")
    parser.add_argument("--mb", type=int, default=1, help="the array that is read into, again and again")
    parser.add_argument("--rounds", type=int, default=300, help="freezes of each length")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warm(max(64, 5 * arguments.mb) * MIB)
    with tempfile.TemporaryDirectory(prefix="ksmrs-bench-") as directory:
        os.environ["KSMRS_IDLE_SECONDS"] = "1"
        ksmrs.connect(directory)
        frozen = {pages: windows(pages, arguments.rounds) for pages in RUNS}
        kinds = ("file", "stream", "datagrams")
        reading = {kind: loops(kind, arguments.mb * MIB, arguments.seconds, directory) for kind in kinds}
        ksmrs.disconnect()
    if arguments.json:
        print(json.dumps({"windows_us": frozen, "reading": reading}, indent=2))
        return
    print(
        "a byte read into the middle of a run while it merges, microseconds from the first EFAULT to the next success"
    )
    for pages, figure in frozen.items():
        print(
            f"  {pages:3} pages: "
            + ", ".join(f"{name} {value:.0f}" for name, value in figure["window"].items())
            + f"; met in {figure['met']} of {figure['merges']} merges; "
            f"slowest call {figure['slowest call']:.0f}, at rest {figure['rest']['max']:.0f}"
        )
    for kind, modes in reading.items():
        print(
            f"{kind} into {arguments.mb} MiB in pieces of {PIECE >> 10} KiB; of a million pieces, first tries that failed:"
        )
        for mode, figure in modes.items():
            print(
                f"  {mode:13} EFAULT {figure['EFAULT per million']:.0f}, short {figure['short per million']:.0f}, "
                f"lost by all tries {figure['lost per million']:.0f}; "
                f"longest until whole {figure['longest until whole, us'] / 1e3:.1f} ms; "
                f"{figure['MiB/s'] / modes['at rest']['MiB/s']:.2f} of the speed at rest; "
                f"{figure['pieces']:.0f} pieces read, {figure['merges']:.0f} pages merged"
            )


if __name__ == "__main__":
    main()
