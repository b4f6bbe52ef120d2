"""What programs do with merged private memory: system calls that read into it, threads that block SIGSEGV, pickling.

What is guaranteed is asserted of the package as it is, under merging without pause: what arrives is right, a call that fails is
an EFAULT that may be repeated, and inside `pinned` no call fails. What is only documented (a call *does* fail in a freeze) is
asserted in the build with failpoints, whose freezes are long. How the calls are gone on with is in reading.py; what libraries
do is in test_libraries.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ksmrs
import reading
from children import brokers_in, processes_in, run, wait_for
from reading import CONTENT, PAGE, PAGES, SOURCES

BUILD = Path(__file__).resolve().parent.parent / "target" / "mutants"
slow_freezes = pytest.mark.skipif(not (BUILD / "ksmrs").is_dir(), reason="no build with failpoints: run make mutants")


def run_with_slow_freezes(program: str, returncode: int = 0) -> str:
    """In the build with failpoints, with freezes of 2 ms and more."""
    failpoints = "merge-frozen=delay:2000"
    return run(program, returncode=returncode, PYTHONPATH=str(BUILD), KSMRS_FAILPOINTS=failpoints)


@pytest.fixture
def merging(runtime_dir: Path) -> Iterator[None]:
    with reading.merging_without_pause():
        yield


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("kind", SOURCES)
def test_what_a_system_call_reads_is_right_and_pinned_it_is_whole(kind: str, tmp_path: Path) -> None:
    array = reading.array_at_a_page()
    ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    source = SOURCES[kind](tmp_path)
    try:
        reading.read_under_merging(source, array, pin=False)
        counts = reading.read_under_merging(source, array, pin=True)
    finally:
        source.close()
    assert counts["EFAULT"] == counts["short"] == 0, counts
    assert counts["calls"] == counts["rounds"] * CONTENT.size // reading.PIECE


@slow_freezes
def test_in_a_freeze_calls_fail_as_documented_and_pinned_they_do_not() -> None:
    output = run_with_slow_freezes("import reading; reading.main()")
    for kind, counts in json.loads(output).items():
        assert counts["bare"].get("EFAULT", 0) + counts["bare"].get("short", 0) >= 3, (kind, counts)
        assert counts["pinned"].get("EFAULT", 0) + counts["pinned"].get("short", 0) == 0, (kind, counts)


def test_fromfile_reads_into_fresh_memory_while_its_like_merges(tmp_path: Path) -> None:
    """Fresh arrays take no part, also where they lie in what a merged array was freed from."""
    path = tmp_path / "content"
    CONTENT.tofile(path)
    run(
        f"""
        import reading
        kept, rounds, before = [], 0, ksmrs.process_stats().merges
        with reading.merging_without_pause():
            while rounds < 100 or ksmrs.process_stats().merges < before + 8 * reading.PAGES:
                fresh = np.fromfile({str(path)!r}, np.uint8)
                assert (fresh == reading.CONTENT).all(), rounds
                fresh[:] = 1  # in the place of what is freed below
                with open({str(path)!r}, "rb") as file:
                    assert file.readinto(fresh) == fresh.size
                assert (fresh == reading.CONTENT).all(), rounds
                ksmrs.madvise(fresh, ksmrs.MADV_MERGEABLE)
                kept = [*kept[-4:], fresh]
                rounds += 1
                assert rounds < 50_000, ksmrs.stats()
            assert all((array == reading.CONTENT).all() for array in kept)
        """,
        # Every array in a mapping of its own, hence at the same phase.
        MALLOC_MMAP_THRESHOLD_="65536",
    )


BLOCKED = """
    import reading
    one, other = reading.array_at_a_page(), reading.array_at_a_page()
    for array in (one, other):
        ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages >= 2 * reading.PAGES, "merging", 60)
    failed = []
    def blocked(write):
        def run():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})
            try:
                write()
            except BaseException as error:
                failed.append(error)
        thread = threading.Thread(target=run)
        thread.start(); thread.join()
        assert not failed, failed
