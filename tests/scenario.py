"""One program on two engines: kernel KSM and ksmrs, driven alike, counted alike.

A scenario starts processes, each with one range of memory, tells them what to put where and what to opt in, lets whole
passes go by without a write, and looks at the counters, whose names are the kernel's for both. The processes keep what they
wrote in ordinary memory and compare with it. Relies on full_scans for the passes and on kernel_ksm.py for the kernel's knobs,
which are put back in any case.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import kernel_ksm
import ksmrs
from children import Child, wait_for
from ksmrs import PageState

PAGE = 4096
MERGEABLE, UNMERGEABLE, NOHUGEPAGE = 12, 13, 15
COUNTERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
)
KNOBS = {
    "run": 1,
    "pages_to_scan": 100_000,
    "sleep_millisecs": 1,
    "smart_scan": 0,
    "use_zero_pages": 0,
    "max_page_sharing": 256,
}
"""What every scenario begins with."""
OWN_MEMORY, NO_MEMORY = 0, -1
"""What a page shows that does not show a frame; of zeros, it may have no memory."""
KPF_KSM, KPF_ZERO_PAGE = 21, 24
"""Bits of /proc/kpageflags."""
PASSES = 3
"""A page is volatile in the first, a candidate in the second, and has met its equal in the third."""


def content(number: int) -> bytes:
    """A page of that content; 0 is zeros."""
    if number == 0:
        return bytes(PAGE)
    return np.random.default_rng(number).integers(1, 256, PAGE, np.uint8).tobytes()


def in_another_thread(act: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(act).result()


class Engine:
    """An engine that merges: its knobs, its counters, and the memory that it takes."""

    name = ""

    def get(self, name: str) -> int:
        raise NotImplementedError

    def set(self, name: str, value: int | str) -> None:
        raise NotImplementedError

    def counters(self) -> dict[str, int]:
        return {name: self.get(name) for name in COUNTERS}

    def passes(self, count: int = PASSES) -> None:
        """Let so many whole passes go by."""
        # The one that is under way began before whatever was done last.
        until = self.get("full_scans") + count + 1
        wait_for(lambda: self.get("full_scans") >= until, f"{count} passes of {self.name}", 60)

    def is_idle(self) -> bool:
        """Whether nothing is left to be tidied up."""
        return True

    def settled(self) -> dict[str, int]:
        """The counters when nothing changes any more."""
        before: dict[str, int] = {}
        for _ in range(200):
            self.passes()
            idle = self.is_idle()
            # Only now: what was on its way when idleness was asked for has arrived.
            now = self.counters()
            if idle and now == before:
                return now
            before = now
        raise AssertionError(f"{self.name} does not come to rest: {before}")


class Kernel(Engine):
    name = "kernel"

    def get(self, name: str) -> int:
        return kernel_ksm.counter(name)

    def set(self, name: str, value: int | str) -> None:
        kernel_ksm.turn(name, value)


class Ours(Engine):
    def __init__(self, shared: bool) -> None:
        self.name = "ksmrs shared" if shared else "ksmrs private"

    def get(self, name: str) -> int:
        counters = ksmrs.stats()
        return int(getattr(counters if hasattr(counters, name) else ksmrs.tunables, name))

    def set(self, name: str, value: int | str) -> None:
        setattr(ksmrs.tunables, name, value)

    def counters(self) -> dict[str, int]:
        stats = ksmrs.stats()
        return {name: getattr(stats, name) for name in COUNTERS}

    def is_idle(self) -> bool:
        # Passes are over sooner than what they found is merged. What was given up counts as a frame of its content until no
        # process can show it any more.
        report = ksmrs.merge(60)
        return report.finished and report.pages_merged == 0 and ksmrs.stats().references_in_limbo == 0


ENGINES = ("kernel", "ksmrs private", "ksmrs shared")


def why_not(name: str) -> str | None:
    """Why an engine cannot be had, or None."""
    return kernel_ksm.unavailable() if name == "kernel" else None


@contextmanager
def engine(name: str, **knobs: int) -> Iterator[Engine]:
    """An engine with the knobs of every scenario, or these, and afterwards the kernel's as they were."""
    wanted: dict[str, int | str] = {"advisor_mode": "none", **KNOBS, **knobs}
    if name == "kernel":
        with kernel_ksm.turned(wanted):
            yield Kernel()
        return
    ours = Ours(name.endswith("shared"))
    ksmrs.connect()
    for knob, value in wanted.items():
        ours.set(knob, value)
    yield ours


