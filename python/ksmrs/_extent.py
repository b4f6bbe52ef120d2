"""Where a buffer lies: the range of addresses from its lowest byte to its highest, whatever its layout.

Relies on `_ksmrs.extent` for objects with a buffer and on NumPy's own description of ndarrays, if NumPy is loaded. Never holds
anything and never imports NumPy.
"""

from __future__ import annotations

import sys
from typing import Any

from ksmrs import _ksmrs
from ksmrs._errors import ClosedRegionError


def unwrapped(buffer: Any) -> Any:
    """The buffer of what only has one: `SharedMemory`, and the arrays of `multiprocessing` with their locks."""
    if hasattr(buffer, "get_obj"):
        return buffer.get_obj()
    if not is_shared_memory(buffer):
        return buffer
    if buffer.buf is None:
        raise ClosedRegionError("the SharedMemory was closed")
    return buffer.buf


def is_a(buffer: Any, module: str, *names: str) -> bool:
    """Whether this is of a class of a module, which nothing is before it is loaded; another thread may be just loading it."""
    classes = (getattr(sys.modules.get(module), name, None) for name in names)
    return isinstance(buffer, tuple(found for found in classes if found is not None))


def is_ndarray(buffer: Any) -> bool:
    """Whether this is a NumPy array."""
    return is_a(buffer, "numpy", "ndarray")


def is_shared_memory(buffer: Any) -> bool:
    """Whether this is a `SharedMemory` of `multiprocessing`."""
    return is_a(buffer, "multiprocessing.shared_memory", "SharedMemory")


def is_ctypes(buffer: Any) -> bool:
    """Whether this is an object of ctypes that has, or points at, more than a simple value."""
    return is_a(buffer, "_ctypes", "Array", "Structure", "Union")


def extent(buffer: Any) -> tuple[int, int]:
    """First address and number of bytes."""
    buffer = unwrapped(buffer)
    if is_ctypes(buffer):
        # Their buffers do not tell strides.
        _ctypes = sys.modules["_ctypes"]
        return _ctypes.addressof(buffer), _ctypes.sizeof(buffer)
    if not is_ndarray(buffer):
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
