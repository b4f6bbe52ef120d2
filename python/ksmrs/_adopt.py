"""Memory that the program made: what holds it while it takes part, and when it is let go.

Merging remaps addresses, so it may only touch memory that cannot be freed, moved or resized meanwhile. An ndarray that owns its
data is watched, through a weak reference and the function that NumPy frees data with, whichever comes first; everything else
(mmap, bytearray, bytes, what a memoryview looks at) is held by a buffer export and let go once only ksmrs refers to it. An
exception may come out of any line here (a signal's handler), so which ranges take part is known to the extension module alone.
Nothing here looks at page contents, and no client thread ever runs Python.
"""

from __future__ import annotations

import array as _array
import atexit
import contextlib
import gc
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from ksmrs import _faulthandler, _ksmrs
from ksmrs._errors import (
    ArgumentError,
    ClosedRegionError,
    ForeignMemoryError,
    PinnedError,
    SystemCallError,
    UnsupportedError,
)
from ksmrs._extent import extent, is_ctypes, is_ndarray, is_shared_memory, unwrapped

PAGE_SIZE: int = _ksmrs.PAGE_SIZE
MIN_BYTES = 64 * 1024
"""Smaller buffers save less than their bookkeeping costs."""

_PLAIN_TYPES = (bytes, bytearray, mmap.mmap, _array.array)
"""Their end shows their bytes to nobody, so these need not be copied back for it."""

_holds: dict[int, _Hold] = {}
"""By the id of what is held, which lives as long as the hold."""


class _Hold:
    """Something that memory belongs to, and the regions that were made of it."""

    def __init__(self, owner: Any) -> None:
        self.key = id(owner)
        self.holding = _ksmrs.Holding(self.key)
        self.is_out_of_phase = False
        self.opting_in = 0

    @property
    def regions(self) -> list[_ksmrs.Adopted]:
        """What takes part of it; what has ended is not among them."""
        return self.holding.regions()

    def give_back(self) -> None:
        for region in self.regions:
            region.give_back()

    def abandon(self) -> None:
        for region in self.regions:
            region.abandon()

    def let_go(self) -> None:
        """Stop holding; the regions have ended."""

    def is_forgotten(self) -> bool:
        """Whether only this refers to it."""
        return False

    def is_over(self) -> bool:
        """Whether nothing is held any more."""
        raise NotImplementedError


class _ArrayHold(_Hold):
    """An ndarray that owns its data: watched, not held; the weak reference also keeps it from being resized."""

    def __init__(self, owner: Any) -> None:
        super().__init__(owner)
        # An instance of a subclass can be seen again after the callback (a __del__ within a garbage collection), and references
        # to objects are released after it.
        unseen = type(owner) is sys.modules["numpy"].ndarray and _is_plain(owner.dtype)
        address = owner.__array_interface__["data"][0]
        self.owner: Any = self.holding.watch(owner, address, _holds, unseen)

    def let_go(self) -> None:
        self.owner = None

    def is_over(self) -> bool:
        return self.owner is None or self.owner() is None


class _ExportHold(_Hold):
    """An object with a buffer: an export keeps it from being closed or resized, and a weak reference an array."""

    def __init__(self, exporter: Any) -> None:
        super().__init__(exporter)
        self.view: memoryview | None = memoryview(exporter)
        self.against_resize = weakref.ref(exporter) if is_ndarray(exporter) else None

    def let_go(self) -> None:
        self.against_resize = None
        if self.view is not None:
            self.view.release()
            self.view = None

    def is_over(self) -> bool:
        return self.view is None

    def is_forgotten(self) -> bool:
        return self.view is not None and sys.getrefcount(self.view.obj) <= _HELD_BY_EXPORT_ALONE

    def leaves_bytes_to_nobody(self) -> bool:
        """Whether its memory may be freed as it is; asked of what nobody else refers to."""
        assert self.view is not None
        plain = type(self.view.obj) in _PLAIN_TYPES and weakref.getweakrefcount(self.view.obj) == 0
        return plain and not any(region.shared for region in self.regions)


def _references_of_an_export() -> int:
    view = memoryview(bytearray(1))
    return sys.getrefcount(view.obj)


_HELD_BY_EXPORT_ALONE = _references_of_an_export()


