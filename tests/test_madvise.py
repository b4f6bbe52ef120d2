"""`madvise` and `pinned`: which ranges they take, and what they say to the rest. Nothing needs to be merged."""

from __future__ import annotations

import errno
import mmap
from typing import Any

import numpy as np
import pytest

import ksmrs
from children import run
from ksmrs import PageState

PAGE = 4096


def test_the_numbers_are_the_kernels() -> None:
    assert getattr(mmap, "MADV_MERGEABLE", 12) == ksmrs.MADV_MERGEABLE
    assert getattr(mmap, "MADV_UNMERGEABLE", 13) == ksmrs.MADV_UNMERGEABLE


def test_unmergeable_pages_are_held_and_come_back(shared: bool) -> None:
    with ksmrs.Region(8 * PAGE, shared) as region:
        memoryview(region)[:] = bytes([1]) * 8 * PAGE
        ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE, 2 * PAGE, 3 * PAGE)
        ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE, 2 * PAGE, 3 * PAGE)
        assert [page for page, state in enumerate(region.page_states()) if state == PageState.HELD] == [2, 3, 4]
        ksmrs.madvise(region, ksmrs.MADV_MERGEABLE)
        assert PageState.HELD not in region.page_states()
        assert bytes(memoryview(region)) == bytes([1]) * 8 * PAGE


def test_partial_pages_stay_out() -> None:
    with ksmrs.Region(8 * PAGE) as region:
        ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE, 1, 3 * PAGE)
        assert [page for page, state in enumerate(region.page_states()) if state == PageState.HELD] == [1, 2]


def test_a_length_beyond_the_end_is_clipped() -> None:
    with ksmrs.Region(4 * PAGE) as region:
        ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE, 3 * PAGE, 2**62)
        assert region.page_states()[3] == PageState.HELD


def test_the_end_of_a_region_counts_as_a_whole_page() -> None:
    with ksmrs.Region(PAGE + 100) as region:
        ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE)
        assert list(region.page_states()) == [PageState.HELD] * 2


@pytest.mark.parametrize("start", [-1, 4 * PAGE, 2**70])
def test_a_start_out_of_range_is_a_value_error(start: int) -> None:
    with ksmrs.Region(4 * PAGE) as region, pytest.raises(ksmrs.ArgumentError, match="start"):
        ksmrs.madvise(region, ksmrs.MADV_MERGEABLE, start)


@pytest.mark.parametrize("length", [-1, -(2**70)])
def test_a_negative_length_is_a_value_error(length: int) -> None:
    with ksmrs.Region(4 * PAGE) as region, pytest.raises(ksmrs.ArgumentError, match="length"):
        ksmrs.madvise(region, ksmrs.MADV_MERGEABLE, 0, length)


@pytest.mark.parametrize(("start", "length"), [(1, PAGE), (0, 0), (0, PAGE - 1), (5, 10)])
def test_no_whole_page_is_a_value_error(start: int, length: int) -> None:
    with ksmrs.Region(4 * PAGE) as region, pytest.raises(ksmrs.ArgumentError, match="whole page"):
        ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE, start, length)


@pytest.mark.parametrize("advice", [0, 4, 99, -1])
def test_unknown_advice_is_einval(advice: int) -> None:
    with ksmrs.Region(PAGE) as region, pytest.raises(OSError, match=str(advice)) as raised:
        ksmrs.madvise(region, advice)
    assert raised.value.errno == errno.EINVAL


def test_pinning_memory_that_takes_no_part_leaves_it_alone() -> None:
    with mmap.mmap(-1, 4 * PAGE) as foreign:
        for buffer in (foreign, bytearray(4 * PAGE), bytes(4 * PAGE), np.ones(4 * PAGE, np.uint8)):
            before = bytes(buffer)
            with ksmrs.pinned(buffer):
                assert bytes(buffer) == before


@pytest.mark.parametrize("buffer", [None, 3, "text", [1, 2]])
def test_what_has_no_buffer_is_a_type_error(buffer: object) -> None:
    with pytest.raises(TypeError):
        ksmrs.madvise(buffer, ksmrs.MADV_MERGEABLE)


def test_a_released_view_is_a_value_error() -> None:
    with ksmrs.Region(PAGE) as region:
        view = memoryview(region)
        view.release()
        with pytest.raises(ValueError, match="released"):
            ksmrs.madvise(view, ksmrs.MADV_MERGEABLE)


@pytest.mark.parametrize("layout", ["reversed", "strided", "fortran", "readonly", "datetime", "memoryview"])
def test_any_view_of_a_region_is_found(layout: str) -> None:
    array = ksmrs.zeros((16, PAGE), np.uint8)
    buffer: Any = array
    view: Any = {
        "reversed": array[::-1],
        "strided": array[4:12:2, ::3],
        "fortran": array.T,
        "readonly": np.broadcast_to(array, (2, 16, PAGE)),
        "datetime": array.reshape(-1).view("datetime64[s]"),
        "memoryview": memoryview(buffer)[4:12],
    }[layout]
    ksmrs.madvise(view, ksmrs.MADV_UNMERGEABLE)
    region: Any = array
    while not isinstance(region, ksmrs.Region):
        region = region.obj if isinstance(region, memoryview) else region.base
    held = [page for page, state in enumerate(region.page_states()) if state == PageState.HELD]
    assert held == {"strided": list(range(4, 11)), "memoryview": list(range(4, 12))}.get(layout, list(range(16)))


def test_pinned_holds_every_page_it_touches_and_counts(shared: bool) -> None:
    array = ksmrs.zeros(4 * PAGE, np.uint8, shared=shared)
    array[:] = 3
    region = array.base.base.obj  # type: ignore[union-attr]
    part = array[PAGE - 1 : PAGE + 1]

    def held() -> list[int]:
        return [page for page, state in enumerate(region.page_states()) if state == PageState.HELD]

    with ksmrs.pinned(part):
        assert held() == [0, 1]
        with ksmrs.pinned(array[PAGE : 2 * PAGE]):
            assert held() == [0, 1]
        assert held() == [0, 1]
    assert held() == []
    with pytest.raises(ZeroDivisionError), ksmrs.pinned(part):
        raise ZeroDivisionError
    assert held() == []


def test_what_was_opted_out_stays_out_after_a_pin() -> None:
    with ksmrs.Region(2 * PAGE) as region:
        ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE, 0, PAGE)
        with ksmrs.pinned(region):
            pass
        assert region.page_states()[0] == PageState.HELD
        assert region.page_states()[1] != PageState.HELD


def test_modules_that_another_thread_is_just_loading_are_none_yet() -> None:
    run(
        """
        import mmap, sys, types
        import ksmrs
        memory = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for name in ("numpy", "_ctypes", "ctypes", "multiprocessing.shared_memory"):
            sys.modules[name] = types.ModuleType(name)
            ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
            with ksmrs.pinned(memory):
                pass
            ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
            del sys.modules[name]
        """,
        prelude=False,
    )
