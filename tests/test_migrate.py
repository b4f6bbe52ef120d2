"""Frames move to where runs join: mappings become few, every page follows, and nobody who reads or writes sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ksmrs
from children import Child, kill_brokers, run, wait_for

PAGES = 512
WORKER = """
    import ctypes, json, re
    from pathlib import Path
    pages, shared, straight = {pages}, {shared}, {straight}
    order = np.arange(pages) if straight else np.arange(pages) * 37 % pages
    region = ksmrs.Region(pages * 4096, shared=shared)
    array = region.array(np.uint8, (pages, 4096))
    expected = np.zeros_like(array)
    lock = threading.Lock()
    def put(seed):
        contents = np.random.default_rng(seed).integers(0, 256, (pages, 4096), np.uint8)[order]
        with lock:
            expected[:] = contents
            array[:] = contents
    def mappings():
        start = array.ctypes.data
        spans = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.M)
        return sum(start <= int(first, 16) < start + array.nbytes for first, _ in spans)
    def writing():
        # Takes a page out of merging for a moment, and puts it back; looks at all others meanwhile.
        dice = np.random.default_rng({straight})
        while not stop.is_set():
            with lock:
                page = int(dice.integers(pages))
                array[page, 5] = expected[page, 5] ^ 255
                if array[page, 5] != expected[page, 5] ^ 255:
                    wrong.append(page)
                array[page, 5] = expected[page, 5]
                wrong.extend(int(page) for page in (array != expected).any(1).nonzero()[0])
            time.sleep(0.002)
    wrong, stop, thread = [], threading.Event(), None
    put({seed})
    print("ready")
    for line in sys.stdin:
        match line.split():
            case ["mappings"]:
                print(mappings())
            case ["write"]:
                thread = threading.Thread(target=writing)
                thread.start()
                print("writing")
            case ["put", seed]:
                put(int(seed))
                print("put")
            case ["quiet"]:
                stop.set()
                thread.join()
                print(len(wrong))
            case ["crowd"]:
                # Mappings of the program's own, until merging takes no more.
                limit = int(Path("/proc/sys/vm/max_map_count").read_text())
                pad = ctypes.create_string_buffer((limit + 2) * 4096)
                first, protect = -(-ctypes.addressof(pad) // 4096) * 4096, ctypes.CDLL(None).mprotect
                others = len(Path("/proc/self/maps").read_text().splitlines())
                for page in range(0, limit * 7 // 8 - others, 2):
                    assert protect(ctypes.c_void_p(first + page * 4096), ctypes.c_size_t(4096), 1) == 0
                while region.page_states()[0] == PageState.MERGED:
                    for _ in range(2):
                        array[0, 0] ^= 1
                        ksmrs.merge(timeout=30)
                print("crowded")
            case ["verify"]:
                print(int((array != expected).any(1).sum()))
"""


class Worker(Child):
    def __init__(self, shared: bool, straight: bool, seed: int = 1) -> None:
        super().__init__(WORKER.format(pages=PAGES, shared=shared, straight=straight, seed=seed))
        assert self.line() == "ready"

    def ask(self, what: str) -> str:
        self.tell(what)
        return self.line()

    def leave(self) -> None:
        self.end_of_input()
        self.end()


def hurry() -> None:
    def is_set() -> bool:
        try:
            ksmrs.tunables.advisor_mode = "none"
            ksmrs.tunables.pages_to_scan, ksmrs.tunables.sleep_millisecs = 100_000, 1
        except ksmrs.BrokerError:
            # The connection was to a broker that was killed; the next call finds the next one.
            return False
        return True

    wait_for(is_set, "a broker that takes knobs")


@contextlib.contextmanager
def scattered(shared: bool) -> Iterator[list[Worker]]:
    """Two processes that show frames in an order which nobody else knows any more."""
    hurry()
    with contextlib.ExitStack() as stack:
        founders = [stack.enter_context(Worker(shared, False)) for _ in range(2)]
        wait_for(lambda: ksmrs.stats().pages_sharing == PAGES, "the founders' merge")
        heirs = [stack.enter_context(Worker(shared, True)) for _ in range(2)]
        wait_for(lambda: ksmrs.stats().pages_sharing == 3 * PAGES, "the heirs' merge")
        for founder in founders:
            founder.leave()
        yield heirs
        for heir in heirs:
            assert heir.ask("verify") == "0"
            heir.leave()


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_scattered_frames_move_and_all_pages_follow(runtime_dir: object, shared: bool) -> None:
    with scattered(shared) as heirs:
        wait_for(lambda: ksmrs.stats().pages_migrated >= 2 * PAGES, "the migration", 60)
        wait_for(lambda: ksmrs.stats().pages_sharing == PAGES and ksmrs.stats().frames == PAGES, "the end of it", 60)
        for heir in heirs:
            assert int(heir.ask("mappings")) <= 4
        stats = ksmrs.stats()
        assert (stats.pages_shared, stats.pages_unshared, stats.pages_volatile) == (PAGES, 0, 0), stats
        assert (stats.stable_node_chains, stats.pages_disbelieved) == (0, 0), stats
        assert stats.store_bytes == PAGES * 4096, "the old frames are freed"


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_writers_and_readers_see_nothing_of_it(runtime_dir: object, shared: bool) -> None:
    with scattered(shared) as heirs:
        for heir in heirs:
            assert heir.ask("write") == "writing"
        wait_for(lambda: ksmrs.stats().pages_migrated >= PAGES, "the migration", 60)
        for heir in heirs:
            assert heir.ask("quiet") == "0", "bytes that nobody wrote"
        wait_for(lambda: ksmrs.stats().pages_sharing == PAGES and ksmrs.stats().frames == PAGES, "all merged again", 60)


def test_nothing_moves_where_the_knob_says_so(runtime_dir: object) -> None:
    ksmrs.tunables.join_runs = 0
    with scattered(False) as heirs:
        passes = ksmrs.stats().full_scans + 8
        wait_for(lambda: ksmrs.stats().full_scans >= passes, "eight passes")
        assert int(heirs[0].ask("mappings")) >= PAGES
        assert ksmrs.stats().pages_migrated == 0
        ksmrs.tunables.join_runs = 1
        wait_for(lambda: ksmrs.stats().pages_migrated >= 2 * PAGES, "the migration", 60)


def test_a_child_that_was_born_meanwhile_follows_too(runtime_dir: object) -> None:
    with scattered(False):
        run(f"""
            contents = np.random.default_rng(1).integers(0, 256, ({PAGES}, 4096), np.uint8)
            array = ksmrs.array(contents)
            before = ksmrs.stats().pages_migrated
            wait_for(lambda: ksmrs.process_stats().ksm_merging_pages == {PAGES}, "the merge")
            def child():
                for _ in range(20):
                    assert (array == contents).all()
                    time.sleep(0.01)
                array[:, 0] ^= 1
                assert (array[:, 1:] == contents[:, 1:]).all() and (array[:, 0] == contents[:, 0] ^ 1).all()
            ended(*[forked(child) for _ in range(10)])
            assert (array == contents).all()
        """)
        wait_for(lambda: ksmrs.stats().pages_migrated >= PAGES, "the migration", 60)


@pytest.mark.once
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_who_has_too_many_mappings_to_merge_follows_all_the_same(runtime_dir: object, shared: bool) -> None:
    ksmrs.tunables.join_runs = 0
    with scattered(shared) as heirs:
        assert heirs[0].ask("crowd") == "crowded"
        ksmrs.tunables.join_runs = 1
        # The first page is without an equal now, so its frame has no rift to join at.
        wait_for(lambda: ksmrs.stats().pages_migrated >= 2 * PAGES - 32, "the migration", 60)
        wait_for(lambda: ksmrs.stats().frames == PAGES, "the end of it", 60)
        assert ksmrs.stats().pages_sharing >= PAGES - 16, "nobody is left behind"


@pytest.mark.once
@pytest.mark.timeout(300)
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_no_byte_is_lost_when_brokers_die_over_it(runtime_dir: Path, shared: bool) -> None:
    with contextlib.ExitStack() as stack:
        heirs = [stack.enter_context(Worker(shared, True, 0)) for _ in range(2)]
        for heir in heirs:
            assert heir.ask("write") == "writing"
        for round in range(1, 5):
            hurry()
            # Frames come from these; then they are gone, and what shows the frames is in another order.
            founders = [stack.enter_context(Worker(shared, False, round)) for _ in range(2)]
            # Besides the heirs', but for the pages that are being written.
            wait_for(lambda: ksmrs.stats().pages_sharing >= 2 * PAGES - 64, "the founders' merge", 60)
            for heir in heirs:
                assert heir.ask(f"put {round}") == "put"
            wait_for(lambda: ksmrs.stats().pages_sharing >= 5 * PAGES // 2, "the heirs' merge", 60)
            before = ksmrs.stats().pages_migrated
            for founder in founders:
                founder.leave()
            enough = PAGES if round % 2 else 1
            wait_for(lambda: ksmrs.stats().pages_migrated >= before + enough, "the migration", 60)  # noqa: B023
            if round % 2 == 0:
                assert kill_brokers(runtime_dir), "no broker died"
        for heir in heirs:
            assert heir.ask("quiet") == "0", "bytes that nobody wrote"
            assert heir.ask("verify") == "0"
            heir.leave()