def _tells_before_it_frees(array: Any) -> bool:
    """Whether the memory of an array is freed by functions that are ksmrs's; a weak reference alone may come too late."""
    multiarray = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
    return multiarray.get_handler_name(array) in ("default_allocator", "ksmrs") and _ksmrs.replace_numpy_functions()


def _is_plain(dtype: Any) -> bool:
    """Whether elements are nothing but their bytes."""
    return dtype.kind in "biufcmMSUV" and not dtype.hasobject


def collect() -> None:
    """Let go of whatever only ksmrs refers to any more."""
    # Not of items, for to make those may begin a collection, in which arrays end that are in the dictionary.
    for hold in list(_holds.values()):
        if hold.is_over():
            _forget(hold)
        elif isinstance(hold, _ExportHold) and hold.is_forgotten() and _holds.pop(hold.key, None) is hold:
            try:
                if hold.leaves_bytes_to_nobody():
                    hold.abandon()
                else:
                    hold.give_back()
            except (SystemCallError, PinnedError):
                # No room for its bytes now, or somebody at them: it is held on to until that is over.
                _holds[hold.key] = hold
                continue
            hold.let_go()


class _Process:
    """What of this process opting in and out depends on."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ending = False
        self.installed = False


_process = _Process()


def _at_exit() -> None:
    _process.ending = True
    for hold in list(_holds.values()):
        for region in hold.regions:
            if region.shared:
                # Others may find its object. What has no room here is written back by the broker.
                with contextlib.suppress(SystemCallError, PinnedError):
                    region.give_back()
            region.retire()


def _begin_anew() -> None:
    _process.ending = False


def _install() -> None:
    _faulthandler.install()
    _leave_before_sending()
    if not _process.installed:
        atexit.register(_at_exit)
        # Nobody is in the midst of opting in or out as the process forks.
        lock = _process.lock
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
        os.register_at_fork(after_in_child=_begin_anew)
        gc.callbacks.append(_ksmrs.AfterCollection(_holds, collect))
        _process.installed = True


def adopt(buffer: Any, address: int, nbytes: int, min_bytes: int, exclusive: bool) -> None:
    """Opt in the whole pages of a range of `buffer`: in place where no region has them yet, else again."""
    with _process.lock:
        collect()
        touching = _ksmrs.regions_touching(address, nbytes)
        if len(touching) == 1 and touching[0][0] <= address and address + nbytes <= touching[0][0] + touching[0][1]:
            _ksmrs.advise(address, nbytes, True)
            return
        for start, length, holder in touching:
            if holder is None and (address < start or address + nbytes > start + length):
                raise ArgumentError(
                    f"the {nbytes} bytes at {address:#x} reach beyond a region of ksmrs's own, {length} bytes at {start:#x}"
                )
        owner, kind = _owner_of(buffer, address, nbytes)
        pages = _whole_pages(address, nbytes)
        if pages is None:
            raise _no_whole_page(address, nbytes)
        if nbytes < min_bytes:
            raise ArgumentError(
                f"{nbytes} bytes are less than min_bytes, {min_bytes}: so little costs more than it saves"
            )
        if _process.ending:
            raise UnsupportedError("the interpreter is ending: nothing is opted in any more")
        _install()
        hold = _held(owner, kind)
        try:
            # It may have been resized before it was held.
            _belongs(owner, address, nbytes)
            if is_shared_memory(buffer):
                _leave_before_close(buffer, hold.key)
            before = len(hold.regions)
            try:
                for start, end in _gaps(*pages, touching):
                    hold.holding.adopt(start, end - start, exclusive)
            except BaseException:
                for region in hold.regions[before:]:
                    region.give_back()
                raise
        finally:
            hold.opting_in -= 1
            _let_go_if_out(hold)
        if address % PAGE_SIZE:
            hold.is_out_of_phase = True
        for start, length, _ in touching:
            low, high = max(start, pages[0]), min(start + length, pages[1])
            if low < high:
                _ksmrs.advise(low, high - low, True)


def unadvise(address: int, nbytes: int) -> None:
    """Opt the whole pages of a range out; what was adopted and is out as a whole becomes what it was."""
    with _process.lock:
        touching = _ksmrs.regions_touching(address, nbytes)
        if not touching and _whole_pages(address, nbytes) is None:
            raise _no_whole_page(address, nbytes)
        if len(touching) == 1 and touching[0][2] is None:
            _ksmrs.advise(address, nbytes, False)
            return
        for start, length, holder in touching:
            part = _whole_pages(max(address, start), min(address + nbytes, start + length) - max(address, start))
            if part is None:
                continue
            if part != (start, start + length):
                _ksmrs.advise(part[0], part[1] - part[0], False)
            if holder is not None:
                try:
                    _give_back(holder, start, whole=part == (start, start + length))
                except PinnedError:
                    # Out at once, and as it was when the last pin ends.
                    _ksmrs.advise(part[0], part[1] - part[0], False)
        for hold in list(_holds.values()):
            # Not only what was opted out now: whoever did may have been interrupted before it was let go.
            _let_go_if_out(hold)
        collect()


def unpinned(address: int, nbytes: int) -> None:
    """Let what was opted out as a whole while it was pinned become what it was."""
    with _process.lock:
        for start, _, holder in _ksmrs.regions_touching(address, nbytes):
            if holder is not None:
                # Other pins may go on, or there is no room now: it stays out, and its owner may opt it out again.
                with contextlib.suppress(PinnedError, SystemCallError):
                    _give_back(holder, start, whole=False)


def _leave_before_close(memory: Any, key: int) -> None:
    """Make the `close` of a `SharedMemory` let go of its mapping first, which could not be closed while it is held."""
    if "close" in vars(memory):
        return
    reference = weakref.ref(memory)

    def close() -> None:
        closing = reference()
        if closing is not None:
            # Once it is closed the number may be another's.
            if closing.buf is not None:
                _give_back_all(lambda hold: hold.key == key)
            type(closing).close(closing)

    memory.close = close


def _leave_before_sending() -> None:
    """Opt arrays of `multiprocessing` out before the descriptor of their memory is sent to another process."""
    heap, reduction = sys.modules.get("multiprocessing.heap"), sys.modules.get("multiprocessing.reduction")
    if heap is None or reduction is None or not hasattr(heap, "reduce_arena"):
        return

    def reduce_arena(arena: Any) -> Any:
        low, length = extent(arena.buffer)
        _give_back_all(lambda hold: any(low <= region.address < low + length for region in hold.regions))
        return heap.reduce_arena(arena)

    reduction.register(heap.Arena, reduce_arena)


def _give_back_all(chosen: Callable[[_Hold], bool]) -> None:
    """End the regions of all holds that are chosen."""
    with _process.lock:
        for hold in list(_holds.values()):
            if chosen(hold):
                hold.give_back()
                _let_go_if_out(hold)


def _give_back(holder: int, address: int, whole: bool) -> None:
    """End the region at this address, if it is to end as a whole or no page of it takes part any more."""
    hold = _holds.get(holder)
    if hold is None:
        return
    for region in hold.regions:
        if region.address == address and (whole or region.unadvised):
            region.give_back()
            break
    _let_go_if_out(hold)


def _let_go_if_out(hold: _Hold) -> None:
    """Stop holding what has no regions any more."""
    if not hold.holding.is_open and not hold.opting_in:
        _forget(hold)
        hold.let_go()


def _forget(hold: _Hold) -> None:
    """Take it out of the holds, where it is not another's place by now."""
    if _holds.get(hold.key) is hold:
        del _holds[hold.key]


