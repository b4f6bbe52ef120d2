"""`madvise` and `pinned`: opting ranges of memory in and out.

Buffers are looked at, never held: what they lie in is found by address among the regions that ksmrs made. Sizes are in
bytes here; the extension module turns them into whole pages.
"""

from __future__ import annotations

import errno
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ksmrs import _ksmrs
from ksmrs._errors import ArgumentError, SystemCallError

MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
"""The kernel's numbers, the same as in `mmap` where that has them."""


def madvise(buffer: Any, advice: int, start: int = 0, length: int | None = None) -> None:
    """Opt the whole pages within `length` bytes of `buffer` from byte `start` on in or out of merging.

    `MADV_MERGEABLE` opts in (regions are in at creation), `MADV_UNMERGEABLE` gives every page memory of its own before it
    returns and keeps it out; that needs no broker. Semantics of the arguments as in `mmap.madvise`: a start or length out
    of range is an `ArgumentError` (ValueError), a length beyond the end is clipped, an unknown advice is an OSError with
    EINVAL. No whole page in the range is an `ArgumentError`; the same advice again is a no-op.
    """
    if operator.index(advice) not in (MADV_MERGEABLE, MADV_UNMERGEABLE):
        raise SystemCallError(
            errno.EINVAL,
            f"{os.strerror(errno.EINVAL)}: advice {advice}; MADV_MERGEABLE is 12, MADV_UNMERGEABLE is 13",
        )
    address, nbytes = _extent(buffer)
    first = operator.index(start)
    if not 0 <= first < nbytes:
        raise ArgumentError(f"start {first} lies outside of a buffer of {nbytes} bytes")
    count = nbytes - first if length is None else operator.index(length)
    if count < 0:
        raise ArgumentError(f"length {count} is negative")
    _ksmrs.advise(address + first, min(count, nbytes - first), advice == MADV_MERGEABLE)


@contextmanager
def pinned(buffer: Any) -> Iterator[None]:
    """Inside, every page that `buffer` touches has memory of its own, writable, and is left alone.

    For system calls that write into merged shared memory (they fail with EFAULT where a plain write would not), for pages
    that the kernel or a device holds on to, for locks shared between processes. Pins count: the last one out lets go.
    """
    address, nbytes = _extent(buffer)
    pin = _ksmrs.pin(address, nbytes)
    try:
        yield
    finally:
        pin.release()


def _extent(buffer: Any) -> tuple[int, int]:
    """The address range that a buffer spans, whatever its layout."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(buffer, numpy.ndarray):
        return _ksmrs.extent(buffer)
    # Not through the buffer protocol, which knows neither datetime64 nor read-only views of writable memory.
    interface = buffer.__array_interface__
    low = high = interface["data"][0]
    for count, stride in zip(buffer.shape, buffer.strides, strict=True):
        if count == 0:
            return low, 0
        reach = (count - 1) * stride
        low, high = (low, high + reach) if reach > 0 else (low + reach, high)
    return low, high + buffer.itemsize - low
