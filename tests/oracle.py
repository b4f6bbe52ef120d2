"""The oracle: no byte is ever wrong, whatever the broker does.

Several processes keep pages in private and shared regions, or in arrays, mappings and named objects of their own, and write to
them from several threads, while pages merge, the broker is killed again and again, and an outsider opens the named objects.
The content of half a page is a function of a class, which many pages in all processes share, and a version, which makes it the
page's own. What each half must hold is kept in ordinary memory, which is in no region. Every write is preceded and followed by
a comparison of what it is about to replace and what it wrote; at the end every page is compared once more.

Two threads write the two halves of the same pages, so they break the same pages at the same time; memmove and memcmp are
called through ctypes, which releases the GIL. Writing goes on within a window that moves, for only pages at rest merge.

    python tests/oracle.py [SECONDS]     (or KSMRS_ORACLE_SECONDS; KSMRS_ORACLE_PROCESSES, KSMRS_ORACLE_SEED)
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import posix_ipc

import ksmrs
from ksmrs import _adopt

PAGE = 4096
HALF = PAGE // 2
PAGES = 2048
"""Pages of a region; 8 MiB, four extents."""
CLASSES = 6
VERSIONS = 4
DIFFERENCE = 160
"""Versions of one class differ only in so many bytes."""
WINDOW = 128
WINDOW_SECONDS = 0.05
THREADS = 2
BROKER_LIFE_SECONDS = 3.0
STOP_SECONDS = 6.5
"""A stopped client is left out of the broker's planning after five."""
FORK_SECONDS = 5.0
CHILD_SECONDS = 1.5
"""A forked child goes on showing, for so long, what its parent gives up."""

# Through CDLL, unlike memoryview slices and small NumPy copies, these release the GIL.
_libc = ctypes.CDLL(None)
_memcmp = _libc.memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove = _libc.memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = ctypes.c_void_p


def make_contents() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What half a page of class c and version v holds: contents[c * VERSIONS + v]. Class 0, version 0 is all zeros."""
    contents = np.empty((CLASSES * VERSIONS, HALF), np.uint8)
    for kind in range(CLASSES):
        base = np.random.default_rng(kind).integers(0, 256, HALF, np.uint8) if kind else np.zeros(HALF, np.uint8)
        for version in range(VERSIONS):
            contents[kind * VERSIONS + version] = base
            contents[kind * VERSIONS + version, version * 37 : version * 37 + version] ^= 0x5A
    return contents


class Wrong(Exception):
    """A byte is not what was written."""


REGIONS = ("private region", "shared region")
OWN = ("ndarray", "anonymous mapping", "named object")


def name_of(pid: int) -> str:
    """The object of a worker that has a named one."""
    return f"/ksmrs-oracle-{pid}"


class Field:
    """Memory that takes part, and what every half page of it must hold."""

    def __init__(self, kind: str, contents: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.kind = kind
        # An outsider tells by the zeros whether it found a hole where bytes should be.
        self.classes = range(1 if kind == "named object" else 0, CLASSES)
        self.region: Any
        if kind in REGIONS:
            self.region = ksmrs.Region(PAGES * PAGE, kind == "shared region")
            self._array = self.region.array(np.uint8, PAGES * PAGE)
        elif kind == "ndarray":
            raw = np.empty((PAGES + 1) * PAGE, np.uint8)
            first = -raw.ctypes.data % PAGE
            self._array = self.region = raw[first : first + PAGES * PAGE]
        elif kind == "anonymous mapping":
            self.region = mmap.mmap(-1, PAGES * PAGE)
            self._array = np.frombuffer(self.region, np.uint8)
        else:
            made = posix_ipc.SharedMemory(name_of(os.getpid()), posix_ipc.O_CREX, size=PAGES * PAGE)
            self.region = mmap.mmap(made.fd, made.size)
            made.close_fd()
            self._array = np.frombuffer(self.region, np.uint8)
        if kind in OWN:
            ksmrs.madvise(self.region, ksmrs.MADV_MERGEABLE)
        self._address = self._array.ctypes.data
        self._contents = contents
        self._expected_from = contents.ctypes.data
        self.expected = [[0] * THREADS for _ in range(PAGES)]
        self.busy: list[int | None] = [None] * THREADS
        """The page that each thread is writing now: a forked child can't know which content it finds there."""

    def page_states(self) -> bytes:
        """The state of every page, but of those that are at home for now."""
        if self.kind in REGIONS:
            return bytes(self.region.page_states())
        return b"".join(
            region.page_states()
            for hold in list(_adopt._holds.values())
            for region in list(hold.regions)
            if region.address == self._address
        )

    def digest(self) -> str:
        """Of what all of it must hold."""
        numbers = np.array(self.expected).reshape(-1)
        return hashlib.sha256(self._contents[numbers].tobytes()).hexdigest()

    def end(self) -> None:
        """Take it out of ksmrs; its bytes stay."""
        if self.kind in REGIONS:
            self.region.close()
        else:
            ksmrs.madvise(self.region, ksmrs.MADV_UNMERGEABLE)

    def check(self, page: int, half: int) -> None:
        """Compare half a page with what was last written to it."""
        wanted = self.expected[page][half]
        address = self._address + page * PAGE + half * HALF
        if _memcmp(address, self._expected_from + wanted * HALF, HALF):
            found = self._array[page * PAGE + half * HALF :][:HALF].copy()
            at = int(np.flatnonzero(found != self._contents[wanted])[:1].sum())
            matches = [number for number in range(len(self._contents)) if (self._contents[number] == found).all()]
            raise Wrong(
                f"pid {os.getpid()}, {self.kind}, page {page}, half {half}, byte {at}: {found[at]:#04x}, not "
                f"{self._contents[wanted][at]:#04x}; wrote content {wanted}, found {matches or 'none of ours'}; state "
                f"{[ksmrs.PageState(state).name for state in self.page_states()[page : page + 1]]}"
            )

    def write(self, page: int, half: int, content: int, first: int, last: int) -> None:
        """Make half a page hold a content, writing it whole or only where it differs, and compare."""
        self.check(page, half)
        address = self._address + page * PAGE + half * HALF
        self.busy[half] = page
        _memmove(address + first, self._expected_from + content * HALF + first, last - first)
        self.expected[page][half] = content
        self.busy[half] = None
        self.check(page, half)


