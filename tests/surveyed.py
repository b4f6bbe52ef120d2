"""Memory of children whose every page is known, for the tests of `ksmrs survey`.

Each child holds it in one mapping much larger than any of an interpreter's own, so that `min_bytes` leaves nothing else to be
counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ksmrs
from children import Child

PAGE = 4096
MIB = 1 << 20
LEAST = 256 * MIB
"""No mapping of an interpreter without NumPy is as large."""
ROOT = os.geteuid() == 0

HOLDS = f"""
import ctypes, mmap, os, random, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
PAGE = {PAGE}
PRIVATE, SHARED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
class Room:
    # A mapping of its own, without huge pages: these would bring pages that nobody wrote.
    def __init__(self, flags=PRIVATE, size={LEAST}):
        self.memory = mmap.mmap(-1, size, flags=flags)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        assert libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(size), 15) == 0
        self.used = 0
    def put(self, data):
        self.memory[self.used : self.used + len(data)] = data
        self.used += len(data)
    def zeros(self, pages):
        # Written, so that they have memory of their own.
        self.put(b"x" * pages * PAGE)
        self.used -= pages * PAGE
        self.put(bytes(pages * PAGE))
def noise(seed, pages):
    return random.Random(seed).randbytes(pages * PAGE)
def wait():
    print("ready", flush=True)
    return sys.stdin.readline()
"""
"""What a child's memory is made with: pages are alike only where their seeds are."""


@contextmanager
def holding(*programs: str) -> Iterator[list[Child]]:
    """Children that made memory and wait to be told to end."""
    with ExitStack() as stack:
        held = [stack.enter_context(Child(HOLDS + program + "\nwait()", prelude=False)) for program in programs]
        for child in held:
            assert child.line() == "ready"
        yield held
        for child in held:
            child.tell()
            child.end()


def look(*children: Child, **options: Any) -> ksmrs.Survey:
    return ksmrs.survey([child.pid for child in children], **{"settle": 0, "cpu": 1.0, "min_bytes": LEAST, **options})


KNOWN = """
room = Room({flags})
room.put(noise(1, 100))
room.put(noise(2, 1) * 50)
room.zeros(40)
room.put(noise({seed}, 110))
"""
"""300 pages: 100 contents that another has too, 50 times one content, 40 of zeros, 110 of nobody else's."""
