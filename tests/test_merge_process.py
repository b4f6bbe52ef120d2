"""A whole program's NumPy arrays in mergeable memory: what becomes of memory, and that no byte is ever wrong."""

from __future__ import annotations

from textwrap import dedent

from children import Child, run, wait_for
from whole_programs import PRELUDE, program


def test_arrays_are_numpys_own_in_every_respect() -> None:
    program(
        """
        a = np.arange(MIB // 8)
        assert is_lent(a) and a.flags.owndata and a.base is None
        address = a.ctypes.data
        # From Python 3.14 on NumPy's check takes every variable of a module for two references.
        a.resize(MIB // 8 - 100, refcheck=False)  # in place
        assert a.ctypes.data == address and (a == np.arange(MIB // 8 - 100)).all()
        a.resize(4 * MIB // 8, refcheck=False)
        assert is_lent(a) and (a[:1000] == np.arange(1000)).all() and not a[MIB // 8 :].any()
        a.resize(10, refcheck=False)  # moves out: a small array keeps no large block
        assert not is_lent(a) and (a == np.arange(10)).all()
        for nbytes in (65536, 65537, 100_000, MIB, 3 * MIB + 5, 40 * MIB, 100 * MIB + 1):
            for make in (np.empty, np.zeros, np.ones):
                array = make(nbytes, np.uint8)
                assert is_lent(array) and array.ctypes.data % PAGE == 0, (nbytes, make)
                array[:: PAGE] = 5
                array[-1] = 5
        assert not is_lent(np.empty(65535, np.uint8))
        assert ksmrs.process_stats().numpy_allocator == "every thread"
        found = [finding for finding in ksmrs.doctor() if finding.name == "NumPy's allocator"]
        assert [finding.state for finding in found] == ["ok"]
        """
    )


def test_a_size_is_at_least_a_page() -> None:
    run(
        """
        for size in (0, 4095, -1):
            try:
                ksmrs.merge_process(True, min_size=size)
            except ValueError as refused:
                assert str(size) in str(refused)
            else:
                raise AssertionError(size)
        assert ksmrs.process_stats().numpy_allocator == "off"
        ksmrs.merge_process(True, min_size=4096)
        from ksmrs import _ksmrs
        arrays = [np.empty(nbytes, np.uint8) for nbytes in (4096, 4095)]
        assert [_ksmrs.is_lent(array.ctypes.data) for array in arrays] == [True, False]
        """
    )


def test_equal_arrays_of_two_processes_are_one_memory() -> None:
    text = dedent(
        PRELUDE
        + """
    ksmrs.merge_process(True)
    rest = pss()
    arrays = [chance(seed, 16 * MIB).copy() for seed in range(2)] + [np.zeros(16 * MIB, np.uint8)]
    arrays[2][:: PAGE] = 0
    print(pss())
    sys.stdin.readline()
    print(pss())
    sys.stdin.readline()
    for array in arrays:
        array.view(np.uint8)[5 :: PAGE] ^= 1
    for seed in range(2):
        wanted = chance(seed, 16 * MIB).copy()
        wanted[5 :: PAGE] ^= 1
        assert (arrays[seed] == wanted).all()
    print("written")
    sys.stdin.readline()
    """
    )
    import ksmrs

    with Child(text) as first, Child(text) as second:
        alone = [int(child.line()) for child in (first, second)]
        pages = 32 << 20 >> 12

        def all_merged() -> bool:
            # Arrays of others take part once they outlived a pass, and ten seconds where the memory was an earlier one's.
            ksmrs.merge(60)
            stats = ksmrs.stats()
            return (stats.pages_shared, stats.pages_sharing, stats.ksm_zero_pages) == (pages, pages, pages)

        wait_for(all_merged, "all arrays' merging")
        for child in (first, second):
            child.tell()
        merged = [int(child.line()) for child in (first, second)]
        # Half of 32 MiB, for the frames are both children's, and all of the zeros.
        saved = [before - after for before, after in zip(alone, merged, strict=True)]
        assert min(saved) > 30 << 20, (alone, merged)
        for child in (first, second):
            child.tell()
            assert child.line() == "written"
        for child in (first, second):
            child.tell()
            child.end()