class Writer(threading.Thread):
    """Owns one half of every page, and writes where the window is."""

    def __init__(self, fields: list[Field], half: int, seed: int, stop: threading.Event) -> None:
        super().__init__(name=f"writer {half}")
        self._fields = fields
        self._half = half
        self._random = random.Random(seed)
        self._stop_now = stop
        self.verified = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_now.is_set():
                self._one_window()
        except BaseException as raised:
            self.failure = raised
            self._stop_now.set()

    def _one_window(self) -> None:
        chance = self._random
        # The same window for both threads of a process, by the clock, so that they meet in its pages.
        turn = int(time.monotonic() / WINDOW_SECONDS)
        start = random.Random(turn * 7919 + os.getpid()).randrange(0, PAGES, WINDOW)
        field = self._fields[turn % len(self._fields)]
        style = turn % 4
        while not self._stop_now.is_set() and int(time.monotonic() / WINDOW_SECONDS) == turn:
            if style == 0:
                # A sequential writer: a whole run of pages gets the same class, good for merging again.
                kind = chance.choice(field.classes)
                for page in range(start, start + WINDOW):
                    field.write(page, self._half, kind * VERSIONS, 0, HALF)
                self.verified += WINDOW
                self._stop_now.wait(WINDOW_SECONDS)
                return
            page = start + chance.randrange(WINDOW)
            old = field.expected[page][self._half]
            if style == 1:
                # Few bytes: the rest of the half page must come through the break unharmed.
                content = old // VERSIONS * VERSIONS + chance.randrange(VERSIONS)
            else:
                content = chance.choice(field.classes) * VERSIONS + chance.randrange(VERSIONS)
            field.write(page, self._half, content, 0, DIFFERENCE if style == 1 else HALF)
            field.check(start + chance.randrange(WINDOW), self._half)
            self.verified += 2


