"""Private memory that programs made: opted in where it is, merged, written, let go; and what is refused.

What may take the process down runs in a child. What is freed is measured by PSS; what is left is looked for in smaps.
"""

from __future__ import annotations

import ctypes
import gc
import io
import mmap
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ksmrs
from children import run, wait_for
from ksmrs import _adopt

PAGE = 4096
PAGES = 256
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
CONTENT = np.random.default_rng(5).integers(1, 256, PAGES * PAGE, np.uint8)
_libc = ctypes.CDLL(None, use_errno=True)


def content(array: Any) -> bytes:
    return bytes(memoryview(array).cast("B")) if not isinstance(array, np.ndarray) else array.tobytes()


def address_of(buffer: Any) -> int:
    from ksmrs._extent import extent

    return extent(buffer)[0]


def mappings_of_the_store() -> int:
    return Path("/proc/self/maps").read_text().count("ksmrs-store")


def states(buffer: Any) -> bytes:
    """The page states of what was adopted of a buffer."""
    from ksmrs._extent import extent

    low, length = extent(buffer)
    return b"".join(
        region.page_states()
        for hold in _adopt._holds.values()
        for region in hold.regions
        if low <= region.address < low + length
    )


def merged_pages(*buffers: Any) -> int:
    return sum(states(buffer).count(4) + states(buffer).count(5) for buffer in buffers)


def merge(pages: int, *buffers: Any) -> None:
    def all_merged() -> bool:
        ksmrs.merge(5)
        return merged_pages(*buffers) >= pages

    wait_for(all_merged, f"merging of {pages} pages", 60)


def opted_in(*buffers: Any) -> None:
    for buffer in buffers:
        ksmrs.madvise(buffer, ksmrs.MADV_MERGEABLE)


def array_of_content() -> np.ndarray[Any, Any]:
    """An array of NumPy's own, at the phase of its large ones; where malloc puts it depends on what was freed before."""
    raw = np.empty(CONTENT.size + PAGE, np.uint8)
    first = (16 - address_of(raw)) % PAGE
    array = raw[first : first + CONTENT.size]
    array[:] = CONTENT
    return array


def of_mmap() -> mmap.mmap:
    memory = mmap.mmap(-1, CONTENT.size, flags=PRIVATE)
    memory[:] = CONTENT.tobytes()
    return memory


def of_npy() -> np.ndarray[Any, Any]:
    file = io.BytesIO()
    np.save(file, CONTENT)
    file.seek(0)
    loaded: np.ndarray[Any, Any] = np.load(file)
    return loaded


def of_file(folder: Path) -> np.ndarray[Any, Any]:
    CONTENT.tofile(folder / "content")
    return np.fromfile(folder / "content", np.uint8)


