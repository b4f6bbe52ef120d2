"""Mergeable memory that ksmrs makes.

Relies on `_ksmrs.Region` for the memory, its buffer exports and its end; adds arrays, which need NumPy.
"""

from __future__ import annotations

import math
import operator
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self

from ksmrs import _faulthandler, _ksmrs
from ksmrs._errors import ArgumentError, ClosedRegionError, DtypeError

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import DTypeLike

PAGE_SIZE: int = _ksmrs.PAGE_SIZE


class PageState(IntEnum):
    """The state of one page, as in the bytes that `Region.page_states()` returns."""

    PRIVATE = 0
    FREEZING = 1
    FROZEN = 2
    COMMITTING = 3
    MERGED = 4
    ZERO = 5
    BREAKING = 6
    HOMED = 7
    BROKEN = 8
    DETACHED = 9
    HELD = 10
    LEAVING = 11


class Region(_ksmrs.Region):
    """`nbytes` bytes of zeroed, mergeable memory, 2 MiB-aligned, opted in at once.

    `shared=False` is private anonymous memory, as NumPy's own; `shared=True` is a memory object (memfd) whose space is
    reserved here. The region offers the buffer protocol (writable bytes). As a context manager it closes at the end.

    Raises `ArgumentError` (a ValueError) for an impossible size and `SystemCallError` (an OSError) with ENOMEM or ENOSPC
    where there is no room.
    """

    def __new__(cls, nbytes: int, shared: bool = False) -> Self:
        """Make the memory; merging starts by itself."""
        count = operator.index(nbytes)
        if not 0 < count <= _ksmrs.MAX_NBYTES:
            raise ArgumentError(f"a region of {count} bytes: must be between 1 and {_ksmrs.MAX_NBYTES}")
        _faulthandler.install()
        return super().__new__(cls, count, bool(shared))

    def array(self, dtype: DTypeLike, shape: int | tuple[int, ...], offset: int = 0) -> np.ndarray[Any, Any]:
        """Return an ndarray over the region's bytes from `offset` on; it keeps the region's memory alive.

        Raises `ArgumentError` where it would not fit, `DtypeError` for dtypes that hold Python objects.
        """
        import numpy as np  # noqa: PLC0415 (see the package's first paragraph)

        if self.closed:
            raise ClosedRegionError("the region was closed: make a new one")
        element = np.dtype(dtype)
        if element.hasobject:
            raise DtypeError(f"dtype {element} holds Python objects, whose addresses mean nothing to another process")
        axes = (operator.index(shape),) if not isinstance(shape, tuple | list) else tuple(map(operator.index, shape))
        first = operator.index(offset)
        if min(axes, default=0) < 0:
            raise ArgumentError(f"shape {axes}: no axis can be negative")
        nbytes = math.prod(axes) * element.itemsize
        if first < 0 or first + nbytes > self.nbytes:
            raise ArgumentError(f"{nbytes} bytes at offset {first} do not fit in a region of {self.nbytes} bytes")
        # Through a memoryview, which counts as an export: np.ndarray(buffer=...) would take none.
        view = memoryview(self)[first : first + nbytes]
        return np.frombuffer(view, np.uint8).view(element).reshape(axes) if nbytes else np.empty(axes, element)

    def close(self) -> None:
        """Unmerge everything and take the memory out of ksmrs; closing again does nothing.

        Arrays and views stay valid and keep their contents: memory is only unmapped once nobody can see it.
        """
        self.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "shared" if self.shared else "private"
        return f"<ksmrs.Region {self.nbytes} bytes, {kind}{', closed' if self.closed else ''}>"