def test_memory_from_before_and_after_mixes() -> None:
    program(
        """
        old = [np.full(size, size % 251, np.uint8) for size in (10, 5000, 70_000, 3 * MIB)]
        ksmrs.merge_process(True)
        assert not any(map(is_lent, old))
        for array in old:
            size = array.size
            array.resize(2 * MIB + size, refcheck=False)  # by the functions that made it
            assert (array[:size] == size % 251).all() and not array[size:].any()
        new = [np.full(size, size % 251, np.uint8) for size in (10, 5000, 70_000, 3 * MIB)]
        assert [is_lent(array) for array in new] == [False, False, True, True]
        ksmrs.merge_process(False)
        for array in new:
            size = array.size
            array.resize(5 * size, refcheck=False)
            assert (array[:size] == size % 251).all() and not array[size:].any()
        # Freed where nobody made them, and while merging is off, too.
        def drop(arrays):
            while arrays:
                arrays.pop()
        for arrays in (old, new):
            thread = threading.Thread(target=drop, args=(arrays,))
            thread.start()
            thread.join()
        ksmrs.merge_process(True)
        assert is_lent(np.empty(MIB, np.uint8)) and ksmrs.process_stats().numpy_bytes == 0
        """,
        on=False,
    )


def test_zeros_are_zeros_whatever_was_there_before() -> None:
    program(
        """
        for nbytes in (MIB, 48 * MIB):
            for merge in (False, True):
                for fill in (chance(3, nbytes), bytes(nbytes)):
                    fill = np.frombuffer(fill, np.uint8)
                    pair = [fill.copy(), fill.copy()]
                    address = pair[0].ctypes.data
                    if merge:
                        assert merging() + ksmrs.process_stats().ksm_zero_pages >= 2 * nbytes // PAGE
                    del pair
                    for _ in range(3):
                        again = [np.zeros(nbytes, np.uint8) for _ in range(3)]
                        assert not any(array.any() for array in again), (nbytes, merge)
                        for array in again:
                            array[:] = 1
                    del again
        """
    )


def test_freed_memory_is_abandoned_and_not_copied() -> None:
    program(
        """
        arrays = [chance(7, 64 * MIB).copy() for _ in range(2)]
        assert merging() == 2 * 64 * 256
        before, faults = pss(), __import__("resource").getrusage(0).ru_minflt
        arrays.clear()
        # Copies would be 128 MiB, by faults or by the kernel.
        assert __import__("resource").getrusage(0).ru_minflt - faults < 2000
        assert pss() < before + 4 * MIB
        assert merging() == 0
        wait_for(lambda: ksmrs.stats().frames == 0, "the end of frames that nobody shows")
        assert ksmrs.process_stats().numpy_kept_bytes <= 64 * MIB
        """
    )


def test_what_is_kept_is_bounded_and_free_arenas_end() -> None:
    program(
        """
        arrays = [np.ones(20 * MIB, np.uint8) for _ in range(30)]
        regions = len(re.findall(r"rw-p", Path("/proc/self/maps").read_text()))
        full = pss()
        arrays.clear()
        assert ksmrs.process_stats().numpy_kept_bytes <= 64 * MIB
        assert pss() < full - 500 * MIB, (pss(), full)
        wait_for(lambda: _ksmrs.heap_bytes()[0] <= 3 * 64 * MIB, "the end of free arenas")
        ksmrs.merge(30)
        assert ksmrs.stats().regions <= 3, ksmrs.stats()
        """
    )


def test_what_is_kept_goes_back_when_nothing_comes_for_it() -> None:
    """Not what a program has use for: arrays that come and go meanwhile keep theirs."""
    program(
        """
        held = chance(1, 4 * MIB).copy()
        before = pss()
        np.ones(32 * MIB, np.uint8)  # freed at once: twice as much is kept at most
        freed = [np.ones(2 * MIB, np.uint8) for _ in range(16)]
        del freed
        assert ksmrs.process_stats().numpy_kept_bytes >= 32 * MIB and pss() > before + 30 * MIB
        addresses, used = set(), 0
        def still_kept():
            # Two at a time, of another size.
            global used
            first, second = np.ones(MIB, np.uint8), np.ones(MIB, np.uint8)
            addresses.update((first.ctypes.data, second.ctypes.data))
            used += 1
            return ksmrs.process_stats().numpy_kept_bytes
        wait_for(lambda: still_kept() <= 2 * MIB, "the end of what nobody came for", 60)
        assert ksmrs.process_stats().numpy_kept_bytes == 2 * MIB and pss() < before + 6 * MIB
        assert used > 100 and len(addresses) == 2, (used, addresses)
        assert (held == chance(1, 4 * MIB)).all() and not np.zeros(2 * MIB, np.uint8).any()
        """
    )


