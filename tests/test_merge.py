"""Merging: equal pages get one frame, memory is freed, writes are kept. Across processes, and back again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import ksmrs
from children import Child, equal_regions, kill_brokers, merged, run, wait_for, wait_merged

PAGES = 4096

HOLDER = """
    shared = {shared}
    (region,), contents = equal_regions({pages}, shared, count=1)
    array = region.array(np.uint8, contents.size)
    print("ready", flush=True)
    for line in sys.stdin:
        command = line.strip()
        if command == "merge":
            wait_merged({pages}, region)
        if command == "write":
            contents = contents.copy()
            contents[::4096 * 3] ^= 0xFF
            array[::4096 * 3] ^= 0xFF
        if command == "unmerge":
            ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE)
        pss = next(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith("Pss:"))
        # In parts: a large temporary array would stay in the heap and be counted as if nothing were saved.
        parts = range(0, contents.size, 65536)
        right = all((array[at : at + 65536] == contents[at : at + 65536]).all() for at in parts)
        print(merged(region), pss, right, flush=True)
"""


def ask(child: Child, command: str) -> tuple[int, int, bool]:
    child.tell(command)
    count, pss, right = child.line().split()
    return int(count), int(pss), right == "True"


@pytest.mark.parametrize(("first", "second"), [(False, False), (True, True), (False, True)])
def test_two_processes_share_frames_and_part_again(first: bool, second: bool) -> None:
    programs = [HOLDER.format(shared=kind, pages=PAGES) for kind in (first, second)]
    ksmrs.tunables.run = 0
    with Child(programs[0]) as one, Child(programs[1]) as two:
        assert (one.line(), two.line()) == ("ready", "ready")
        ask(one, "look")
        ask(two, "look")
        before = ask(one, "look")[1] + ask(two, "look")[1]
        ksmrs.tunables.run = 1
        assert ask(one, "merge")[2]
        assert ask(two, "merge")[2]
        after = ask(one, "look")[1] + ask(two, "look")[1]
        # 16 MiB of 32 are saved; allow a quarter for what the client itself needs.
        assert before - after > PAGES * 4 * 3 // 4
        counters = ksmrs.stats()
        assert counters.pages_shared + counters.pages_sharing == 2 * PAGES
        assert counters.pages_sharing == PAGES
        count, _, right = ask(one, "write")
        assert right
        assert count <= PAGES
        assert ask(two, "look")[2]
        assert ask(one, "unmerge")[::2] == (0, True)
        assert ask(two, "look")[2]
        assert ask(two, "unmerge")[::2] == (0, True)
        one.end()
        two.end()


def test_what_was_copied_for_the_broker_is_given_back() -> None:
    """2 MiB for each process that ever had a page copied would be more than small programs save."""
    run(
        """
        from pathlib import Path
        def staged():
            # The threads of ksmrs have a descriptor table of their own.
            links = Path("/proc/self/task").glob("*/fd/*")
            objects = [link.stat() for link in links if link.is_symlink() and "ksmrs-staging" in os.readlink(link)]
            assert objects and len({each.st_ino for each in objects}) == 1
            return objects[0].st_blocks // 8
        regions, contents = equal_regions(256, False)
        had = []
        for _ in range(2):
            ksmrs.merge(60)
            had.append(staged())
            wait_for(lambda: staged() == 0, "the staging area without memory", 60)
            # Two pages of a content that nobody had: one of them is copied.
            for region in regions:
                region.array(np.uint8, 4096)[:] = 7
        # A slow machine may have given it back before it was looked at.
        assert set(had) <= {0, 1, 256}, had
        ksmrs.merge(60)
        assert merged(*regions) == 512
        assert all(bytes(region)[4096:] == contents.tobytes()[4096:] for region in regions)
        """
    )


def test_pages_merge_by_themselves(shared: bool) -> None:
    run(
        f"""
        regions, contents = equal_regions(64, {shared})
        wait_for(lambda: merged(*regions) == 128, "merging without a request", 60)
        assert all(bytes(region) == contents.tobytes() for region in regions)
        """
    )


def test_a_shared_block_of_which_half_is_written_breaks_as_a_whole() -> None:
    run(
        """
        regions, contents = equal_regions(64, True)
        wait_merged(128, *regions)
        ksmrs.tunables.run = 0
        expected = contents.copy()
        array = regions[0].array(np.uint8, contents.size)

        def own_after_writing(pages):
            for page in pages:
                array[page * 4096] ^= 255
                expected[page * 4096] ^= 255
            return [page for page, state in enumerate(regions[0].page_states()) if state == PageState.PRIVATE]

        few = [25, 18, 30, 21, 16, 27, 23]
        assert own_after_writing(few) == sorted(few), "no page breaks that was not written"
        assert own_after_writing([28]) == list(range(16, 32)), "half of the block is written"
        assert own_after_writing([63]) == [*range(16, 32), 63]
        assert bytes(regions[0]) == expected.tobytes() and bytes(regions[1]) == contents.tobytes()
        """
    )


def test_zero_pages_need_no_memory(shared: bool) -> None:
    run(
        f"""
        region = ksmrs.Region(64 * 4096, {shared})
        array = region.array(np.uint8, 64 * 4096)
        array[::4096] = 1
        array[::4096] = 0
        wait_for(lambda: ksmrs.merge(5) and region.page_states().count(PageState.ZERO) == 64, "zero pages")
        array[4096] = 7
        assert array.sum() == 7 and region.page_states()[1] == PageState.PRIVATE or region.page_states()[1] == PageState.ZERO
        """
    )


def test_pages_of_two_domains_never_merge() -> None:
    program = """
        ksmrs.connect(domain="{domain}")
        (region,), contents = equal_regions(64, count=1, seed=5)
        print("ready", flush=True)
        sys.stdin.readline()
        ksmrs.merge(10)
        print(merged(region), flush=True)
        sys.stdin.readline()
    """
    with Child(program.format(domain="a")) as one, Child(program.format(domain="b")) as two:
        one.line()
        two.line()
        for child in (one, two):
            child.tell()
            assert child.line() == "0"
        for child in (one, two):
            child.tell()
            child.end()


def test_memory_is_merged_again_after_the_broker_was_killed(runtime_dir: Path, shared: bool) -> None:
    run(
        f"""
        from pathlib import Path
        from children import kill_brokers
        regions, contents = equal_regions(128, {shared})
        wait_merged(256, *regions)
        assert len(kill_brokers(Path({str(runtime_dir)!r}))) == 1
        assert all(bytes(region) == contents.tobytes() for region in regions)
        for region in regions:
            region.array(np.uint8, 4096)[:] = 1
        assert all(bytes(region)[4096:] == contents.tobytes()[4096:] for region in regions)
        wait_merged(256, *regions)
        assert all(bytes(region)[4096:] == contents.tobytes()[4096:] for region in regions)
        """
    )


def test_merge_obeys_ctrl_c_and_its_timeout() -> None:
    with Child(
        """
        regions, contents = equal_regions(64)
        # Background jobs of a shell are born ignoring it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        began = time.monotonic(); ksmrs.merge(0); assert time.monotonic() - began < 5
        try:
            print("ready", flush=True)
            while True:
                ksmrs.merge()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """
    ) as child:
        assert child.line() == "ready"
        child.kill(signal.SIGINT)
        assert child.line() == "interrupted"
        child.end()


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), -0.001])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    with pytest.raises(ksmrs.ArgumentError, match="timeout"):
        ksmrs.merge(timeout)


def test_stats_start_no_broker(runtime_dir: Path) -> None:
    run("assert (ksmrs.stats(), ksmrs.process_stats()) == (ksmrs.Stats(), ksmrs.ProcessStats())")
    assert list(runtime_dir.iterdir()) == []


def test_embedded_in_this_process(runtime_dir: Path) -> None:
    run(
        f"""
        from pathlib import Path
        from children import brokers_in
        ksmrs.connect(embedded=True)
        regions, contents = equal_regions(64)
        wait_merged(128, *regions)
        assert brokers_in(Path({str(runtime_dir)!r})) == []
        assert all(bytes(region) == contents.tobytes() for region in regions)
        """
    )


def test_merge_in_this_very_process(shared: bool) -> None:
    regions, contents = equal_regions(32, shared)
    wait_merged(64, *regions)
    assert merged(*regions) == 64
    for region in regions:
        assert bytes(region) == contents.tobytes()
        region.close()


def test_the_next_connection_counts_the_pages_of_zeros_of_the_last(shared: bool) -> None:
    region = ksmrs.Region(64 * 4096, shared)
    array = region.array("u1", region.nbytes)
    array[:] = 1
    array[:] = 0

    def counted(pages: int) -> bool:
        ksmrs.merge(5)
        return ksmrs.stats().ksm_zero_pages == pages

    wait_for(lambda: counted(64), "pages of zeros")
    ksmrs.disconnect()
    ksmrs.connect()
    # The last client's count until nothing of it is mapped any more.
    wait_for(lambda: counted(64), "pages of zeros of one client")
    assert ksmrs.stats().pages_disbelieved == 0
    array[::4096] = 1
    wait_for(lambda: counted(0), "the end of pages of zeros")
    assert array.sum() == 64


@pytest.mark.once
def test_a_program_ends_while_its_threads_wait_for_merges(runtime_dir: Path) -> None:
    """They must not come back to an interpreter that is gone, though the process still has something to do at its end."""
    run(
        """
        import ctypes
        from pathlib import Path
        from children import brokers_in
        libc = ctypes.CDLL(None)
        assert libc.__cxa_atexit(libc.usleep, ctypes.c_void_p(1_500_000), None) == 0
        region = ksmrs.Region(1 << 20)
        def merge():
            while True:
                ksmrs.merge()
        for _ in range(3):
            threading.Thread(target=merge, daemon=True).start()
        time.sleep(0.3)
        for broker in brokers_in(Path(os.environ["KSMRS_RUNTIME_DIR"])):
            os.kill(broker, signal.SIGSTOP)
        time.sleep(0.2)
        """
    )
    kill_brokers(runtime_dir, signal.SIGKILL)