class Process(Child):
    """A process with a range of pages, all of content 0 and with memory."""

    def __init__(self, engine: Engine, pages: int) -> None:
        super().__init__(f"import scenario\nscenario.serve({engine.name!r}, {pages})")
        assert self.line() == "ready"

    def do(self, command: str, **arguments: Any) -> Any:
        self.tell(json.dumps({"command": command, **arguments}))
        return json.loads(self.line())

    def put(self, first: int, contents: Sequence[int], last_byte: int | None = None) -> None:
        """Write whole pages; `last_byte` replaces the last byte of the last one."""
        self.do("put", first=first, contents=list(contents), last_byte=last_byte)

    def poke(self, page: int, byte: int) -> None:
        """Write the first byte of a page."""
        self.do("poke", page=page, byte=byte)

    def advise(self, mergeable: bool, first: int, pages: int) -> None:
        self.do("advise", mergeable=mergeable, first=first, pages=pages)

    def verify(self) -> None:
        assert self.do("verify") == [], "pages with wrong bytes"

    def frames(self) -> list[int]:
        """The physical page of each page (root)."""
        return list(self.do("frames"))

    def shown(self) -> list[int]:
        """What each page shows: the physical page of a frame, OWN_MEMORY, or NO_MEMORY (root)."""
        return list(self.do("shown"))

    def fork(self) -> None:
        """From now on a child has it all, too."""
        self.do("fork")

    def verify_child(self) -> None:
        assert self.do("verify_child") == [], "pages with wrong bytes in the child"

    def write_always(self, page: int) -> None:
        """Change a page every few milliseconds, until `be_quiet`."""
        self.do("write_always", page=page)

    def be_quiet(self) -> None:
        self.do("be_quiet")

    def leave(self) -> None:
        """End, with everything as it is."""
        self.end_of_input()
        self.end()


class Scene:
    """An engine and the processes on it."""

    def __init__(self, engine: Engine, ends: ExitStack) -> None:
        self.engine = engine
        self.processes: list[Process] = []
        self._ends = ends

    def process(self, pages: int, contents: Sequence[int] = (), mergeable: bool = True) -> Process:
        process = Process(self.engine, pages)
        self._ends.enter_context(process)
        self.processes.append(process)
        process.put(0, contents)
        if mergeable:
            process.advise(True, 0, pages)
        return process

    def expect(self, **expected: int) -> dict[str, int]:
        """The counters when nothing changes any more are these, the others zero, and every byte is right."""
        found = self.engine.settled()
        for process in self.processes:
            process.verify()
        differ = {
            name: (found[name], expected.get(name, 0)) for name in COUNTERS if found[name] != expected.get(name, 0)
        }
        assert not differ, f"{self.engine.name}: (found, expected) {differ}"
        return found

    def gone(self, process: Process) -> None:
        process.leave()
        self.processes.remove(process)


@contextmanager
def scene(name: str, **knobs: int) -> Iterator[Scene]:
    with engine(name, **knobs) as made, ExitStack() as ends:
        yield Scene(made, ends)


