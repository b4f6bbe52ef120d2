"""The child process in which `ksmrs doctor` tries whether memory merges here: `python -m ksmrs._trial`.

Merges a few pages of private and of shared memory with a broker inside this process, writes to one, asks for a huge page, and
prints what came of it as one JSON object. Leaves nothing behind; touches no other broker.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

import ksmrs

PAGES = 64
"""Of each kind, in two regions; few enough to be no burden, more than a window of one system call."""
SECONDS = 20
MADV_COLLAPSE = 25
HUGE = 2 << 20


def _merged(region: ksmrs.Region) -> int:
    return region.stats().ksm_merging_pages


def _merge(shared: bool) -> tuple[int, bool]:
    """Pages of the two regions' fewer that merged, and whether a write then stayed in one of them."""
    contents = os.urandom(PAGES * ksmrs.PAGE_SIZE)
    with ExitStack() as ends:
        one, other = (ends.enter_context(ksmrs.Region(len(contents), shared=shared)) for _ in range(2))
        for region in (one, other):
            memoryview(region)[:] = contents
        deadline = time.monotonic() + SECONDS
        while min(_merged(one), _merged(other)) < PAGES and time.monotonic() < deadline:
            ksmrs.merge(timeout=1)
        pages = min(_merged(one), _merged(other))
        memoryview(one)[0] ^= 0xFF
        changed = bytes([contents[0] ^ 0xFF]) + contents[1:]
        return pages, bytes(memoryview(one)) == changed and bytes(memoryview(other)) == contents


def _dirty_tracking() -> str:
    """What it is once the thread that owns it has begun."""
    deadline = time.monotonic() + SECONDS
    while (state := ksmrs.process_stats().dirty_tracking) in {"off: not connected", "off: no region yet"}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    return state


def _collapse() -> str:
    """Whether 2 MiB of a memory object become a huge page on request, as extents of the frame store do."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with ksmrs.Region(HUGE, shared=True) as region, ksmrs.pinned(region):
        memoryview(region)[:] = b"\1" * HUGE
        if madvise(region.address, HUGE, MADV_COLLAPSE) == 0:
            return "ok"
        number = ctypes.get_errno()
        return f"{errno.errorcode.get(number, number)} ({os.strerror(number)})"


def run() -> dict[str, Any]:
    """Try it."""
    try:
        ksmrs.connect(embedded=True)
        private, private_apart = _merge(shared=False)
        shared, shared_apart = _merge(shared=True)
        return {
            "pages": PAGES,
            "seconds": SECONDS,
            "private": private,
            "shared": shared,
            "apart": private_apart and shared_apart,
            "dirty_tracking": _dirty_tracking(),
            "collapse": _collapse(),
        }
    except (ksmrs.KsmrsError, OSError) as refused:
        return {"error": str(refused)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run()) + "\n")
