"""Regions: their size, buffer, arrays and end. Mostly in this process; nothing needs to be merged."""

from __future__ import annotations

import errno
import gc
import weakref

import numpy as np
import pytest

import ksmrs
from children import merged, wait_for
from ksmrs import PageState, _ksmrs


def test_a_region_is_writable_zeroed_bytes(shared: bool) -> None:
    with ksmrs.Region(10_000, shared) as region:
        view = memoryview(region)
        assert (len(region), region.nbytes, view.nbytes, view.format, view.readonly) == (
            10_000,
            10_000,
            10_000,
            "B",
            False,
        )
        assert bytes(view) == bytes(10_000)
        view[9_999] = 7
        assert view[9_999] == 7
        assert region.address % (2 << 20) == 0
        assert region.shared is shared
        assert len(region.page_states()) == 3
        view.release()


def test_a_region_counts_its_pages(shared: bool, runtime_dir: object) -> None:
    pages = 64
    with ksmrs.Region(pages * ksmrs.PAGE_SIZE, shared) as region:
        assert region.stats() == ksmrs.RegionStats(pages=pages, pages_private=pages)
        contents = np.repeat(np.random.default_rng(1).integers(1, 256, (16, 4096), np.uint8), 2, axis=0)
        region.array("u1", (32, 4096))[:] = contents
        region.array("u1", (16, 4096), 32 * 4096)[:] = 0
        ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE, 60 * 4096, 4 * 4096)
        wait_for(lambda: ksmrs.merge(5).pages_merged == 0 and merged(region) >= 48, "the merge")
        found = region.stats()
        assert (found.ksm_merging_pages, found.pages_held, found.pages_changing) == (32, 4, 0)
        # Pages that were read or written to be zero have memory, which merging frees; the last twelve never had any.
        assert found.ksm_zero_pages + found.pages_private == 28
        assert found.ksm_zero_pages >= 16
        profit = (32 + found.ksm_zero_pages) * ksmrs.PAGE_SIZE - found.ksm_rmap_items * _ksmrs.METADATA_PER_PAGE
        assert found.ksm_profit == profit
        assert (found.ksm_rmap_items, found.ksm_profit) == (
            ksmrs.process_stats().ksm_rmap_items,
            ksmrs.process_stats().ksm_process_profit,
        )
        assert found.ksm_merging_pages == ksmrs.process_stats().ksm_merging_pages
    with pytest.raises(ksmrs.ClosedRegionError):
        region.stats()


@pytest.mark.parametrize("nbytes", [0, -1, -(2**70), 2**70, 2**63, 2**46])
def test_impossible_sizes_are_value_errors_with_the_number(nbytes: int) -> None:
    with pytest.raises(ksmrs.ArgumentError, match=str(nbytes)) as raised:
        ksmrs.Region(nbytes)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, ksmrs.KsmrsError)


@pytest.mark.parametrize("nbytes", [1.5, "4096", None])
def test_a_size_is_an_integer(nbytes: object) -> None:
    with pytest.raises(TypeError):
        ksmrs.Region(nbytes)  # type: ignore[arg-type]


def test_no_room_for_shared_memory_is_an_os_error() -> None:
    with pytest.raises(OSError) as raised:
        ksmrs.Region(1 << 42, shared=True)
    assert raised.value.errno in {errno.ENOSPC, errno.ENOMEM}
    assert isinstance(raised.value, ksmrs.KsmrsError)


def test_an_array_keeps_the_memory_after_the_region_is_gone(shared: bool) -> None:
    region = ksmrs.Region(8192, shared)
    array = region.array("u4", (2, 1024))
    array[:] = 5
    gone = weakref.ref(region)
    del region
    gc.collect()
    assert gone() is not None
    assert int(array.sum()) == 5 * 2048
    del array
    gc.collect()
    assert gone() is None


def test_close_keeps_what_an_array_shows(shared: bool) -> None:
    region = ksmrs.Region(8192, shared)
    array = region.array(np.uint8, 8192)
    array[:] = 9
    region.close()
    region.close()
    assert region.closed
    assert "closed" in repr(region)
    assert (array == 9).all()
    array[:] = 10
    assert (array == 10).all()
    for use in (lambda: memoryview(region), lambda: region.array("u1", 1), region.page_states):
        with pytest.raises(ksmrs.ClosedRegionError):
            use()
    with pytest.raises(ValueError, match="closed"):
        ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [("u1", 8193, 0), ("u8", 1024, 1), ("u1", 1, 8192), ("u1", -1, 0), ("u1", 1, -1), ("f8", (2**40, 2**40), 0)],
)
def test_an_array_must_fit(dtype: str, shape: int | tuple[int, ...], offset: int) -> None:
    with ksmrs.Region(8192) as region, pytest.raises(ksmrs.ArgumentError):
        region.array(dtype, shape, offset)


def test_arrays_may_start_anywhere_and_have_any_dtype() -> None:
    with ksmrs.Region(8192) as region:
        stamps = region.array("datetime64[s]", (3,), offset=5)
        stamps[:] = np.datetime64(1, "s")
        records = region.array([("a", "u1"), ("b", "f8")], 10, 4096)
        records["b"] = 2.5
        assert bytes(memoryview(region)[5:6]) == b"\x01"
        assert records["b"].sum() == 25
        with pytest.raises(TypeError):
            region.array(object, 1)
        assert region.array("u1", (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("order", ["C", "F"])
def test_constructors_agree_with_numpy(shared: bool, order: str) -> None:
    expected = np.zeros((3, 5), "i2", order)  # type: ignore[call-overload]
    for made in (
        ksmrs.empty((3, 5), "i2", order, shared=shared),  # type: ignore[arg-type]
        ksmrs.zeros((3, 5), "i2", order, shared=shared),  # type: ignore[arg-type]
    ):
        np.testing.assert_array_equal(made, expected)
        assert (made.dtype, made.strides, made.flags.writeable) == (expected.dtype, expected.strides, True)
        assert made.ctypes.data % 4096 == 0
    filled = ksmrs.full((2, 2), 3, shared=shared)
    np.testing.assert_array_equal(filled, np.full((2, 2), 3))
    assert filled.dtype == np.full((2, 2), 3).dtype
    source = np.asarray(np.arange(12).reshape(3, 4), order=order)  # type: ignore[call-overload]
    copied = ksmrs.array(source, shared=shared)
    np.testing.assert_array_equal(copied, source)
    assert copied.flags.f_contiguous == source.flags.f_contiguous
    copied[0, 0] = 99
    assert source[0, 0] == 0


def test_constructors_refuse_what_cannot_be() -> None:
    with pytest.raises(TypeError):
        ksmrs.zeros(3, object)
    with pytest.raises(ValueError, match="negative"):
        ksmrs.zeros((2, -1))
    with pytest.raises(ValueError, match="order"):
        ksmrs.zeros(3, order="K")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ksmrs.zeros(2.5)  # type: ignore[arg-type]
    assert ksmrs.zeros((0, 4)).shape == (0, 4)
    assert ksmrs.array(3.0).shape == ()
    assert ksmrs.array([]).size == 0


def test_fresh_pages_are_private() -> None:
    with ksmrs.Region(3 * 4096) as region:
        memoryview(region)[:] = bytes(range(256)) * 48
        assert set(region.page_states()) <= {PageState.PRIVATE, PageState.MERGED, PageState.FROZEN, PageState.FREEZING}
