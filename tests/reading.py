"""System calls that write into merged private memory: what each source of bytes promises, under merging without pause.

While a page is compared (its freeze) a call that writes into it fails with EFAULT, or comes back short if it was past some
pages already. Each source here says how such a call is gone on with; nothing may ever be wrong in what arrived. Pieces are
put and taken in turn by one thread, so that a call that is not whole can only be the freeze's doing. A peer process holds
the same bytes. Used by test_real_life in its own process, and once more in the build with failpoints, whose freezes last
long enough to be met for sure:

    python tests/reading.py
"""

from __future__ import annotations

import errno
import json
import os
import select
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
from children import Child

PAGE = 4096
PAGES = 256
PIECE = 8 * PAGE
"""What one call asks for; a datagram, a pipe and a socket's buffer all hold that much."""
SECONDS = 60
CONTENT = np.random.default_rng(21).integers(1, 256, PAGES * PAGE, np.uint8)
BYTES = CONTENT.tobytes()
PEER = f"""
content = np.random.default_rng(21).integers(1, 256, {PAGES * PAGE}, np.uint8)
raw = np.empty(content.size + 4096, np.uint8)
array = raw[-raw.ctypes.data % 4096 :][: content.size]
array[:] = content
ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
print("ready", flush=True)
sys.stdin.read()
assert (array == content).all()
"""


def array_at_a_page() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Memory that NumPy made, of whole pages, with the bytes that the peer has too."""
    raw = np.empty(CONTENT.size + PAGE, np.uint8)
    array: np.ndarray[Any, np.dtype[np.uint8]] = raw[-raw.ctypes.data % PAGE :][: CONTENT.size]
    array[:] = CONTENT
    return array


@contextmanager
def merging_without_pause() -> Iterator[None]:
    """A peer with equal bytes, and a thread that asks for merging again and again."""
    stop = threading.Event()

    def merge() -> None:
        while not stop.is_set():
            ksmrs.merge(5)

    with Child(PEER) as peer:
        peer.line()
        ksmrs.tunables.sleep_millisecs = 0
        thread = threading.Thread(target=merge)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        peer.end_of_input()
        peer.end()


class Source:
    """Bytes to be had by a system call. `put` makes the piece at an offset available, `take` asks for it once."""

    def put(self, at: int) -> None:
        """Nothing, where the bytes stay."""

    def take(self, view: memoryview, at: int) -> int:
        raise NotImplementedError

    def after_a_failure(self, at: int, count: int) -> int:
        """Where to go on, `count` bytes having come: nothing of a stream is lost, nor of what can be read again."""
        return at + count

    def close(self) -> None:
        raise NotImplementedError


class File(Source):
    """`readinto` of an unbuffered file: its position is right whatever happened."""

    def __init__(self, folder: Path) -> None:
        path = folder / "content"
        CONTENT.tofile(path)
        self.file: Any = path.open("rb", buffering=0)

    def put(self, at: int) -> None:
        if at == 0:
            self.file.seek(0)

    def take(self, view: memoryview, at: int) -> int:
        assert self.file.tell() == at
        count: int = self.file.readinto(view)
        return count

    def close(self) -> None:
        self.file.close()


class BufferedFile(File):
    """`readinto` of a buffered file: how much came before a failure is not known, so the piece is read again."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.file.close()
        # A buffer smaller than a piece, so that what is asked for comes straight into the array.
        self.file = (folder / "content").open("rb", buffering=PAGE)

    def after_a_failure(self, at: int, count: int) -> int:
        self.file.seek(at)
        return at


class Preadv(File):
    """`os.preadv`, into two buffers at once."""

    def take(self, view: memoryview, at: int) -> int:
        half = len(view) // 2
        return os.preadv(self.file.fileno(), [view[:half], view[half:]], at)


class Pipe(Source):
    def __init__(self, _: Path) -> None:
        self.ends = os.pipe()
        self.reader = os.fdopen(self.ends[0], "rb", buffering=0)

    def put(self, at: int) -> None:
        assert os.write(self.ends[1], BYTES[at : at + PIECE]) == PIECE

    def take(self, view: memoryview, at: int) -> int:
        return self.reader.readinto(view) or 0

    def close(self) -> None:
        self.reader.close()
        os.close(self.ends[1])