def test_only_what_outlives_a_pass_takes_part() -> None:
    program(
        """
        ksmrs.tunables.run = 0
        kept = chance(1, 8 * MIB).copy()
        assert ksmrs.process_stats().numpy_mergeable_bytes == 0
        ksmrs.tunables.advisor_mode = "none"
        ksmrs.tunables.sleep_millisecs = 1
        ksmrs.tunables.pages_to_scan = 100_000
        ksmrs.tunables.run = 1
        scans = ksmrs.stats().full_scans
        wait_for(lambda: ksmrs.stats().full_scans > scans + 2, "passes")
        # It takes part by itself, with nobody asking for a merge.
        wait_for(lambda: ksmrs.process_stats().numpy_mergeable_bytes == kept.nbytes, "taking part")
        ksmrs.tunables.run = 0
        scans = ksmrs.stats().full_scans
        wait_for(lambda: ksmrs.stats().full_scans == scans, "the end of passes")
        after = chance(2, 8 * MIB).copy()
        assert ksmrs.process_stats().numpy_mergeable_bytes == kept.nbytes
        """
    )


def test_off_gives_everything_memory_of_its_own() -> None:
    program(
        """
        arrays = [chance(1, 8 * MIB).copy() for _ in range(3)] + [np.zeros(4 * MIB, np.uint8)]
        arrays[3][0] = 0
        small = pss()
        assert merging() >= 3 * 8 * 256
        merged = pss()
        assert merged < small - 14 * MIB
        kept = ksmrs.process_stats().numpy_kept_bytes
        ksmrs.merge_process(False)
        assert ksmrs.process_stats().numpy_mergeable_bytes == 0 and pss() + kept > merged + 14 * MIB
        assert merging() == 0
        assert all((array == chance(1, 8 * MIB)).all() for array in arrays[:3]) and not arrays[3].any()
        assert not is_lent(np.empty(MIB, np.uint8))
        assert ksmrs.process_stats().numpy_allocator == "off"
        # What the program asks for takes part all the same.
        for array in arrays[:2]:
            ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
        assert merging() == 2 * 8 * 256
        # And on again: what is there takes part again.
        ksmrs.merge_process(True)
        assert merging() >= 3 * 8 * 256
        """
    )


def test_parts_are_pinned_and_opted_out_as_other_memory_is() -> None:
    program(
        """
        pair = [chance(1).copy() for _ in range(2)]
        assert merging() == 512
        with ksmrs.pinned(pair[0]):
            assert merging() == 256
        assert merging() == 512
        ksmrs.madvise(pair[1], ksmrs.MADV_UNMERGEABLE, 0, 64 * PAGE)
        assert merging() == 512 - 64
        ksmrs.madvise(pair[1], ksmrs.MADV_MERGEABLE)
        assert merging() == 512
        # Who gets the memory next knows nothing of that.
        ksmrs.madvise(pair[1], ksmrs.MADV_UNMERGEABLE)
        content, address = chance(1), pair.pop().ctypes.data
        pair.append(content.copy())
        assert pair[1].ctypes.data == address and merging() == 512
        # Pinned or opted out before it ever took part, it does not begin to.
        third, fourth = content.copy(), content.copy()
        ksmrs.madvise(fourth, ksmrs.MADV_UNMERGEABLE, 0, MIB // 2)
        with ksmrs.pinned(third):
            assert merging() == 512 + 128
        assert merging() == 512 + 128 + 256
        fifth = content.copy()
        ksmrs.madvise(fifth, ksmrs.MADV_UNMERGEABLE)
        address = fifth.ctypes.data
        del fifth
        fifth = content.copy()
        assert fifth.ctypes.data == address and merging() == 512 + 128 + 512
        # Pinned while out of merging, it stays out.
        ksmrs.tunables.run = 0
        lent = ksmrs.process_stats().numpy_mergeable_bytes
        other = np.ones(MIB, np.uint8)
        with ksmrs.pinned(other):
            pass
        assert ksmrs.process_stats().numpy_mergeable_bytes == lent
        """
    )


def test_arrays_of_ksmrs_are_numpys_where_those_merge() -> None:
    program(
        """
        ksmrs.tunables.run = 0
        address = np.full(MIB, 3, np.uint8).__array_interface__["data"][0]  # freed, and next in line
        for array in (ksmrs.empty((256, 4096), "u1", "F"), ksmrs.zeros(MIB, "u1"), ksmrs.array(chance(1))):
            assert is_lent(array) and array.base is None and array.flags.owndata
            assert array.any() == (array.ndim == 1 and array[0] == chance(1)[0])
        assert ksmrs.process_stats().numpy_mergeable_bytes >= MIB
        for array in (ksmrs.zeros(MIB, "u1", shared=True), ksmrs.zeros(5000, "u1")):  # a region of their own
            assert not is_lent(array) and array.base is not None
        """
    )
