"""One worker process of `ksmrs demo`: an ordinary program with data in mergeable memory of one of four kinds.

It reads a list of files into that memory, adds data that nobody else has, and then does what its standard input says, one JSON
object a line, answering each on standard output. It keeps no copy of what it holds: it verifies against the files.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import posix_ipc

import ksmrs

PAGE_SIZE = ksmrs.PAGE_SIZE
CHUNK = 1 << 20
OWN_BYTES = 4 << 20
OVERWRITE_EVERY = 16
"""One page of so many is overwritten, at its first 256 bytes."""
STAMP = np.arange(256, dtype=np.uint8)

Bytes = npt.NDArray[np.uint8]


KINDS = ("private region", "shared region", "named object", "ndarray")
"""Memory of ksmrs's own; an object of posix_ipc, taken by its name, and an ordinary array, opted in where they are."""


def memory(kind: str, nbytes: int, name: str) -> tuple[Any, Bytes]:
    """Return what to advise on, and its bytes, which start at a page: equal data merge where they lie alike in their pages."""
    if kind in ("private region", "shared region"):
        region = ksmrs.Region(nbytes, shared=kind == "shared region")
        return region, region.array(np.uint8, nbytes)
    if kind == "named object":
        shared = posix_ipc.SharedMemory(name)
        mapped = mmap.mmap(shared.fd, nbytes)
        shared.close_fd()
        return mapped, np.frombuffer(mapped, np.uint8)
    whole = np.empty(nbytes + PAGE_SIZE, np.uint8)
    array = whole[-whole.ctypes.data % PAGE_SIZE :][:nbytes]
    return array, array


class Worker:
    """The memory of one worker and the commands on it."""

    def __init__(self, number: int, kind: str, files: list[tuple[str, int]], name: str) -> None:
        self._number = number
        self._files = files
        self._overwritten = False
        nbytes = sum(_pages(size) for _, size in files) * PAGE_SIZE
        self._advised, whole = memory(kind, nbytes + OWN_BYTES, name)
        ksmrs.madvise(self._advised, ksmrs.MADV_MERGEABLE)
        self._data: Bytes = whole[:nbytes]
        self._own: Bytes = whole[nbytes:]

    def load(self) -> dict[str, Any]:
        """Read every file to a page of its own start, so that equal files have equal pages."""
        at = 0
        for path, size in self._files:
            with Path(path).open("rb", buffering=0) as file:
                read = _fill(file, self._data[at : at + size])
            if read != size:
                raise OSError(f"{path} had {size} bytes when the demo began, and {read} now")
            at += _pages(size) * PAGE_SIZE
        self._own[:] = self._own_data()
        return {"mapped_bytes": self._data.size + OWN_BYTES}

    def measure(self) -> dict[str, Any]:
        """Tell memory as the kernel counts it, pages as the broker does, and CPU time."""
        rollup: dict[str, int] = {}
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
            name, value, *_ = line.split()
            rollup[name.rstrip(":")] = int(value) * 1024
        counted = ksmrs.process_stats()
        return {
            "pss_bytes": rollup["Pss"],
            "held_bytes": rollup["Pss_Anon"] + rollup["Pss_Shmem"],
            "merged_pages": counted.ksm_merging_pages + counted.ksm_zero_pages,
            "pages_of_frames": _pages_of_frames(),
            "cpu_seconds": time.process_time(),
        }

    def overwrite(self) -> dict[str, Any]:
        """Write to one page of sixteen; each write gives a merged page its own memory back."""
        starts = range(0, self._data.size, PAGE_SIZE * OVERWRITE_EVERY)
        for start in starts:
            self._data[start : start + STAMP.size] = STAMP
        self._overwritten = True
        return {"pages_written": len(starts)}

    def verify(self) -> dict[str, Any]:
        """Compare every byte with the files, read again, and with the own data, made again."""
        wrong = int(np.count_nonzero(self._own != self._own_data()))
        at = 0
        for path, size in self._files:
            with Path(path).open("rb", buffering=0) as file:
                for first in range(0, size, CHUNK):
                    expected = np.zeros(_pages(min(CHUNK, size - first)) * PAGE_SIZE, np.uint8)
                    _fill(file, expected[: min(CHUNK, size - first)])
                    self._stamp(expected, at + first)
                    held = self._data[at + first : at + first + expected.size]
                    wrong += int(np.count_nonzero(held != expected))
            at += _pages(size) * PAGE_SIZE
        return {"bytes_verified": self._data.size + OWN_BYTES, "bytes_wrong": wrong}

    def unmerge(self) -> dict[str, Any]:
        """Give every page its own memory back."""
        ksmrs.madvise(self._advised, ksmrs.MADV_UNMERGEABLE)
        return self.measure()

    def _own_data(self) -> Bytes:
        return np.random.default_rng(self._number).integers(0, 256, OWN_BYTES, np.uint8)

    def _stamp(self, expected: Bytes, first: int) -> None:
        if self._overwritten:
            every = PAGE_SIZE * OVERWRITE_EVERY
            for start in range(-first % every, expected.size, every):
                expected[start : start + STAMP.size] = STAMP


def _pages_of_frames() -> int:
    """Count the pages that show a frame, as the kernel sees it: mapped from a frame store and not copied since.

    Regions map frames privately; the one mapping of the whole store that merging may look through for a moment is shared.
    """
    shown = 0
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if "ksmrs-store" in mapping and mapping.split(maxsplit=2)[1].endswith("p"):
            sizes = {name: int(size) for name, size in re.findall(r"(?m)^(Rss|Anonymous): +(\d+) kB$", mapping)}
            shown += (sizes["Rss"] - sizes["Anonymous"]) * 1024 // PAGE_SIZE
    return shown


def _pages(size: int) -> int:
    return -(-size // PAGE_SIZE)


def _fill(file: BinaryIO, target: Bytes) -> int:
    """Read until `target` is full.

    Through a buffer of our own: a read() straight into memory that may merge would fail at a merged page.
    """
    at = 0
    while at < target.size and (read := file.read(min(CHUNK, target.size - at))):
        target[at : at + len(read)] = np.frombuffer(read, np.uint8)
        at += len(read)
    return at


def main() -> None:
    """Serve one command a line until standard input ends."""
    # Whatever else prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    setting = json.loads(sys.stdin.readline())
    files = [(path, size) for path, size in setting["files"]]
    worker = Worker(setting["number"], setting["kind"], files, setting["name"])
    for line in sys.stdin:
        answer = getattr(worker, json.loads(line))()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