class Stream(Source):
    """`recv_into` of a TCP connection, told to wait for all of it."""

    def __init__(self, _: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.ours = socket.create_connection(server.getsockname())
            self.theirs, _address = server.accept()

    def put(self, at: int) -> None:
        self.theirs.sendall(BYTES[at : at + PIECE])

    def take(self, view: memoryview, at: int) -> int:
        return self.ours.recv_into(view, 0, socket.MSG_WAITALL)

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


class Datagrams(Source):
    """`recv_into` of UDP: a datagram comes whole or is lost as a whole, so the sender must send it again."""

    def __init__(self, _: Path) -> None:
        self.ours, self.theirs = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self.ours.bind(("127.0.0.1", 0))
        self.theirs.connect(self.ours.getsockname())
        self.ours.settimeout(SECONDS)

    def put(self, at: int) -> None:
        self.theirs.send(BYTES[at : at + PIECE])
        assert select.select([self.ours], [], [], SECONDS)[0], "a datagram did not arrive"

    def take(self, view: memoryview, at: int) -> int:
        return self.ours.recv_into(view)

    def after_a_failure(self, at: int, count: int) -> int:
        assert count == 0, f"{count} bytes of a datagram of {PIECE}"
        assert not select.select([self.ours], [], [], 0)[0], "the datagram is still there"
        self.put(at)
        return at

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


SOURCES: dict[str, Callable[[Path], Source]] = {
    "file": File,
    "buffered file": BufferedFile,
    "preadv": Preadv,
    "pipe": Pipe,
    "stream": Stream,
    "datagrams": Datagrams,
}


def fill(source: Source, array: np.ndarray[Any, Any], pin: bool, counts: Counter[str]) -> None:
    """Read all of an array, piece by piece, going on after every failure; count the calls and the failures."""
    deadline = time.monotonic() + SECONDS
    for start in range(0, array.size, PIECE):
        source.put(start)
        piece = memoryview(array.data)[start : start + PIECE]
        at = start
        while at < start + PIECE:
            assert time.monotonic() < deadline, f"no end of failures: {counts}"
            counts["calls"] += 1
            wanted = piece[at - start :]
            try:
                with ksmrs.pinned(wanted) if pin else nullcontext():
                    count = source.take(wanted, at)
                assert 0 < count <= len(wanted), f"{count} bytes of {len(wanted)} at {at}, and no error"
            except OSError as refused:
                assert refused.errno == errno.EFAULT, refused
                count = 0
            if count == len(wanted):
                break
            counts["short" if count else "EFAULT"] += 1
            at = source.after_a_failure(at, count)


def read_under_merging(
    source: Source, array: np.ndarray[Any, Any], pin: bool, failures_wanted: int = 0
) -> Counter[str]:
    """Read an array again and again while its pages merge, until each merged four times over; every byte is compared."""
    counts: Counter[str] = Counter()
    before, copied = ksmrs.process_stats().merges, ksmrs.stats().cow_ksm
    deadline = time.monotonic() + SECONDS
    while True:
        # Else bytes that never came would not be noticed. The other pages are read over while they merge.
        array[counts["rounds"] % 8 * PAGE :: 8 * PAGE] ^= 0xFF
        fill(source, array, pin, counts)
        counts["rounds"] += 1
        wrong = np.flatnonzero(array != CONTENT)
        assert not wrong.size, f"byte {wrong[0]} of {array.size} is wrong, and {wrong.size - 1} others"
        counts["merges"] = ksmrs.process_stats().merges - before
        counts["breaks"] = ksmrs.stats().cow_ksm - copied
        enough = counts["rounds"] >= 10 and min(counts["merges"], counts["breaks"]) >= 4 * PAGES
        if enough and counts["EFAULT"] + counts["short"] >= failures_wanted:
            return counts
        assert time.monotonic() < deadline, f"too little happened within {SECONDS} s: {counts}"


def main() -> None:
    """Every source, bare and pinned; prints what was counted."""
    array = array_at_a_page()
    ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    result = {}
    with tempfile.TemporaryDirectory() as folder, merging_without_pause():
        for name, make in SOURCES.items():
            source = make(Path(folder))
            bare = read_under_merging(source, array, pin=False, failures_wanted=3)
            result[name] = {"bare": bare, "pinned": read_under_merging(source, array, pin=True)}
            source.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
