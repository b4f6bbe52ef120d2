"""`merge_process`: the arrays of a whole program, through NumPy's allocator.

Relies on `_ksmrs` for the memory and for the functions that NumPy calls. Decides whom they reach: every thread, where the
functions behind NumPy's default handler can be replaced, which a new thread is asked about each time; else this context and
threads that are started from now on. NumPy is imported by `merge_process`, never by a program that only has the variable
set: there its import is waited for.
"""

from __future__ import annotations

import logging
import operator
import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ksmrs import _faulthandler, _ksmrs
from ksmrs._errors import ArgumentError, KsmrsError, UnsupportedError

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

VARIABLE = "KSMRS_MERGE_PROCESS"
"""Set to 1, it opts in every Python program started with it."""
SIZE_VARIABLE = "KSMRS_MERGE_PROCESS_MIN_SIZE"
MIN_SIZE = 64 * 1024
"""Smaller arrays save less than their pages cost: they share none, and begin anywhere."""

EVERY_THREAD = "every thread"

_log = logging.getLogger("ksmrs")


class _State:
    """What this process has done to NumPy."""

    reaches = "off"
    """As `process_stats().numpy_allocator` has it."""
    start_thread: Any = None
    """`threading.Thread.start` as it was, where threads are given the handler."""


def merge_process(on: bool = True, *, min_size: int | None = None) -> None:
    """Have every NumPy array of at least `min_size` bytes (default: 65536) that is made from now on live in mergeable memory.

    The counterpart of `prctl(PR_SET_MEMORY_MERGE)`: nothing else of the program changes. Arrays own their data as ever,
    begin on a page, so that equal ones have equal pages, and take part once they outlive the pass in which they were made.
    All threads are reached where NumPy's own functions can be replaced (`process_stats().numpy_allocator` says `every
    thread`), and children by fork. `False` lets new arrays be NumPy's own again and gives those that are merged memory of
    their own.

    Raises `ArgumentError` (a ValueError) for a size below a page, `UnsupportedError` where NumPy does not have it, and
    `SystemCallError` (an OSError) with ENOMEM where there is no memory, for `False` with some of it still merged.
    """
    size = _size(min_size)
    if not on:
        _ksmrs.end_heap()
        _State.reaches = "off"
        return
    import numpy as np  # noqa: PLC0415 (see the package's first paragraph)

    _faulthandler.install()
    try:
        replaced = _ksmrs.replace_numpy_functions()
        _ksmrs.begin_heap(size)
        if replaced and _new_thread_is_reached(np, size):
            _State.reaches = EVERY_THREAD
            return
        _reach_contexts()
    except RuntimeError as refused:
        raise UnsupportedError(str(refused)) from None
    _State.reaches = "the context of merge_process and threads started since"
    _log.warning("merge_process reaches only %s: NumPy's own functions cannot be replaced here", _State.reaches)


def _size(min_size: int | None) -> int:
    size = MIN_SIZE if min_size is None else operator.index(min_size)
    if size < _ksmrs.PAGE_SIZE:
        raise ArgumentError(f"min_size {size}: at least a page, {_ksmrs.PAGE_SIZE} bytes")
    return size


def reaches() -> str:
    """Say whose arrays are in mergeable memory."""
    return _State.reaches


def _new_thread_is_reached(np: ModuleType, size: int) -> bool:
    """Ask a thread, whose context knows nothing of this one's."""
    seen: list[bool] = []

    def look() -> None:
        array = np.empty(size, np.uint8)
        seen.append(_ksmrs.is_lent(array.__array_interface__["data"][0]))

    thread = threading.Thread(target=look, name="ksmrs-look")
    thread.start()
    thread.join()
    return seen == [True]


def _reach_contexts() -> None:
    """Set a handler of our own here, and first thing in every thread that is started from now on."""
    _ksmrs.set_numpy_handler()
    if _State.start_thread is not None:
        return
    _State.start_thread = start_thread = threading.Thread.start

    def start(self: threading.Thread) -> None:
        run = self.run

        def run_with_handler() -> None:
            # Of the instance, which else would be kept alive by itself.
            vars(self).pop("run", None)
            _ksmrs.set_numpy_handler()
            run()

        self.run = run_with_handler  # type: ignore[method-assign]
        start_thread(self)

    threading.Thread.start = start  # type: ignore[method-assign]


def worker_init() -> None:
    """Opt in a worker process, with the environment's `KSMRS_MERGE_PROCESS_MIN_SIZE`: an `initializer` for pools of any kind.

    `ProcessPoolExecutor(initializer=ksmrs.worker_init)`, `multiprocessing.Pool`, joblib's loky, Ray's
    `worker_process_setup_hook`, or `client.run(ksmrs.worker_init)` with Dask.
    """
    merge_process(True, min_size=_wanted_size())


def _wanted_size() -> int | None:
    text = os.environ.get(SIZE_VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ArgumentError(f"{SIZE_VARIABLE}={text!r}: a number of bytes is needed")
    return int(text)


def from_environment() -> None:
    """Do what the environment says, as soon as NumPy is there; `ksmrs.pth` imports the package where it says so."""
    if os.environ.get(VARIABLE, "").strip().lower() in {"", "0", "no", "off", "false"}:
        return
    if "numpy" in sys.modules:
        _begin_quietly()
    else:
        sys.meta_path.insert(0, _AfterNumpy())


def _begin_quietly() -> None:
    # The program asked for nothing, so nothing may fail for it.
    try:
        worker_init()
    except (KsmrsError, ImportError) as refused:
        _log.warning("%s is set, but this process does not merge: %s", VARIABLE, refused)


class _AfterNumpy:
    """An import hook that acts when NumPy has been imported, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "numpy":
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _follow(spec.loader)
                return spec
        return None


def _follow(loader: Any) -> None:
    execute = loader.exec_module

    def execute_and_begin(module: ModuleType) -> None:
        execute(module)
        _begin_quietly()

    loader.exec_module = execute_and_begin