def forked(fields: list[Field], seed: int) -> int:
    """Fork a child that looks at its copy of the private region again and again, writes to it, and ends."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        field = fields[0]
        skipped = set(field.busy)
        chance = random.Random(seed)
        until = time.monotonic() + CHILD_SECONDS
        while time.monotonic() < until:
            for page in set(range(PAGES)) - skipped:
                for half in range(THREADS):
                    field.check(page, half)
            for _ in range(64):
                page = chance.choice([page for page in range(PAGES) if page not in skipped])
                field.write(page, chance.randrange(THREADS), chance.randrange(CLASSES * VERSIONS), 0, HALF)
        status = 0
    except BaseException as raised:
        os.write(2, f"forked child of seed {seed}: {raised}\n".encode())
    finally:
        os._exit(status)


def worker(seconds: float, seed: int) -> dict[str, Any]:
    """One process: writers, a thread that asks for merging, and the last look at everything."""
    contents = make_contents()
    fields = [Field(kind, contents) for kind in (OWN if seed % 2 else REGIONS)]
    # Everybody begins with the same contents in the same places, so that there is something to merge at once.
    start = random.Random(4711)
    for field in fields:
        for page in range(PAGES):
            both = max(start.randrange(CLASSES), field.classes[0]) * VERSIONS
            for half in range(THREADS):
                field.write(page, half, both, 0, HALF)
    stop = threading.Event()
    writers = [Writer(fields, half, seed * 31 + half, stop) for half in range(THREADS)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + seconds
    merged_most = forks = 0
    child: int | None = None
    next_fork = time.monotonic() + FORK_SECONDS
    chance = random.Random(seed)
    while time.monotonic() < deadline and not stop.is_set():
        try:
            ksmrs.merge(timeout=1.0)
        except ksmrs.KsmrsError:
            # The broker was just killed; the next request finds the next one.
            stop.wait(0.05)
        merged_most = max(merged_most, *(_merged(field) for field in fields))
        if child is not None and (ended := os.waitpid(child, os.WNOHANG))[0]:
            if ended[1]:
                raise Wrong(f"a forked child ended with status {ended[1]}")
            child = None
        elif child is None and time.monotonic() > next_fork:
            child = forked(fields, seed + forks)
            forks += 1
            next_fork = time.monotonic() + FORK_SECONDS
        if chance.random() < 0.2:
            first = chance.randrange(PAGES - WINDOW) * PAGE
            field = chance.choice(fields)
            ksmrs.madvise(field.region, ksmrs.MADV_UNMERGEABLE, first, WINDOW * PAGE)
            ksmrs.madvise(field.region, ksmrs.MADV_MERGEABLE, first, WINDOW * PAGE)
        elif chance.random() < 0.1 and (field := chance.choice(fields)).kind in OWN:
            field.end()
            ksmrs.madvise(field.region, ksmrs.MADV_MERGEABLE)
    stop.set()
    for writer in writers:
        writer.join()
    if child is not None and os.waitpid(child, 0)[1]:
        raise Wrong("the last forked child did not end well")
    for writer in writers:
        if writer.failure is not None:
            raise writer.failure
    for field in fields:
        for page in range(PAGES):
            for half in range(THREADS):
                field.check(page, half)
    for field in fields:
        field.end()
        for page in range(PAGES):
            for half in range(THREADS):
                field.check(page, half)
    counters = ksmrs.process_stats()
    return {
        "verified": sum(writer.verified for writer in writers),
        "merged_most": merged_most,
        "forks": forks,
        "object": next((field.digest() for field in fields if field.kind == "named object"), None),
        **{name: getattr(counters, name) for name in ("merges", "breaks") if hasattr(counters, name)},
    }


def _merged(field: Field) -> int:
    states = field.page_states()
    return states.count(ksmrs.PageState.MERGED) + states.count(ksmrs.PageState.ZERO)


class Outsider(threading.Thread):
    """Another program, to the workers: opens their named objects at random and looks for bytes that nobody wrote.

    It reads while others write, so half a page may be of two contents; but each byte is one that some content has there, and no
    half is all zeros, which is what a page that is missing in its object would be.
    """

    def __init__(self, paths: list[Path], seed: int) -> None:
        super().__init__(name="outsider")
        self._paths = paths
        self._random = random.Random(seed)
        self.over = threading.Event()
        self.opened = 0
        self._filled: dict[Path, int] = {}
        """How many halves of each object held something before."""
        self.failure: BaseException | None = None

    def run(self) -> None:
        contents = make_contents()[VERSIONS:]
        known = np.zeros((HALF, 256), bool)
        for content in contents:
            known[np.arange(HALF), content] = True
        try:
            while not self.over.wait(self._random.uniform(0, 1)):
                path = self._random.choice(self._paths)
                if path.exists() and (data := path.read_bytes()):
                    self._look(np.frombuffer(data, np.uint8).reshape(-1, HALF), known, path)
        except BaseException as raised:
            self.failure = raised

    def _look(self, halves: np.ndarray[Any, np.dtype[np.uint8]], known: Any, path: Path) -> None:
        if not halves.any():
            return  # just made
        self.opened += 1
        there = np.flatnonzero(halves.any(axis=1))
        filled = self._filled.get(path, 0)
        missing = np.setdiff1d(np.arange(filled), there)
        strange = ~known[np.arange(HALF), halves].all(axis=1)
        if len(missing) or strange[:filled].any():
            strangers = np.flatnonzero(strange[:filled])
            raise Wrong(f"{path}: an outsider found zeros in halves {missing[:9]}, strangers in {strangers[:9]}")
        # A worker that has not come so far yet has written none of the pages after these. It goes on while this one reads,
        # so only later looks are judged by it.
        last = there[-1]
        self._filled[path] = max(filled, last - THREADS if strange.any() else len(halves))


def conduct(seconds: float, processes: int = 4, seed: int | None = None) -> dict[str, Any]:
    """Run the workers, kill brokers meanwhile, and add up; raises Wrong with what a worker said if one failed."""
    from children import kill_brokers

    seed = random.randrange(1 << 30) if seed is None else seed
    runtime_dir = Path(os.environ["KSMRS_RUNTIME_DIR"])
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(seconds), str(seed + number)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    named = {process.pid: Path("/dev/shm") / name_of(process.pid)[1:] for process in workers}
    outsider = Outsider(list(named.values()), seed)
    outsider.start()
    killed = stopped = 0
    began = time.monotonic()
    chance = random.Random(seed)
    try:
        # The last seconds belong to one broker, so that something is merged at the end of even a short run.
        while time.monotonic() - began < seconds - BROKER_LIFE_SECONDS and not _any_failed(workers):
            if (
                (killed + 1) % 3 == 0
                and seconds - (time.monotonic() - began) > 2 * STOP_SECONDS
                and stopped <= killed // 3
            ):
                # Long enough for the broker to plan without it; then it wakes, with whatever was proposed to it.
                sleeper = chance.choice(workers)
                sleeper.send_signal(signal.SIGSTOP)
                _pass(STOP_SECONDS, workers)
                sleeper.send_signal(signal.SIGCONT)
                stopped += 1
            _pass(min(BROKER_LIFE_SECONDS, seconds / 4), workers)
            killed += len(kill_brokers(runtime_dir))
        while any(process.poll() is None for process in workers) and not _any_failed(workers):
            if time.monotonic() - began > seconds + 120:
                raise Wrong(f"seed {seed}: workers still run {seconds + 120} s after they began")
            time.sleep(0.05)
    finally:
        for process in workers:
            if process.poll() is None:
                process.kill()
        answers = [process.communicate() for process in workers]
        outsider.over.set()
        outsider.join()
        left = {pid: hashlib.sha256(path.read_bytes()).hexdigest() for pid, path in named.items() if path.exists()}
        for pid in left:
            named[pid].unlink()
    if outsider.failure is not None:
        raise outsider.failure
    wrong = [
        f"worker {number} ended with {process.returncode}: {errors.strip()}"
        for number, (process, (_, errors)) in enumerate(zip(workers, answers, strict=True))
        if process.returncode and process.returncode != -signal.SIGKILL
    ]
    if wrong:
        raise Wrong(f"seed {seed}\n" + "\n".join(wrong))
    reports = [json.loads(output) for output, _ in answers]
    for process, report in zip(workers, reports, strict=True):
        if left.get(process.pid) != report["object"]:
            raise Wrong(f"the object of worker {process.pid} does not hold at its end what the worker left in it")
    total = {
        name: sum(report.get(name, 0) for report in reports)
        for name in ("verified", "merged_most", "merges", "breaks", "forks")
    }
    total |= {"brokers_killed": killed, "workers_stopped": stopped, "opened_by_outsiders": outsider.opened}
    return {**total, "seconds": round(time.monotonic() - began, 1), "seed": seed}


def _any_failed(workers: list[subprocess.Popen[str]]) -> bool:
    return any(process.poll() for process in workers)


def _pass(seconds: float, workers: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not _any_failed(workers):
        time.sleep(0.05)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(float(sys.argv[2]), int(sys.argv[3]))))
        return
    seconds = float(sys.argv[1] if sys.argv[1:] else os.environ.get("KSMRS_ORACLE_SECONDS", "60"))
    with tempfile.TemporaryDirectory(prefix="ksmrs-oracle-") as directory:
        os.environ["KSMRS_RUNTIME_DIR"] = directory
        os.environ.setdefault("KSMRS_IDLE_SECONDS", "2")
        seed = os.environ.get("KSMRS_ORACLE_SEED")
        print(conduct(seconds, int(os.environ.get("KSMRS_ORACLE_PROCESSES", "4")), int(seed) if seed else None))
        from children import kill_brokers

        kill_brokers(Path(directory))


if __name__ == "__main__":
    main()
