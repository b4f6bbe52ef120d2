"""Memory made of transparent huge pages: merging a part of one really frees that part, and what leaves may be huge again.

Measured by PSS; each program says first whether its memory is huge at all, and checks the same where it is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from children import run
from conftest import HUGE_PAGES, huge_pages_for

PROGRAM = """
    import mmap
    from pathlib import Path
    def memory():
        text = Path("/proc/self/smaps_rollup").read_text()
        return {{name: int(text.split(name + ":")[1].split()[0]) << 10 for name in ("Pss_Anon", "AnonHugePages")}}
    size, step, kind = 32 << 20, {step}, {kind!r}
    content = np.random.default_rng(1).integers(1, 256, size, np.uint8)
    def make(number):
        if kind == "array":
            made = np.empty(size, np.uint8)  # NumPy asks for huge pages from 4 MiB on
        else:
            owner = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            owner.madvise(mmap.MADV_HUGEPAGE)
            made = np.frombuffer(owner, np.uint8)
        made[:] = content
        if step:  # every other stretch of so many pages is this array's own
            own = made[: size // (2 * step * 4096) * 2 * step * 4096].reshape(-1, 2, step, 4096)[:, 1]
            own[:, :, 100] = number
            own[:, :, 3000] = 255 - number
        return made
    arrays = [make(number) for number in range(1, 3)]
    expected = [array.copy() for array in arrays]
    before = memory()
    print("huge:", before["AnonHugePages"] >> 20, "MiB")
    for array in arrays:
        ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    wanted = 2 * (size // 4096 - 1) // (2 if step else 1) * 98 // 100
    wait_for(lambda: ksmrs.merge(10) and ksmrs.process_stats().ksm_merging_pages >= wanted, "merging", 60)
    merged = ksmrs.process_stats().ksm_merging_pages * 4096
    # Splitting is the kernel's to finish: it frees what it was told to when it gets to it.
    wait_for(lambda: before["Pss_Anon"] - memory()["Pss_Anon"] > merged * 95 // 100, "the end of the merged pages", 30)
    assert all((array == wanted).all() for array, wanted in zip(arrays, expected))
    arrays[0][::4096] ^= 1
    expected[0][::4096] ^= 1
    assert all((array == wanted).all() for array, wanted in zip(arrays, expected))
    for array in arrays:
        ksmrs.madvise(array, ksmrs.MADV_UNMERGEABLE)
    assert all((array == wanted).all() for array, wanted in zip(arrays, expected))
    after = memory()
    assert abs(after["Pss_Anon"] - before["Pss_Anon"]) < 8 << 20, (before, after)
    if before["AnonHugePages"] > 100 << 20 and not step:
        assert after["AnonHugePages"] > before["AnonHugePages"] // 2, (before, after)
"""


@pytest.mark.parametrize("kind", ["array", "mmap"])
@pytest.mark.parametrize("step", [0, 1, 16, 300], ids=["all equal", "every other page", "64 KiB", "300 pages"])
def test_what_merged_is_freed(kind: str, step: int) -> None:
    run(PROGRAM.format(step=step, kind=kind))


KEEPING = """
    import mmap
    from pathlib import Path
    def huge():
        text = Path("/proc/self/smaps_rollup").read_text()
        return int(text.split("AnonHugePages:")[1].split()[0]) << 10
    size = 16 << 20
    content = np.random.default_rng(2).integers(1, 256, size, np.uint8)
    def make():
        owner = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        owner.madvise(mmap.MADV_HUGEPAGE)
        made = np.frombuffer(owner, np.uint8)
        made[:] = content
        return made
    ksmrs.tunables.split_huge_pages = 0
    arrays = [make(), make()]
    for number, array in enumerate(arrays):  # one page in a thousand differs: no run is shorter than a whole huge page in vain
        array[1000 * 4096 :: 4000 * 4096] = number
    expected = [array.copy() for array in arrays]
    before = huge()
    if before < 2 * size // 2:
        print("no huge pages here")
        sys.exit(0)
    for array in arrays:
        ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    ksmrs.merge(60)
    ksmrs.merge(60)
    turned_down = ksmrs.stats().pages_unmerged_in_huge_pages
    merged = ksmrs.process_stats().ksm_merging_pages
    assert turned_down > 0, ksmrs.stats()
    # All that merged was whole: what is not merged is huge still.
    assert merged % 512 == 0, merged
    assert before - huge() == merged * 4096, (before, huge(), merged)
    ksmrs.tunables.split_huge_pages = 1
    pages = 2 * size // 4096
    wait_for(lambda: ksmrs.merge(60) and ksmrs.process_stats().ksm_merging_pages > pages * 95 // 100, "the short runs", 60)
    assert ksmrs.process_stats().ksm_merging_pages > merged
    assert all((array == wanted).all() for array, wanted in zip(arrays, expected))
    for array in arrays:
        ksmrs.madvise(array, ksmrs.MADV_UNMERGEABLE)
    assert all((array == wanted).all() for array, wanted in zip(arrays, expected))
"""


def test_huge_pages_stay_whole_where_the_knob_says_so() -> None:
    run(KEEPING)


IN_THE_BACKGROUND = """
    from pathlib import Path
    def mapped_huge():
        text = Path("/proc/self/smaps_rollup").read_text()
        return int(text.split("ShmemPmdMapped:")[1].split()[0]) << 10
    size = 32 << 20
    content = np.random.default_rng(3).integers(1, 256, size, np.uint8)
    ksmrs.tunables.run = 0
    regions = [ksmrs.Region(size) for _ in range(2)]
    for region in regions:
        region.array(np.uint8, size)[:] = content
    # Nobody asks for a merge, and no window is looked at half written: batches of the default size do it.
    ksmrs.tunables.run = 1
    wait_for(lambda: ksmrs.process_stats().ksm_merging_pages == 2 * size // 4096, "merging in the background", 60)
    stats = ksmrs.stats()
    assert stats.frames_huge + stats.frames_huge_declined == size >> 21, stats
    for region in regions:
        assert (region.array(np.uint8, size) == content).all()
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        print("as huge pages:", mapped_huge() >> 20, "MiB")
"""


def test_batches_leave_windows_whole() -> None:
    run(IN_THE_BACKGROUND)


DECLINED = """
    import ctypes, platform, struct
    # What a kernel without huge pages or without 2 MiB in one piece does: madvise(MADV_COLLAPSE) is ENOMEM. x86-64, aarch64.
    number = {"x86_64": 28, "aarch64": 233}[platform.machine()]
    filters = struct.pack(
        "HBBI" * 6,
        0x20, 0, 0, 0,  # the call's number
        0x15, 0, 3, number,
        0x20, 0, 0, 32,  # its third argument
        0x15, 0, 1, 25,
        0x06, 0, 0, 0x00050000 | 12,
        0x06, 0, 0, 0x7FFF0000,
    )
    buffer = ctypes.create_string_buffer(filters)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 6, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
    ksmrs.connect(embedded=True)
    regions, content = equal_regions(1024)
    wait_merged(2048, *regions)
    stats = ksmrs.stats()
    assert (stats.frames, stats.frames_huge, stats.frames_huge_declined) == (1024, 0, 2), stats
    status = ksmrs._ksmrs.status()
    assert "MADV_COLLAPSE" in status["huge_declined"], status
    assert all((region.array(np.uint8, content.size) == content).all() for region in regions)
"""


def test_what_does_not_become_huge_is_counted_with_the_reason() -> None:
    run(DECLINED)


@pytest.fixture
def only_where_asked() -> Iterator[None]:
    """Huge pages for memory that somebody asked them for, and no other."""
    if not os.access(HUGE_PAGES, os.W_OK):
        pytest.skip("only root may say who gets huge pages")
    with huge_pages_for("madvise"):
        yield


MEMORY = """
    from pathlib import Path
    def memory(name):
        return int(Path("/proc/self/smaps_rollup").read_text().split(name + ":")[1].split()[0]) << 10
"""

LARGE = """
    before = memory("AnonHugePages")
    arrays = [np.ones(12 << 20, np.uint8) for _ in range(4)]
    print(memory("AnonHugePages") - before >> 20)
"""


@pytest.mark.usefixtures("only_where_asked")
def test_large_arrays_of_a_merging_process_are_of_huge_pages_as_numpys_own() -> None:
    if int(run(MEMORY + LARGE)) < 40:
        pytest.skip("NumPy itself got no huge pages")
    assert int(run(MEMORY + LARGE, KSMRS_MERGE_PROCESS="1")) >= 40
    assert int(run(MEMORY + LARGE, KSMRS_MERGE_PROCESS="1", NUMPY_MADVISE_HUGEPAGE="0")) == 0


SMALL_AFTER_LARGE = """
    large = np.ones({size} << 20, np.uint8)
    del large
    # One of 32 MiB or less is kept until nobody came for it for a second.
    wait_for(lambda: ksmrs.merge(10) and memory("AnonHugePages") < {size} << 19, "the end of what is kept", 60)
    before = memory("Rss")
    small = [np.empty(256 << 10, np.uint8) for _ in range(100)]
    for array in small:
        array[0] = 1
    print(memory("Rss") - before >> 10)
"""


@pytest.mark.usefixtures("only_where_asked")
@pytest.mark.parametrize("size", [40, 24], ids=["given back at once", "kept for a while"])
def test_small_arrays_where_a_large_one_was_are_of_small_pages(size: int) -> None:
    """Advice stays with addresses: 100 first bytes took 24 MiB."""
    assert int(run(MEMORY + SMALL_AFTER_LARGE.format(size=size), KSMRS_MERGE_PROCESS="1")) < 4096


LENT = """
    size, step = 32 << 20, {step}
    content = np.random.default_rng(1).integers(1, 256, size, np.uint8)
    arrays = [content, content.copy(), content.copy()]
    if step:  # every other stretch of so many pages is each array's own
        for number, array in enumerate(arrays):
            own = array[: size // (2 * step * 4096) * 2 * step * 4096].reshape(-1, 2, step, 4096)[:, 1]
            own[:, :, 100] = number
    held = [array.tobytes() for array in arrays]
    before = memory("Pss_Anon")
    print("huge:", memory("AnonHugePages") >> 20, "MiB")
    wanted = 3 * (size // 4096 - 1) // (2 if step else 1) * 98 // 100
    wait_for(lambda: ksmrs.merge(10) and ksmrs.process_stats().ksm_merging_pages >= wanted, "merging", 60)
    merged = ksmrs.process_stats().ksm_merging_pages * 4096
    wait_for(lambda: before - memory("Pss_Anon") > merged * 95 // 100, "the end of the merged pages", 30)
    assert [array.tobytes() for array in arrays] == held
    arrays[0][::4096] ^= 1
    arrays[0][::4096] ^= 1
    assert [array.tobytes() for array in arrays] == held
    ksmrs.merge_process(False)
    assert [array.tobytes() for array in arrays] == held
"""


@pytest.mark.usefixtures("only_where_asked")
@pytest.mark.parametrize("step", [0, 16], ids=["all equal", "64 KiB"])
def test_what_merged_of_large_arrays_is_freed(step: int) -> None:
    run(MEMORY + LENT.format(step=step), KSMRS_MERGE_PROCESS="1")
