"""What memory of the program's belongs to, and its end at the worst moment: signals, recursion, the end of the interpreter.

No region may be left over memory that was freed, and nothing may be given back that somebody else has by now. What may take the
process down runs in a child.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ksmrs
from children import run
from ksmrs import _adopt, _ksmrs
from test_adopt import CONTENT, address_of, content, merge, opted_in, states

MIB = 1 << 20


def regions_at(address: int) -> list[Any]:
    return _ksmrs.regions_touching(address, CONTENT.nbytes)


def test_an_array_ends_where_no_python_can_run() -> None:
    run(
        """
        import threading
        from ksmrs import _ksmrs
        N = 1 << 20
        def opted_in():
            array = np.full(N, 7, np.uint8)
            ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
            assert ksmrs.merge(60).finished and ksmrs.process_stats().ksm_merging_pages > 0
            return array
        twin = ksmrs.full(N, 7, np.uint8)
        def down(box):
            try:
                down(box)
            except RecursionError:
                box.clear()
        def at_the_limit_of_recursion(box):
            sys.setrecursionlimit(200)
            down(box)
            sys.setrecursionlimit(1000)
        def as_an_exception_comes(box):
            class Late(Exception):
                pass
            def drop():
                try:
                    # It surfaces where Python looks next: in what the end of the array calls, if that is Python.
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(Late))
                    box.pop()
                except Late:
                    pass
            thread = threading.Thread(target=drop)
            thread.start()
            thread.join()
            box.clear()
        import ctypes
        sys.unraisablehook = lambda _: None
        for drop in at_the_limit_of_recursion, as_an_exception_comes:
            box = [opted_in()]
            address = box[0].ctypes.data
            drop(box)
            assert _ksmrs.regions_touching(address, N) == [], drop
            another = opted_in()
            assert (another == 7).all() and len(_ksmrs.regions_touching(another.ctypes.data, N)) == 1
            del another
        """
    )


@pytest.mark.parametrize("dtype", [object, np.dtypes.StringDType() if hasattr(np.dtypes, "StringDType") else object])
def test_arrays_of_references_release_them(dtype: Any) -> None:
    class Thing:
        def __str__(self) -> str:
            return "long enough to lie outside of its array's memory"

    thing = Thing()
    references = _references(thing)
    arrays = [np.full(1 << 16, thing, dtype) for _ in range(2)]
    if dtype is object:
        assert _references(thing) == references + (2 << 16)
    opted_in(*arrays)
    assert ksmrs.merge(60).finished
    arrays.clear()
    assert _references(thing) == references


def _references(thing: object) -> int:
    return ctypes.c_ssize_t.from_address(id(thing)).value


@pytest.mark.parametrize(
    "view",
    [
        pickle.PickleBuffer,
        memoryview,
        lambda array: memoryview(array)[8:],
        lambda array: np.asarray(memoryview(array)),
        lambda array: (ctypes.c_uint8 * array.size).from_buffer(array),
        lambda array: np.frombuffer((ctypes.c_uint8 * array.size).from_buffer(array), np.uint8),
    ],
    ids=["PickleBuffer", "memoryview", "a slice of it", "an array over it", "ctypes", "an array over ctypes"],
)
def test_an_array_is_watched_whatever_view_is_opted_in(view: Callable[[Any], Any]) -> None:
    arrays = [CONTENT.copy() for _ in range(3)]
    addresses = [address_of(array) for array in arrays]
    for array in arrays:
        ksmrs.madvise(view(array), ksmrs.MADV_MERGEABLE)
        with pytest.raises(ValueError, match="cannot resize"):
            array.resize(2 * CONTENT.size, refcheck=False)
    assert len(_adopt._holds) == 3 and all(map(regions_at, addresses))
    del array
    arrays.clear()
    assert not any(map(regions_at, addresses)) and _adopt._holds == {}


def test_what_numpy_frees_ended_before() -> None:
    array = CONTENT.copy()
    address = address_of(array)
    opted_in(array)
    assert regions_at(address)
    # As at an array's end, but that no weak reference is told: from NumPy 2.5 on it is told too late.
    state: Any = (1, (3,), np.dtype(np.uint8), False, b"new")
    array.__setstate__(state)
    assert not regions_at(address) and content(array) == b"new"


def test_objects_of_ctypes_take_part_if_the_memory_is_theirs() -> None:
    class Pair(ctypes.Structure):
        _fields_ = (("first", ctypes.c_uint8 * MIB), ("second", ctypes.c_uint8 * MIB))

    class Either(ctypes.Union):
        _fields_ = (("pair", Pair), ("number", ctypes.c_uint64))

    own = Pair()
    below = bytearray(MIB)
    for fit in own, own.second, Either(), (ctypes.c_char * MIB).from_buffer(below), np.ctypeslib.as_array(own.first):
        ksmrs.madvise(fit, ksmrs.MADV_MERGEABLE)
        ksmrs.madvise(fit, ksmrs.MADV_UNMERGEABLE)
    bytes_of = ctypes.c_uint8 * MIB
    address = ctypes.addressof(own)
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
    for unfit in (
        bytes_of.from_address(address),
        ctypes.cast(address, ctypes.POINTER(bytes_of)).contents,
        np.ctypeslib.as_array(pointer, (MIB,)),
        bytes_of.from_buffer(bytes_of.from_address(address)),
    ):
        with pytest.raises(ksmrs.ForeignMemoryError, match=r"points at it, so it cannot be held: .* ksmrs\.array"):
            ksmrs.madvise(unfit, ksmrs.MADV_MERGEABLE)
    assert _adopt._holds == {} and not regions_at(address)


def test_whoever_is_interrupted_can_opt_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = mmap.mmap(-1, CONTENT.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = CONTENT.tobytes()
    twin = ksmrs.array(CONTENT)
    part = 16 * 4096
    ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE, part, part)
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        # The region ended, and what held the memory for it does not know yet.
        patch.setattr(_adopt, "_let_go_if_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
    ended = [hold.regions for hold in _adopt._holds.values()]
    assert ended == [[]]
    # A larger one lies where it was, and begins before it.
    opted_in(memory)
    inner = memoryview(memory)[part + 4096 : 2 * part]
    merge(CONTENT.nbytes // 4096, memory)
    assert content(twin) == CONTENT.tobytes()
    with ksmrs.pinned(inner):
        assert set(states(memory)[17:32]) == {ksmrs.PageState.HELD}
    assert content(memory) == CONTENT.tobytes()
    inner.release()
    ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
    assert _adopt._holds == {}
    memory.close()


def test_what_is_opted_out_as_the_interpreter_ends_keeps_its_bytes() -> None:
    run(
        """
        import atexit
        def late():
            for array in arrays:
                ksmrs.madvise(array, ksmrs.MADV_UNMERGEABLE)
            freed = time.monotonic() + 30
            while ksmrs.stats().frames:
                if time.monotonic() > freed:
                    os._exit(1)
            if any((array != 7).any() for array in arrays):
                os._exit(2)
        # What is registered first runs last: after ksmrs was told of the end.
        atexit.register(late)
        arrays = [np.full(1 << 20, 7, np.uint8) for _ in range(2)]
        for array in arrays:
            ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
        assert ksmrs.merge(60).finished and ksmrs.process_stats().ksm_merging_pages > 400
        """
    )


def test_no_signal_is_lost_in_a_garbage_collection() -> None:
    run(
        """
        memory = bytearray(1 << 20)
        ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
        sent = raised = 0
        def send(*_):
            global sent
            sent += 1
            raise InterruptedError
        signal.signal(signal.SIGALRM, send)
        while sent < 100:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002)
                while True:
                    # Garbage, so that most of the time goes into collections.
                    circle = [[]]
                    circle.append(circle)
            except InterruptedError:
                raised += 1
        assert raised == sent, (raised, sent)
        """
    )


def test_what_nobody_refers_to_is_let_go_after_a_collection_in_any_thread() -> None:
    run(
        """
        from ksmrs import _adopt
        def elsewhere():
            thread = threading.Thread(target=gc.collect)
            thread.start()
            thread.join()
        for collect in gc.collect, elsewhere:
            ksmrs.madvise(bytearray(1 << 20), ksmrs.MADV_MERGEABLE)
            collect()
            assert _adopt._holds == {}
        """
    )


def test_a_fork_finds_nobody_in_the_midst_of_opting_in_or_out() -> None:
    run(
        """
        import mmap, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ended = False
        def toggle():
            while not ended:
                ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
                ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
        thread = threading.Thread(target=toggle)
        thread.start()
        for _ in range(60):
            child = os.fork()
            if child == 0:
                try:
                    for advice in ksmrs.MADV_UNMERGEABLE, ksmrs.MADV_MERGEABLE, ksmrs.MADV_UNMERGEABLE:
                        ksmrs.madvise(memory, advice)
                    memory.close()
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
        ended = True
        thread.join()
        """
    )


def test_a_shared_memory_that_was_closed_opts_nobody_else_out() -> None:
    run(
        """
        import mmap
        from multiprocessing.shared_memory import SharedMemory
        from ksmrs import _ksmrs
        closed = SharedMemory(create=True, size=1 << 20)
        try:
            for advice in 2 * (ksmrs.MADV_MERGEABLE, ksmrs.MADV_UNMERGEABLE):
                ksmrs.madvise(closed, advice)
            ksmrs.madvise(closed, ksmrs.MADV_MERGEABLE)
            number = id(closed._mmap)
            closed.close()
            others = []
            while not others or id(others[-1]) != number and len(others) < 200:
                others.append(mmap.mmap(-1, 1 << 20))
            other = others[-1]
            ksmrs.madvise(other, ksmrs.MADV_MERGEABLE)
            assert ksmrs.process_stats().adopted_bytes == 1 << 20
            closed.close()
            assert ksmrs.process_stats().adopted_bytes == 1 << 20
        finally:
            closed.unlink()
        """
    )
