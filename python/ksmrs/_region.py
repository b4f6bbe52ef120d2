"""Mergeable memory that ksmrs makes.

Relies on `_ksmrs.Region` for the memory, its buffer exports and its end; adds arrays, which need NumPy.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import math
import operator
import os
import weakref
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self

from ksmrs import _faulthandler, _ksmrs
from ksmrs._errors import ArgumentError, ClosedRegionError, DtypeError, NameExistsError, PinnedError, SystemCallError

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import DTypeLike

PAGE_SIZE: int = _ksmrs.PAGE_SIZE


_named: weakref.WeakSet[Region] = weakref.WeakSet()
"""Regions whose object others may look for after this process."""


@atexit.register
def _leave_named() -> None:
    for region in list(_named):
        # What has no room in its object now is written back by the broker.
        with contextlib.suppress(SystemCallError, PinnedError):
            region.leave()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionStats:
    """What the pages of one region are now, by this process's own page table; no broker is asked."""

    pages: int = 0
    """Pages of the region."""
    ksm_rmap_items: int = 0
    """Pages that show a frame or, as the last scan saw them, have memory; not those that were opted out."""
    ksm_merging_pages: int = 0
    """Pages that show a frame."""
    ksm_zero_pages: int = 0
    """Pages of zeros that need no memory."""
    pages_private: int = 0
    """Pages with memory of their own, or none yet, that take part in merging; merged and then written ones among them."""
    pages_held: int = 0
    """Pages that were opted out or are pinned."""
    pages_changing: int = 0
    """Pages that are about to merge, or to get memory of their own again."""
    ksm_profit: int = 0
    """Bytes that merged pages and pages of zeros do not take, less ksmrs's bytes for each of `ksm_rmap_items`. As in the
    kernel, a frame counts for nobody."""


_COUNTED_AS = {
    PageState.MERGED: "ksm_merging_pages",
    PageState.ZERO: "ksm_zero_pages",
    PageState.PRIVATE: "pages_private",
    PageState.BROKEN: "pages_private",
    PageState.DETACHED: "pages_private",
    PageState.HELD: "pages_held",
}


class Region(_ksmrs.Region):
    """`nbytes` bytes of zeroed, mergeable memory, 2 MiB-aligned, opted in at once.

    `shared=False` is private anonymous memory, as NumPy's own; `shared=True` is a memory object (memfd) whose space is
    reserved here; with a `name` ("/x") it is a new POSIX shared memory object, which other programs open by that name, which
    lives on after the region with all its bytes, and which ksmrs never unlinks (`posix_ipc.unlink_shared_memory` does). The
    region offers the buffer protocol (writable bytes). As a context manager it closes at the end.

    Raises `ArgumentError` (a ValueError) for an impossible size, `SystemCallError` (an OSError) with ENOMEM or ENOSPC where
    there is no room, and `NameExistsError` (a FileExistsError) where the name is taken.
    """

    name: str | None
    """Of the POSIX object that it is made of, if it has one."""

    def __new__(cls, nbytes: int, shared: bool = False, name: str | None = None) -> Self:
        """Make the memory; merging starts by itself."""
        count = operator.index(nbytes)
        if not 0 < count <= _ksmrs.MAX_NBYTES:
            raise ArgumentError(f"a region of {count} bytes: must be between 1 and {_ksmrs.MAX_NBYTES}")
        _faulthandler.install()
        made = super().__new__(cls, count, bool(shared)) if name is None else cls._named(count, name)
        made.name = name
        return made

    @classmethod
    def _named(cls, nbytes: int, name: str) -> Self:
        import posix_ipc  # noqa: PLC0415 (only for those who name regions)

        whole = -(-nbytes // PAGE_SIZE) * PAGE_SIZE
        try:
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=whole)
        except posix_ipc.ExistentialError:
            raise NameExistsError(errno.EEXIST, f"{os.strerror(errno.EEXIST)}: open it by its name", name) from None
        except (ValueError, OSError) as refused:
            raise ArgumentError(f"name {name!r}: {refused}") from None
        try:
            made = super().__new__(cls, nbytes, True, memory.fd)
        except BaseException:
            memory.close_fd()
            memory.unlink()
            raise
        # Its lease is taken on this descriptor; whoever closes it earlier gets a region that does not merge.
        weakref.finalize(made, memory.close_fd)
        _named.add(made)
        return made

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

    def stats(self) -> RegionStats:
        """Count the region's pages by what they are now; raises `ClosedRegionError` after `close`."""
        states = self.page_states()
        counts = dict.fromkeys([*_COUNTED_AS.values(), "pages_changing"], 0)
        for state in PageState:
            counts[_COUNTED_AS.get(state, "pages_changing")] += states.count(state)
        saved = counts["ksm_merging_pages"] + counts["ksm_zero_pages"]
        items = self.items()
        profit = saved * PAGE_SIZE - items * _ksmrs.METADATA_PER_PAGE
        return RegionStats(pages=len(states), ksm_rmap_items=items, ksm_profit=profit, **counts)

    def page_map(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the state of each page, a `PageState`, as a new array: uint8, one dimension, one element per page.

        Raises `ClosedRegionError` after `close`.
        """
        from ksmrs import _page_map  # noqa: PLC0415 (NumPy, as above)

        return _page_map.states(self)

    def page_map_image(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG in which each pixel is a page; see `ksmrs.page_map`, which draws several regions."""
        from ksmrs import _page_map  # noqa: PLC0415

        _page_map.page_map(path, self)

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
        name = f", named {self.name}" if self.name is not None else ""
        return f"<ksmrs.Region {self.nbytes} bytes, {kind}{name}{', closed' if self.closed else ''}>"