"""


def test_a_thread_that_blocks_sigsegv_writes_merged_private_memory_at_rest() -> None:
    run(
        BLOCKED
        + """
    ksmrs.tunables.run = 0
    def write():
        one[5::4096] ^= 0xFF
    blocked(write)
    expected = reading.CONTENT.copy(); expected[5::4096] ^= 0xFF
    assert (one == expected).all() and (other == reading.CONTENT).all()
    """
    )


PINNED_WRITES = (
    BLOCKED
    + """
    def write():
        rounds, before = 0, ksmrs.process_stats().merges
        until = time.monotonic() + 60
        while rounds < 200 or ksmrs.process_stats().merges < before + 4 * reading.PAGES:
            assert time.monotonic() < until, ksmrs.stats()
            half = one[rounds % 2 * one.size // 2 :][: one.size // 2]
            with ksmrs.pinned(half):
                half[5::4096] ^= 0xFF
                half[5::4096] ^= 0xFF
            rounds += 1
    with reading.merging_without_pause():
        blocked(write)
    assert (one == reading.CONTENT).all() and (other == reading.CONTENT).all()
    """
)


def test_a_thread_that_blocks_sigsegv_writes_pinned_memory_while_it_merges() -> None:
    run(PINNED_WRITES)


@slow_freezes
def test_a_thread_that_blocks_sigsegv_writes_pinned_memory_in_the_midst_of_long_freezes() -> None:
    run_with_slow_freezes(PINNED_WRITES)


@slow_freezes
def test_a_thread_that_blocks_sigsegv_and_writes_in_a_freeze_is_killed_as_documented(runtime_dir: Path) -> None:
    """The kernel ends a process whose fault it cannot deliver: no handler of anybody is asked."""
    run_with_slow_freezes(
        BLOCKED
        + """
    def write():
        until = time.monotonic() + 60
        while time.monotonic() < until:
            one[5::4096] ^= 0xFF
            one[5::4096] ^= 0xFF
    with reading.merging_without_pause():
        blocked(write)
    """,
        returncode=-signal.SIGSEGV,
    )
    # Its peer reads the end of its input now, and goes.
    wait_for(lambda: len(processes_in(runtime_dir)) == len(brokers_in(runtime_dir)), "the end of the peer")


@pytest.mark.usefixtures("merging")
def test_pickles_and_copies_of_opted_in_arrays_are_those_of_any_other() -> None:
    plain = CONTENT.reshape(PAGES, PAGE)
    array = reading.array_at_a_page()
    ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    table = array.reshape(PAGES, PAGE)
    before = ksmrs.process_stats().merges
    for rounds in range(1000):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.dumps(table, protocol) == pickle.dumps(plain, protocol)
        buffers: list[list[pickle.PickleBuffer]] = [[], []]
        heads = [
            pickle.dumps(each, 5, buffer_callback=kept.append)
            for each, kept in zip((table, plain), buffers, strict=True)
        ]
        assert heads[0] == heads[1]
        assert [bytes(each) for each in buffers[0]] == [bytes(each) for each in buffers[1]]
        files = [io.BytesIO(), io.BytesIO()]
        for each, file in zip((table, plain), files, strict=True):
            np.save(file, each)
        assert files[0].getvalue() == files[1].getvalue()
        again: np.ndarray[Any, Any] = pickle.loads(pickle.dumps(table))
        for copied in (again, copy.deepcopy(table), table.copy()):
            copied[:] = 3  # a copy is memory of its own
        assert (table == plain).all()
        array[rounds % 8 * PAGE :: 8 * PAGE] ^= 0  # written, so that it merges again
        if rounds >= 5 and ksmrs.process_stats().merges - before >= 2 * PAGES:
            return
    raise AssertionError(f"nothing merged meanwhile: {ksmrs.stats()}")


PINNED_BY_A_PIPE = """
    import ctypes, mmap
    from multiprocessing.shared_memory import SharedMemory
    size = 2 << 20
    content = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    class Piece(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    def lend(array):
        # The pipe has the page itself, as a device would.
        out, into = os.pipe()
        piece = Piece(array.ctypes.data + 3 * 4096, 4096)
        assert libc.vmsplice(into, ctypes.byref(piece), ctypes.c_ulong(1), 0) == 4096, ctypes.get_errno()
        os.close(into)
        return out
    def is_the_same_page(out, array):
        array[3 * 4096] ^= 255
        seen = os.read(out, 4096)[0]
        os.close(out)
        return seen == array[3 * 4096]
    def refused(act):
        try:
            act()
        except ksmrs.PinnedError as error:
            assert isinstance(error, BufferError) and "ksmrs.pinned" in str(error), error
            return True
        return False
"""


def test_pinned_memory_that_is_opted_out_stays_where_it_is() -> None:
    run(
        PINNED_BY_A_PIPE
        + """
    maps = [mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
    for memory in maps:
        memory[:] = content.tobytes()
        ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
    ksmrs.merge(60)
    assert ksmrs.process_stats().ksm_merging_pages == 1024
    array = np.frombuffer(maps[0], np.uint8)
    with ksmrs.pinned(array[: 10 * 4096]):
        with ksmrs.pinned(array):
            out = lend(array)
            ksmrs.madvise(array, ksmrs.MADV_UNMERGEABLE)
            assert is_the_same_page(out, array)
            out = lend(array)
        assert is_the_same_page(out, array), "the other pin goes on"
        wait_for(lambda: ksmrs.process_stats().ksm_merging_pages == 512, "the broker seeing that all of it is out")
        assert ksmrs.process_stats().adopted_bytes == 2 * size
    assert ksmrs.process_stats().adopted_bytes == size, "it is its owner's again"
    assert (array == content).all()
    del array
    maps[0].close()
    """
    )


def test_what_is_pinned_cannot_be_closed() -> None:
    run(
        PINNED_BY_A_PIPE
        + """
    regions = [ksmrs.Region(size) for _ in range(2)]
    arrays = [region.array(np.uint8, size) for region in regions]
    objects = [SharedMemory(create=True, size=size) for _ in range(2)]
    for array in arrays:
        array[:] = content
    for memory in objects:
        memory.buf[:] = content.tobytes()
        ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
    wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages == 2048, "all four merged")
    with ksmrs.pinned(regions[0]), ksmrs.pinned(objects[0]):
        out = lend(arrays[0])
        assert refused(regions[0].close) and refused(objects[0].close)
        assert is_the_same_page(out, arrays[0])
        assert not regions[0].closed and bytes(objects[0].buf) == content.tobytes()
    arrays[0][3 * 4096] ^= 255
    for region, array, memory in zip(regions, arrays, objects):
        region.close()
        assert (array == content).all() and bytes(memory.buf) == content.tobytes()
        memory.close()
        memory.unlink()
    """
    )
