"""The limit of mappings (`vm.max_map_count`), as a program meets it that has too many of its own.

While all are taken nothing can be mapped or split in this process: have ready what the test needs, NumPy's memory included.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from pathlib import Path

PAGE = 4096
MAP_NORESERVE = 0x4000
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@functools.cache
def _reserved() -> tuple[int, int]:
    """Addresses of more pages than twice the limit, without memory; their begin and their bytes."""
    nbytes = (int(Path("/proc/sys/vm/max_map_count").read_text()) + 1000) * 2 * PAGE
    begin = _libc.mmap(None, nbytes, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    assert begin != ctypes.c_void_p(-1).value
    return begin, nbytes


def take_all_mappings() -> None:
    """Split the reservation until the kernel refuses."""
    begin, nbytes = _reserved()
    for page in range(begin, begin + nbytes, 2 * PAGE):
        if _libc.mprotect(page, PAGE, mmap.PROT_READ):
            return
    raise AssertionError("the kernel has no limit of mappings")


def give_mappings_back() -> None:
    """Have the reservation be one mapping again."""
    assert _libc.mprotect(*_reserved(), PROT_NONE) == 0