def _whole_pages(address: int, nbytes: int) -> tuple[int, int] | None:
    """First byte of the first whole page of a range, and the byte after its last one."""
    first, end = -(-address // PAGE_SIZE) * PAGE_SIZE, (address + nbytes) // PAGE_SIZE * PAGE_SIZE
    return (first, end) if first < end else None


def _no_whole_page(address: int, nbytes: int) -> ArgumentError:
    return ArgumentError(f"no whole page of {PAGE_SIZE} bytes lies in the {nbytes} bytes at {address:#x}")


def _gaps(first: int, end: int, touching: list[tuple[int, int, int | None]]) -> list[tuple[int, int]]:
    gaps = []
    for start, length, _ in touching:
        if first < start:
            gaps.append((first, start))
        first = max(first, start + length)
    if first < end:
        gaps.append((first, end))
    return gaps


def _owner_of(buffer: Any, address: int, nbytes: int) -> tuple[Any, type[_Hold]]:
    """What the memory of a buffer belongs to, and how that is held."""
    owner, viewed = buffer, None
    while owner is not viewed:
        viewed = owner
        if is_ndarray(owner):
            while is_ndarray(owner.base) or _is_stride_trick(owner.base):
                owner = owner.base if is_ndarray(owner.base) else owner.base.base
            if owner.flags.owndata:
                if owner.flags.writebackifcopy:
                    raise ForeignMemoryError(
                        "the array is a copy that is written back when it ends: opt the original in"
                    )
                _belongs(owner, address, nbytes)
                return owner, _ArrayHold if _tells_before_it_frees(owner) else _ExportHold
            owner = owner.base
            if owner is None:
                raise ForeignMemoryError(
                    "the array does not say what its memory belongs to, so it cannot be held: copy it with ksmrs.array()"
                )
        owner = _exporter(unwrapped(owner))
    if not _has_memory(owner):
        raise ForeignMemoryError(
            f"the memory does not belong to the {type(owner).__name__} that points at it, so it cannot be held: copy it with "
            "ksmrs.array()"
        )
    if isinstance(owner, _ksmrs.Region) and owner.closed:
        raise ClosedRegionError("the region was closed: make a new one")
    _belongs(owner, address, nbytes)
    return owner, _ExportHold


def _exporter(buffer: Any) -> Any:
    """What a view of this looks at: itself, or what it passes on (`memoryview`, `PickleBuffer`, `from_buffer` of ctypes)."""
    if is_ctypes(buffer):
        view = _view_below(buffer)
        below = view.obj if view is not None else None
        return below if is_ndarray(below) or is_ctypes(below) else buffer
    try:
        return memoryview(buffer).obj
    except (TypeError, BufferError):
        return buffer


def _root(owner: Any) -> Any:
    """The object of ctypes that one is a part of."""
    while is_ctypes(owner._b_base_):
        owner = owner._b_base_
    return owner


def _view_below(owner: Any) -> memoryview | None:
    """What an object of ctypes that `from_buffer` made keeps of the buffer."""
    kept = _root(owner)._objects
    view = kept.get("ffffffff") if isinstance(kept, dict) else None
    return view if isinstance(view, memoryview) else None


def _has_memory(owner: Any) -> bool:
    """Whether this is no object of ctypes over memory that is somebody else's (`from_address`, what a pointer points at)."""
    if not is_ctypes(owner):
        return True
    root = _root(owner)
    return root._b_base_ is None and bool(root._b_needsfree_ or _view_below(owner) is not None)


def _is_stride_trick(base: Any) -> bool:
    """What NumPy puts between the result of `as_strided` or `sliding_window_view` and the array it looks at."""
    return type(base).__name__ == "DummyArray" and type(base).__module__.startswith("numpy.lib.")


def _belongs(owner: Any, address: int, nbytes: int) -> None:
    """Raise unless the range lies in the owner's memory: a view with made-up strides may reach anywhere."""
    kind = type(owner).__name__
    try:
        low, length = extent(owner)
    except (TypeError, BufferError) as refused:
        raise ForeignMemoryError(
            f"the memory belongs to a {kind}, which cannot be held ({refused}): copy it with ksmrs.array()"
        ) from None
    if not low <= address <= address + nbytes <= low + length:
        raise ForeignMemoryError(
            f"the {nbytes} bytes at {address:#x} are not among the {length} bytes at {low:#x} of the {kind} they belong to"
        )


def _held(owner: Any, kind: type[_Hold]) -> _Hold:
    """What holds it, until `opting_in` is counted down again."""
    while True:
        hold = _holds.get(id(owner))
        if hold is None or hold.is_over():
            hold = kind(owner)
        hold.opting_in += 1
        # Whoever came in between may have let it go.
        if not hold.is_over():
            _holds[hold.key] = hold
            return hold


def bytes_now() -> tuple[int, int]:
    """Bytes of adopted memory, and how many of them belong to buffers that begin within a page."""
    sizes = [(sum(region.nbytes for region in hold.regions), hold.is_out_of_phase) for hold in list(_holds.values())]
    return sum(nbytes for nbytes, _ in sizes), sum(nbytes for nbytes, is_out in sizes if is_out)
