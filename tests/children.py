"""Child processes of the tests: programs given as text, run by this interpreter in the test's runtime directory.

What may crash runs in a child. A child that must wait for the test reads a line of its standard input. Children are killed by
process id, and the test fails if one had to be.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TESTS = Path(__file__).resolve().parent
SECONDS = 120
PRELUDE = """\
import gc, os, signal, subprocess, sys, threading, time
import numpy as np
import ksmrs
from ksmrs import PageState
sys.path.insert(0, {tests!r})
from children import counted, ended, equal_regions, forked, merged, wait_counted, wait_for, wait_merged
"""


class Child:
    """A running child, line by line."""

    def __init__(self, program: str, *, prelude: bool = True, **environment: str) -> None:
        text = (PRELUDE.format(tests=str(TESTS)) if prelude else "") + textwrap.dedent(program)
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.pid = self._process.pid
        self.errors = ""

    def line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        too_long = threading.Timer(SECONDS, self._process.kill)
        too_long.start()
        line = self._process.stdout.readline()
        too_long.cancel()
        if not line:
            _, errors = self._process.communicate()
            raise AssertionError(f"child ended with {self._process.returncode} before it said anything:\n{errors}")
        return line.rstrip("\n")

    def tell(self, line: str = "") -> None:
        """Give it a line to read."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def end_of_input(self) -> None:
        """Tell it that nothing more will come."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.stdin = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        self._process.send_signal(number)

    def end(self, returncode: int = 0, seconds: float = SECONDS) -> str:
        """Wait for its end, check how it ended; the rest of its output."""
        try:
            output, errors = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            output, errors = self._process.communicate()
            raise AssertionError(f"child did not end within {seconds} s\n{output}\n{errors}") from None
        assert self._process.returncode == returncode, (
            f"child ended with {self._process.returncode}\n{output}\n{errors}"
        )
        self.errors = errors
        return output

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None and not stream.closed:
                stream.close()
        self._process.wait()


def run(
    program: str, *, prelude: bool = True, returncode: int = 0, seconds: float = SECONDS, **environment: str
) -> str:
    """Run a program to its end; what it printed."""
    with Child(program, prelude=prelude, **environment) as child:
        return child.end(returncode, seconds)


def wait_for(condition: Callable[[], bool], what: str = "the condition", seconds: float = 30) -> None:
    """Look again and again until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.005)


def state_of(pid: int) -> str:
    """A process's state as the kernel's letter: `T` stopped, `Z` ended and not waited for."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def merged(*regions: object) -> int:
    """Pages that have no memory of their own now."""
    return sum(
        region.page_states().count(4) + region.page_states().count(5)  # type: ignore[attr-defined]
        for region in regions
    )


def wait_merged(pages: int, *regions: object, seconds: float = 60) -> None:
    """Merge on request until so many pages of these regions are merged."""
    import ksmrs

    deadline = time.monotonic() + seconds
    while merged(*regions) < pages:
        assert time.monotonic() < deadline, f"{merged(*regions)} of {pages} pages merged within {seconds} s"
        ksmrs.merge(timeout=5)


def equal_regions(pages: int, shared: bool = False, seed: int = 1, count: int = 2):  # type: ignore[no-untyped-def]
    """Regions with the same contents, no two pages of one alike, and the contents."""
    import numpy as np

    import ksmrs

    contents = np.random.default_rng(seed).integers(0, 256, pages * 4096, np.uint8)
    regions = [ksmrs.Region(pages * 4096, shared) for _ in range(count)]
    for region in regions:
        region.array(np.uint8, contents.size)[:] = contents
    return regions, contents


def forked(act: Callable[[], object]) -> int:
    """Fork a child that does this and ends, well if nothing was raised; its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def ended(*pids: int) -> None:
    """Wait for children that must have ended well."""
    statuses = {pid: os.waitpid(pid, 0)[1] for pid in pids}
    assert not any(statuses.values()), statuses


def counted() -> int:
    """Pages that the broker counts as merged in this process; -1 while it has not heard of it."""
    import ksmrs

    return ksmrs.process_stats().ksm_merging_pages if ksmrs._ksmrs.is_connected() else -1


def wait_counted(pages: int) -> None:
    """Wait, asking for nothing, until the broker counts so many pages as merged in this process."""
    wait_for(lambda: counted() == pages, f"{pages} pages, not {counted()}, counted in this process")


def flipped(array: Any, page: int) -> bool:
    """A worker's work, for pools: write a page of an array that it inherited, and look whether that is all that changed."""
    before = array.copy()
    array[page * 4096 : (page + 1) * 4096] ^= 0xFF
    before[page * 4096 : (page + 1) * 4096] ^= 0xFF
    return bool((array == before).all())


inherited: Any = None
"""What a program leaves here before it forks, its pools' workers find."""


def flipped_inherited(page: int) -> bool:
    return flipped(inherited, page)


def processes_in(runtime_dir: Path) -> dict[int, str]:
    """Every process that belongs to the test of this runtime directory, with its command line."""
    wanted = f"KSMRS_RUNTIME_DIR={runtime_dir}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:  # a zombie has none
                    found[int(folder.name)] = command
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
    return found


def brokers_in(runtime_dir: Path) -> list[int]:
    """The brokers of this runtime directory, by process id."""
    return [pid for pid, command in processes_in(runtime_dir).items() if "run_broker" in command]


def kill_brokers(runtime_dir: Path, number: int = signal.SIGKILL) -> list[int]:
    """End the brokers of this runtime directory and wait until they are gone."""
    pids = brokers_in(runtime_dir)
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    wait_for(lambda: not set(pids) & set(processes_in(runtime_dir)), f"the end of brokers {pids}")
    return pids