class Served:
    """The process's side."""

    def __init__(self, engine: str, pages: int) -> None:
        self._kernel = engine == "kernel"
        self._memory: Any
        if self._kernel:
            self._memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._region = ksmrs.Region(pages * PAGE, shared=engine.endswith("shared"))
            ksmrs.madvise(self._region, ksmrs.MADV_UNMERGEABLE)
            self._memory = self._region
        self._bytes = np.frombuffer(self._memory, np.uint8)
        if self._kernel:
            self._madvise(NOHUGEPAGE, 0, pages)
        self._expected = np.zeros(pages * PAGE, np.uint8)
        self._bytes[:] = 0
        self._noise: tuple[threading.Thread, threading.Event] | None = None
        self._child: tuple[int, int, int] | None = None

    def _madvise(self, advice: int, first: int, pages: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        start = ctypes.c_void_p(self._bytes.ctypes.data + first * PAGE)
        if libc.madvise(start, ctypes.c_size_t(pages * PAGE), advice) != 0:
            raise OSError(ctypes.get_errno(), "madvise")

    def put(self, first: int, contents: list[int], last_byte: int | None) -> None:
        data = np.frombuffer(b"".join(map(content, contents)), np.uint8).copy()
        if last_byte is not None:
            data[-1] = last_byte
        self._expected[first * PAGE : first * PAGE + data.size] = data

        def write() -> None:
            # The last page first: a thread that writes to merged shared pages in sequence takes their neighbours along, which
            # would merge again where the kernel had never parted them.
            for page in reversed(range(first, first + len(contents))):
                here = slice(page * PAGE, (page + 1) * PAGE)
                self._bytes[here] = self._expected[here]

        in_another_thread(write)

    def poke(self, page: int, byte: int) -> None:
        self._expected[page * PAGE] = byte
        in_another_thread(lambda: self._bytes.__setitem__(page * PAGE, byte))

    def advise(self, mergeable: bool, first: int, pages: int) -> None:
        if self._kernel:
            self._madvise(MERGEABLE if mergeable else UNMERGEABLE, first, pages)
        else:
            advice = ksmrs.MADV_MERGEABLE if mergeable else ksmrs.MADV_UNMERGEABLE
            ksmrs.madvise(self._region, advice, first * PAGE, pages * PAGE)

    def verify(self) -> list[int]:
        wrong = (self._bytes != self._expected).reshape(-1, PAGE).any(1)
        return [int(page) for page in wrong.nonzero()[0]]

    def shown(self) -> list[int]:
        # A page that nobody read since it merged need not be mapped.
        self._bytes[::PAGE].sum()
        frames = self.frames()
        if self._kernel:
            with Path("/proc/kpageflags").open("rb", buffering=0) as file:
                flags = [int.from_bytes(os.pread(file.fileno(), 8, frame * 8), "little") for frame in frames]
            merged, zero = ([bool(flag >> bit & 1) for flag in flags] for bit in (KPF_KSM, KPF_ZERO_PAGE))
        else:
            states = self._region.page_states()
            merged, zero = ([state == wanted for state in states] for wanted in (PageState.MERGED, PageState.ZERO))
        return [
            NO_MEMORY if is_zero else frame if is_merged else OWN_MEMORY
            for frame, is_merged, is_zero in zip(frames, merged, zero, strict=True)
        ]

    def frames(self) -> list[int]:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(self._bytes.ctypes.data // PAGE * 8)
            entries = np.frombuffer(pagemap.read(self._bytes.size // PAGE * 8), np.uint64)
        return [int(entry) & ((1 << 55) - 1) for entry in entries]

    def fork(self) -> None:
        (asked, ask), (answered, answer) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            # A client of its own, where it can be one: then its pages count.
            os.close(ask)
            if not self._kernel:
                ksmrs.connect()
            os.write(answer, b"r")
            while os.read(asked, 1):
                os.write(answer, json.dumps(self.verify()).encode() + b"\n")
            os._exit(0)
        os.close(asked)
        os.close(answer)
        assert os.read(answered, 1) == b"r"
        self._child = (pid, ask, answered)

    def verify_child(self) -> list[int]:
        assert self._child is not None
        os.write(self._child[1], b"?")
        with os.fdopen(os.dup(self._child[2])) as answers:
            return list(json.loads(answers.readline()))

    def write_always(self, page: int) -> None:
        stop = threading.Event()

        def write() -> None:
            while not stop.wait(0.002):
                self.poke(page, int(self._expected[page * PAGE] + 1) % 256)

        thread = threading.Thread(target=write)
        thread.start()
        self._noise = (thread, stop)

    def be_quiet(self) -> None:
        if self._noise is not None:
            self._noise[1].set()
            self._noise[0].join()
            self._noise = None

    def end(self) -> None:
        self.be_quiet()
        if self._child is not None:
            os.close(self._child[1])
            os.waitpid(self._child[0], 0)


def serve(engine: str, pages: int) -> None:
    """Do what the standard input says, one JSON object a line."""
    served = Served(engine, pages)
    print("ready", flush=True)
    for line in sys.stdin:
        arguments = json.loads(line)
        print(json.dumps(getattr(served, arguments.pop("command"))(**arguments)), flush=True)
    served.end()
