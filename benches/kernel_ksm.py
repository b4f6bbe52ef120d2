"""Kernel Samepage Merging as the rival: its knobs, its counters, its CPU time. No scenario of its own.

Relies on root and /sys/kernel/mm/ksm. Every knob that is turned is put back, whatever happens.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PAGE = 4096
KSM = Path("/sys/kernel/mm/ksm")
KNOBS = (
    "run",
    "pages_to_scan",
    "sleep_millisecs",
    "smart_scan",
    "advisor_mode",
    "use_zero_pages",
    "max_page_sharing",
)
MADV_MERGEABLE = 12


def opt_in(array: np.ndarray[Any, Any]) -> None:
    """Give the whole pages of an array to the kernel's KSM."""
    first = -(-array.ctypes.data // PAGE) * PAGE
    end = (array.ctypes.data + array.nbytes) // PAGE * PAGE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_MERGEABLE):
        raise OSError(ctypes.get_errno(), "madvise(MADV_MERGEABLE)")


def unavailable() -> str | None:
    """Why the kernel's KSM cannot run here, or None."""
    if not KSM.is_dir():
        return "this kernel has no /sys/kernel/mm/ksm"
    if os.geteuid() != 0 or not os.access(KSM / "run", os.W_OK):
        return "turning kernel KSM on needs root"
    if counter("pages_shared") or counter("pages_sharing"):
        return "somebody else's pages are merged by kernel KSM"
    return None


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


def _chosen(text: str) -> str:
    """The value of a knob; of those that list their choices, the one in brackets."""
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()


@contextmanager
def tuned_to_the_maximum() -> Iterator[None]:
    """Turn KSM to its fastest, and put everything back as it was; what was merged is unmerged."""
    before = {name: _chosen((KSM / name).read_text()) for name in KNOBS if (KSM / name).exists()}
    fastest = {
        "advisor_mode": "none",
        "smart_scan": "0",
        "sleep_millisecs": "0",
        "pages_to_scan": "100000",
        "use_zero_pages": "0",
        "run": "1",
    }
    try:
        for name, value in fastest.items():
            if name in before:
                (KSM / name).write_text(value)
        yield
    finally:
        (KSM / "run").write_text("2")
        for name in reversed(KNOBS):
            if name in before:
                # Refused while the advisor is on, or while pages are shared: then it was not changed either.
                try:
                    (KSM / name).write_text(before[name])
                except OSError:
                    continue
