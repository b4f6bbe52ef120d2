"""`madvise` and `pinned`: opting ranges of memory in and out.

Where a buffer lies is found out here, in bytes; what holds memory that the program made is `_adopt`'s business, and the
extension module knows the regions by their addresses.
"""

from __future__ import annotations

import errno
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ksmrs import _adopt, _ksmrs
from ksmrs._errors import ArgumentError, SystemCallError
from ksmrs._extent import extent

MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
"""The kernel's numbers, the same as in `mmap` where that has them."""


def madvise(
    buffer: Any,
    advice: int,
    start: int = 0,
    length: int | None = None,
    *,
    min_bytes: int = _adopt.MIN_BYTES,
    exclusive: bool = False,
) -> int:
    """Opt the whole pages within `length` bytes of `buffer` from byte `start` on in or out of merging, in place.

    `MADV_MERGEABLE` opts in: memory that the program made (an ndarray however it came about, `mmap`, `bytearray`, `bytes`,
    `SharedMemory`, `multiprocessing.Array`, views of these) and memory of a `Region` that was opted out before. No address
    changes and views stay valid.
    While its pages take part an array cannot be resized and a `bytearray` or `mmap` neither resized nor closed
    (`BufferError`); memory that is dropped leaves by itself. `MADV_UNMERGEABLE` gives every page memory of its own before it
    returns and keeps it out; memory that is out as a whole is again as its owner made it. That needs no broker.

    Shared memory merges while this process is the only one that has it. A named object is guarded by a write lease: whoever
    opens it waits until all its bytes are in it, and merging ends until it is closed again. `process_stats().not_merging` says
    what does not merge, and why. Before its descriptor is given to another process, mapped again, or read or written through,
    opt it out. A memfd merges only if `exclusive` says that nobody else has a descriptor of it.

    Pages merge only with pages of equal bytes, so equal data must begin at equal offsets within a page: returns that offset of
    the buffer's first byte, its *phase* (0 for `ksmrs.array`, 16 for large arrays of NumPy's own).

    Semantics of the arguments as in `mmap.madvise`: a start or length out of range is an `ArgumentError` (ValueError), a
    length beyond the end is clipped, an unknown advice is an OSError with EINVAL. No whole page in the range, or fewer than
    `min_bytes` bytes opted in, is an `ArgumentError`; the same advice again is a no-op. Memory that cannot take part (a mapped
    file, hugetlb, locked, not writable, ...) is a `ForeignMemoryError` (BufferError) that says why; nothing is changed then.
    """
    if operator.index(advice) not in (MADV_MERGEABLE, MADV_UNMERGEABLE):
        raise SystemCallError(
            errno.EINVAL,
            f"{os.strerror(errno.EINVAL)}: advice {advice}; MADV_MERGEABLE is 12, MADV_UNMERGEABLE is 13",
        )
    address, nbytes = extent(buffer)
    first = operator.index(start)
    if not 0 <= first < nbytes:
        raise ArgumentError(f"start {first} lies outside of a buffer of {nbytes} bytes")
    count = nbytes - first if length is None else operator.index(length)
    if count < 0:
        raise ArgumentError(f"length {count} is negative")
    count = min(count, nbytes - first)
    if advice == MADV_MERGEABLE:
        _adopt.adopt(buffer, address + first, count, operator.index(min_bytes), bool(exclusive))
    else:
        _adopt.unadvise(address + first, count)
    return address % _adopt.PAGE_SIZE


@contextmanager
def pinned(buffer: Any) -> Iterator[None]:
    """Inside, every page that `buffer` touches has memory of its own, writable, and is left alone.

    For system calls that write into merged shared memory (they fail with EFAULT where a plain write would not), for pages
    that the kernel or a device holds on to, for locks shared between processes. Pins count: the last one out lets go. Memory
    that takes no part needs none of it, and is left as it is. Pinned pages are not moved: memory that the program made and opts
    out inside is its own again when the last pin ends, and to close a region, or a `SharedMemory`, raises `PinnedError`.
    """
    address, nbytes = extent(buffer)
    pins = []
    try:
        for start, length, _ in _ksmrs.regions_touching(address, nbytes):
            low, high = max(address, start), min(address + nbytes, start + length)
            pins.append(_ksmrs.pin(low, high - low))
        yield
    finally:
        for pin in pins:
            pin.release()
        if pins:
            _adopt.unpinned(address, nbytes)