KINDS: dict[str, Callable[[Path], Any]] = {
    "mmap": lambda _: of_mmap(),
    "array over mmap": lambda _: np.frombuffer(of_mmap(), np.uint8),
    "memoryview of mmap": lambda _: memoryview(of_mmap()),
    "array": lambda _: CONTENT.copy(),
    "array at a phase": lambda _: array_of_content(),
    "load": lambda _: of_npy(),
    "fromfile": of_file,
    "unpickled": lambda _: pickle.loads(pickle.dumps(CONTENT, 2)),
    "unpickled, protocol 5": lambda _: pickle.loads(pickle.dumps(CONTENT, 5)),
    "view": lambda _: CONTENT.copy().view("datetime64[s]").reshape(64, -1)[:, ::-1],
    "read-only": lambda _: np.broadcast_to(CONTENT.copy(), (3, CONTENT.size)),
    "bytearray": lambda _: bytearray(CONTENT),
    "bytes": lambda _: bytes(CONTENT),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_merges_where_it_is_and_leaves_as_it_came(kind: str, tmp_path: Path) -> None:
    one, other = KINDS[kind](tmp_path), KINDS[kind](tmp_path)
    before, address = content(one), address_of(one)
    phases = [ksmrs.madvise(buffer, ksmrs.MADV_MERGEABLE) for buffer in (one, other)]
    assert phases[0] == address % PAGE
    if phases[0] == phases[1]:
        merge(2 * (PAGES - 1), one, other)
        assert mappings_of_the_store() > 0
    assert (content(one), content(other), address_of(one)) == (before, before, address)
    ksmrs.madvise(one, ksmrs.MADV_UNMERGEABLE)
    ksmrs.madvise(other, ksmrs.MADV_UNMERGEABLE)
    assert (content(one), content(other)) == (before, before)
    assert mappings_of_the_store() == 0
    assert _adopt._holds == {}
    assert ksmrs.process_stats().adopted_bytes == 0


def test_memory_is_freed_and_a_write_gets_its_own_copy() -> None:
    run(
        """
        from pathlib import Path
        def pss():
            text = Path("/proc/self/smaps_rollup").read_text()
            return int(text.split("Pss_Anon:")[1].split()[0]) << 10
        content = np.random.default_rng(1).integers(1, 256, 16 << 20, np.uint8)
        arrays = [content.copy() for _ in range(4)]
        before = pss()
        for array in arrays:
            ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
        wait_for(lambda: ksmrs.merge(10) and ksmrs.process_stats().ksm_merging_pages >= 4 * 4095, "merging", 60)
        # All four now show frames, whose memory is the broker's; a small part was our own anyway.
        freed = before - pss()
        assert freed > 60 << 20, freed
        arrays[0][5 * 4096 : 5 * 4096 + 10] += 1
        assert all((array == content).all() for array in arrays[1:])
        assert (arrays[0] != content).sum() == 10
        """
    )


def test_opting_in_again_changes_nothing_and_parts_add_up() -> None:
    array = CONTENT.copy()
    start = -address_of(array) % PAGE
    ksmrs.madvise(array, ksmrs.MADV_MERGEABLE, start + 16 * PAGE, 32 * PAGE)
    assert ksmrs.process_stats().adopted_bytes == 32 * PAGE
    ksmrs.madvise(array, ksmrs.MADV_MERGEABLE, start + 16 * PAGE, 32 * PAGE)
    ksmrs.madvise(array, ksmrs.MADV_MERGEABLE, start + 17 * PAGE, PAGE)
    assert ksmrs.process_stats().adopted_bytes == 32 * PAGE
    ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    assert ksmrs.process_stats().adopted_bytes == (PAGES - 1) * PAGE
    ksmrs.madvise(array, ksmrs.MADV_UNMERGEABLE, start, 100 * PAGE)
    ksmrs.madvise(array, ksmrs.MADV_UNMERGEABLE, start + 100 * PAGE)
    assert _adopt._holds == {}
    ksmrs.madvise(array, ksmrs.MADV_UNMERGEABLE)
    assert (array == CONTENT).all()


def test_a_range_that_is_half_in_a_region_of_our_own_is_a_value_error() -> None:
    region = ksmrs.Region(64 * PAGE)
    beyond = np.lib.stride_tricks.as_strided(region.array(np.uint8, 64 * PAGE), (2 << 20,), (1,))
    with pytest.raises(ValueError, match="reach beyond a region"):
        ksmrs.madvise(beyond, ksmrs.MADV_MERGEABLE)


def test_a_view_with_made_up_strides_is_refused() -> None:
    array = CONTENT.copy()
    beyond = np.lib.stride_tricks.as_strided(array, (2 * array.size,), (1,))
    with pytest.raises(ksmrs.ForeignMemoryError, match="are not among"):
        ksmrs.madvise(beyond, ksmrs.MADV_MERGEABLE)


def test_small_buffers_are_refused_for_their_size() -> None:
    small = np.ones(15 * PAGE, np.uint8)
    with pytest.raises(ValueError, match="min_bytes, 65536"):
        ksmrs.madvise(small, ksmrs.MADV_MERGEABLE)
    with mmap.mmap(-1, PAGE, flags=PRIVATE) as page:
        ksmrs.madvise(page, ksmrs.MADV_MERGEABLE, min_bytes=PAGE)
        ksmrs.madvise(page, ksmrs.MADV_UNMERGEABLE)
    with pytest.raises(ValueError, match="no whole page"):
        ksmrs.madvise(bytearray(100), ksmrs.MADV_MERGEABLE, min_bytes=1)


def refused(buffer: Any, reason: str) -> None:
    before = Path("/proc/self/maps").read_text().count("\n")
    with pytest.raises(ksmrs.ForeignMemoryError, match=reason) as raised:
        ksmrs.madvise(buffer, ksmrs.MADV_MERGEABLE)
    assert isinstance(raised.value, BufferError)
    assert abs(Path("/proc/self/maps").read_text().count("\n") - before) <= 4
    assert _adopt._holds == {}


def test_mapped_files_are_refused_with_their_path(tmp_path: Path) -> None:
    path = tmp_path / "data"
    CONTENT.tofile(path)
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as private:
            refused(private, f"{path} cannot take part.*file")
        with mmap.mmap(file.fileno(), 0) as shared:
            refused(shared, str(path))
    for mode in ("r", "r+", "c"):
        refused(np.memmap(path, np.uint8, mode), str(path))
    assert path.read_bytes() == CONTENT.tobytes()


def test_memory_that_cannot_be_given_back_as_it_was_is_refused() -> None:
    with mmap.mmap(-1, 64 * PAGE, flags=PRIVATE, prot=mmap.PROT_READ) as read_only:
        refused(read_only, "not readable and writable")
    with mmap.mmap(-1, 64 * PAGE, flags=PRIVATE) as locked:
        assert _libc.mlock(ctypes.c_void_p(address_of(locked)), ctypes.c_size_t(4 * PAGE)) == 0
        refused(locked, "mlock")
    with mmap.mmap(-1, 64 * PAGE, flags=PRIVATE) as not_inherited:
        not_inherited.madvise(mmap.MADV_DONTFORK)
        refused(not_inherited, "DONTFORK")
    wipe_on_fork = 18
    with mmap.mmap(-1, 64 * PAGE, flags=PRIVATE) as wiped:
        wiped.madvise(wipe_on_fork)
        refused(wiped, "WIPEONFORK")


def test_what_does_not_say_whom_it_belongs_to_is_refused() -> None:
    class Bare:
        def __init__(self, memory: np.ndarray[Any, Any]) -> None:
            self.memory = memory
            self.__array_interface__ = memory.__array_interface__

    refused(np.asarray(Bare(CONTENT.copy())), "Bare, which cannot be held")


def test_advice_given_before_is_there_afterwards() -> None:
    def flags(buffer: Any) -> list[str]:
        address = address_of(buffer)
        lines = Path("/proc/self/smaps").read_text().splitlines()
        inside, found = False, []
        for line in lines:
            first = line.split(" ", 1)[0]
            if "-" in first and not first.endswith(":"):
                low, high = (int(part, 16) for part in first.split("-"))
                inside = low < address + CONTENT.size and high > address
            elif inside and line.startswith("VmFlags:"):
                found.append(" ".join(sorted(set(line.split()[1:]) - {"sd"})))
        return found

    for advice in (None, mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE, mmap.MADV_DONTDUMP):
        one, other = of_mmap(), of_mmap()
        for memory in (one, other):
            if advice is not None:
                memory.madvise(advice)
        before = flags(one)
        opted_in(one, other)
        merge(2 * PAGES, one, other)
        for memory in (one, other):
            ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
        assert set(flags(one)) == set(before), advice
        assert mappings_of_the_store() == 0
        assert one[:] == CONTENT.tobytes()
        one.madvise(mmap.MADV_DONTNEED)
        assert one[:] == bytes(CONTENT.size)


def test_held_memory_cannot_be_closed_or_resized_until_it_is_out() -> None:
    memory, growing, array = of_mmap(), bytearray(CONTENT), CONTENT.copy()
    opted_in(memory, growing, array)
    for forbidden in (memory.close, lambda: memory.resize(PAGE), lambda: growing.extend(b"more")):
        with pytest.raises(BufferError):
            forbidden()
    with pytest.raises(ValueError, match="resize"):
        array.resize(2 * CONTENT.size, refcheck=False)
    for buffer in (memory, growing, array):
        ksmrs.madvise(buffer, ksmrs.MADV_UNMERGEABLE)
    memory.close()
    growing.extend(b"more")
    array.resize(2 * CONTENT.size, refcheck=False)
    assert (array[: CONTENT.size] == CONTENT).all() and growing[: CONTENT.size] == CONTENT.tobytes()


def test_views_outlive_what_they_look_at() -> None:
    arrays = [array_of_content() for _ in range(2)]
    views = [array[100:].view("u4")[::2] for array in (array[: CONTENT.size - 156] for array in arrays)]
    expected = views[0].copy()
    opted_in(*arrays)
    merge(2 * (PAGES - 1), *arrays)
    del arrays
    assert len(_adopt._holds) == 2
    assert all((view == expected).all() for view in views)
    views[0][:] = 7
    assert (views[1] == expected).all() and (views[0] == 7).all()
    del views
    assert _adopt._holds == {} and mappings_of_the_store() == 0


def test_dropped_exporters_are_let_go() -> None:
    memories: list[Any] = [of_mmap(), of_mmap(), bytearray(CONTENT), bytearray(CONTENT)]
    opted_in(*memories)
    merge(2 * PAGES, *memories[:2])
    memories.clear()
    gc.collect()
    assert _adopt._holds == {} and mappings_of_the_store() == 0


def test_a_finalizer_in_a_garbage_collection_still_reads_its_bytes() -> None:
    run(
        """
        from ksmrs import _adopt
        content = np.random.default_rng(1).integers(1, 256, 1 << 20, np.uint8)
        seen = []
        class Watched(np.ndarray):
            def __del__(self):
                if self.base is None:
                    seen.append(bool((self == content).all()))
        class WatchedBytes(bytearray):
            def __del__(self):
                seen.append(bytes(self) == content.tobytes())
        made = []
        for _ in range(2):
            array = Watched(content.size, np.uint8)
            array[:] = content
            array.cycle = [array]
            made += [array, WatchedBytes(content)]
        del array
        for buffer in made:
            ksmrs.madvise(buffer, ksmrs.MADV_MERGEABLE)
        wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages >= 4 * 255, "merging", 60)
        made.clear(); del buffer
        gc.collect(); gc.collect()
        assert seen == [True] * 4, seen
        assert not _adopt._holds and "ksmrs-store" not in open("/proc/self/maps").read()
        """,
        # Every array in a mapping of its own, hence at the same phase.
        MALLOC_MMAP_THRESHOLD_="65536",
    )


def test_ten_thousand_arrays_come_and_go() -> None:
    output = run(
        """
        import mmap, random
        chance = random.Random(3)
        contents = [np.random.default_rng(kind).integers(0, 256, 1 << 20, np.uint8) for kind in range(4)]
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        def make():
            kind, size = chance.randrange(4), chance.choice([1 << 16, 1 << 17, 300_000, 1 << 20])
            memory = chance.randrange(8)
            if memory == 0:
                made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                made[:] = contents[kind][:size].tobytes()
            elif memory == 1:
                made = bytearray(contents[kind][:size])
            else:
                made = contents[kind][:size].copy()
            ksmrs.madvise(made, ksmrs.MADV_MERGEABLE)
            return [made, kind, size]
        def check(entry):
            made, kind, size = entry
            assert (np.frombuffer(made, np.uint8) == contents[kind][:size]).all(), f"content {kind} of {size} bytes"
        live = [make() for _ in range(40)]
        halfway, merges = 0, 0
        for number in range(10_000):
            at = chance.randrange(len(live))
            if number % 7 == 0:
                check(live[at])
            live[at] = None
            live[at] = make()
            if number % 400 == 0:
                ksmrs.merge(5)
                for entry in live:
                    check(entry)
            if number == 5_000:
                gc.collect(); halfway = resident()
        gc.collect()
        assert resident() < halfway + (48 << 20), (halfway, resident())
        ksmrs.merge(5)
        merges = ksmrs.process_stats().merges
        assert merges > 5_000, merges
        for entry in live:
            check(entry)
        live.clear(); del entry; gc.collect()
        from ksmrs import _adopt
        assert not _adopt._holds
        assert "ksmrs-store" not in open("/proc/self/maps").read()
        print(merges)
        """,
        seconds=300,
    )
    assert int(output) > 0


@pytest.mark.parametrize("how", ["pass", "os._exit(0)", "sys.exit(0)", "gc.collect()"])
def test_the_end_comes_with_everything_merged_and_threads_writing(how: str) -> None:
    run(
        f"""
        import mmap
        content = np.random.default_rng(1).integers(1, 256, 1 << 22, np.uint8)
        arrays = [content.copy() for _ in range(6)] + [bytearray(content), bytearray(content)]
        for array in arrays:
            ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
        wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages >= 6 * 1023, "merging", 60)
        def write(array):
            while True:
                array[::4096] = array[::4096] ^ 1
                array[::4096] = array[::4096] ^ 1
        for array in arrays[:2]:
            threading.Thread(target=write, args=(array,), daemon=True).start()
        wait_for(lambda: ksmrs.merge(1) and True)
        assert all((np.frombuffer(array, np.uint8) == content).all() for array in arrays[2:])
        {how}
        """
    )


def test_a_child_frees_and_opts_out_what_it_inherited() -> None:
    run(
        """
        import mmap
        from ksmrs import _adopt
        content = np.random.default_rng(1).integers(1, 256, 1 << 20, np.uint8)
        memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = content.tobytes()
        arrays = [content.copy() for _ in range(3)]
        for buffer in [memory, *arrays]:
            ksmrs.madvise(buffer, ksmrs.MADV_MERGEABLE)
        wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages >= 3 * 255, "merging", 60)
        for _ in range(20):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    arrays[0][:] = 1
                    ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
                    memory.close()
                    arrays[1] = None
                    assert (arrays[2] == content).all() and (arrays[0] == 1).all()
                    fresh = [np.full(1 << 20, kind, np.uint8) for kind in range(8)]
                    assert all((array == kind).all() for kind, array in enumerate(fresh))
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            ksmrs.merge(5)
            assert memory[:] == content.tobytes() and all((array == content).all() for array in arrays)
        """,
        MALLOC_MMAP_THRESHOLD_="65536",
    )


def test_dontneed_never_shows_another_regions_content() -> None:
    run(
        """
        import mmap, random
        chance = random.Random(1)
        pages = 512
        kinds = [np.random.default_rng(kind).integers(1, 256, (pages, 4096), np.uint8) for kind in range(6)]
        def memory(kind):
            made = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            made[:] = kinds[kind].tobytes()
            ksmrs.madvise(made, ksmrs.MADV_MERGEABLE)
            return made
        watched = [memory(0), memory(0)]
        stop = threading.Event()
        def press():
            # New merges all the time, so that slots that are free are taken at once.
            while not stop.is_set():
                pair = [memory(kind := chance.randrange(1, 6)), memory(kind)]
                ksmrs.merge(5)
        presser = threading.Thread(target=press)
        presser.start()
        zeros = bytes(4096)
        seen = {"zero": 0, "own": 0}
        for _ in range(60):
            ksmrs.merge(5)
            for page in chance.sample(range(pages), 100):
                made = chance.choice(watched)
                if chance.random() < 0.5:
                    made[page * 4096] = 0
                made.madvise(mmap.MADV_DONTNEED, page * 4096, 4096)
                now = made[page * 4096 : (page + 1) * 4096]
                own = bytes(kinds[0][page])
                # What anonymous memory would show, or the frame that the page showed before it was written.
                assert now in (zeros, own), "bytes of another region"
                seen["zero" if now == zeros else "own"] += 1
                made[page * 4096 : (page + 1) * 4096] = own
        stop.set(); presser.join()
        assert all(made[:] == kinds[0].tobytes() for made in watched)
        assert seen["own"] > 0, seen
        """,
        seconds=240,
    )
