"""What an event does to each counter: the table "Events and counters" of DESIGN.md, row by row.

Two processes hold the same 64 pages, no two of one alike, and this process asks. Before each event everything is merged; after
it the counters are named that changed, and all others must not have. Relies on conditions, never on time.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import ksmrs
from children import Child, wait_for

PAGES = 64
COUNTED = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "frames",
    "regions",
    "clients",
    "clients_unplanned",
    "references_in_limbo",
)
MERGED = {
    "pages_shared": PAGES,
    "pages_sharing": PAGES,
    "pages_unshared": 0,
    "pages_volatile": 0,
    "ksm_zero_pages": 0,
    "frames": PAGES,
    "regions": 2,
    "clients": 3,
    "clients_unplanned": 0,
    "references_in_limbo": 0,
}
"""Two processes that show each frame, and the one that asks."""
ALONE = {"pages_sharing": 0, "regions": 1}
"""One of the two processes shows nothing any more; the other shows what it showed."""


class Worker(Child):
    def __init__(self, shared: bool) -> None:
        super().__init__(
            f"""
            (region,), contents = equal_regions({PAGES}, {shared}, count=1)
            print("ready")
            for line in sys.stdin:
                exec(line)
                print("done")
            """
        )
        assert self.line() == "ready"

    def do(self, statement: str) -> None:
        self.tell(statement)
        assert self.line() == "done"


def counters() -> dict[str, int]:
    stats = ksmrs.stats()
    return {name: getattr(stats, name) for name in COUNTED}


def expect(**changed: int) -> None:
    """The counters come to this, and stay there for a whole merge on request."""
    expected = MERGED | changed

    def settled() -> bool:
        report = ksmrs.merge(30)
        return report.finished and report.pages_merged == 0 and counters() == expected

    try:
        wait_for(settled, "the counters")
    except AssertionError:
        now = counters()
        differ = {name: (now[name], expected[name]) for name in COUNTED if now[name] != expected[name]}
        raise AssertionError(f"(found, expected): {differ}") from None


@pytest.fixture
def workers(shared: bool, runtime_dir: object) -> Iterator[tuple[Worker, Worker]]:
    with ExitStack() as ends:
        ksmrs.connect()
        # Smart scan would leave pages out that the rows name.
        ksmrs.tunables.smart_scan = 0
        one, other = (ends.enter_context(Worker(shared)) for _ in range(2))
        expect()
        yield one, other


def test_a_client_that_exits(workers: tuple[Worker, Worker]) -> None:
    workers[1].end_of_input()
    workers[1].end()
    expect(**ALONE, clients=2)


def test_a_client_that_is_killed(workers: tuple[Worker, Worker]) -> None:
    workers[1].kill()
    workers[1].end(-signal.SIGKILL)
    expect(**ALONE, clients=2)


def test_a_client_that_is_stopped_keeps_what_it_shows(workers: tuple[Worker, Worker]) -> None:
    workers[1].kill(signal.SIGSTOP)
    try:
        wait_for(lambda: counters() == MERGED | {"clients_unplanned": 1}, "the client to be left out")
    finally:
        workers[1].kill(signal.SIGCONT)
    expect()


def test_a_closed_region(workers: tuple[Worker, Worker]) -> None:
    workers[1].do("region.close()")
    expect(**ALONE)


def test_the_last_region_takes_its_frames_along(workers: tuple[Worker, Worker]) -> None:
    for worker in workers:
        worker.do("region.close()")
    expect(pages_shared=0, pages_sharing=0, frames=0, regions=0)


def test_an_unmerged_range_counts_nowhere(workers: tuple[Worker, Worker]) -> None:
    workers[1].do("ksmrs.madvise(region, ksmrs.MADV_UNMERGEABLE, 0, 16 * 4096)")
    expect(pages_sharing=PAGES - 16)
    workers[1].do("ksmrs.madvise(region, ksmrs.MADV_MERGEABLE, 0, 16 * 4096)")
    expect()


def test_written_pages(workers: tuple[Worker, Worker], shared: bool) -> None:
    before = ksmrs.stats().cow_ksm
    # Both at once, with one new content, the last page first: of the sixteen none has an equal but its counterpart.
    for worker in workers:
        worker.do("for page in reversed(range(16)): region.array('u1', (64, 4096))[page, 0] ^= 0xFF")
    expect()
    if shared:
        # How many were written is not known: writes in sequence take neighbours along, which merge again.
        return
    assert ksmrs.stats().cow_ksm == before + 32
    workers[1].do("region.array('u1', (64, 4096))[63, 0] ^= 0xFF")
    expect(pages_sharing=PAGES - 1, pages_unshared=1)
    assert ksmrs.stats().cow_ksm == before + 33


def test_pages_of_zeros(workers: tuple[Worker, Worker]) -> None:
    workers[0].do("for page in reversed(range(16)): region.array('u1', (64, 4096))[page] = 0")
    expect(pages_sharing=PAGES - 16, ksm_zero_pages=16)


def test_run_2(workers: tuple[Worker, Worker]) -> None:
    ksmrs.tunables.run = 2
    expect(pages_shared=0, pages_sharing=0, frames=0)
    assert ksmrs.stats().full_scans == 0
    ksmrs.tunables.run = 1
    expect()


def test_a_fork(workers: tuple[Worker, Worker], shared: bool) -> None:
    workers[1].do("child = forked(lambda: (ksmrs.connect(), signal.pause()))")
    try:
        if shared:
            # The parent's object is the child's too, and merges for neither; the child keeps its frames.
            wait_for(lambda: counters()["pages_sharing"] == 0, "the parent's pages to have memory of their own")
            assert counters()["frames"] >= PAGES
        else:
            expect(pages_sharing=2 * PAGES, regions=3, clients=4)
    finally:
        workers[1].do("os.kill(child, signal.SIGKILL); os.waitpid(child, 0)")
    expect()


def test_the_last_page_of_a_frame_goes_while_a_child_may_show_it(workers: tuple[Worker, Worker], shared: bool) -> None:
    # Nobody looks at the pages between the fork's preparations, which give shared ones memory of their own, and the fork: else
    # the broker knows that the child cannot show their frames.
    ksmrs.tunables.run = 0
    ksmrs.merge(30)
    # A child that Python does not know of says nothing of what it shows, nor of what it cannot show.
    workers[1].do(
        "import ctypes; child = ctypes.PyDLL(None).fork(); child or os.kill(os.getpid(), signal.SIGSTOP);"
        "assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])"
    )
    try:
        for worker in workers:
            worker.do("region.close()")

        def gone() -> bool:
            now = counters()
            return (now["pages_shared"], now["pages_sharing"], now["regions"]) == (0, 0, 0)

        wait_for(gone, "the pages to be gone")
        ksmrs.merge(30)
        assert counters()["frames"] == PAGES
        assert counters()["references_in_limbo"] >= PAGES
    finally:
        workers[1].do("os.kill(child, signal.SIGKILL); os.waitpid(child, 0)")
    expect(pages_shared=0, pages_sharing=0, frames=0, regions=0)


def test_a_process_asks_for_itself(workers: tuple[Worker, Worker]) -> None:
    workers[1].do(
        "own = ksmrs.process_stats();"
        "assert (own.ksm_merging_pages, own.ksm_zero_pages, own.ksm_rmap_items) == (64, 0, 64), own;"
        "assert own.ksm_process_profit == 64 * (4096 - ksmrs._ksmrs.METADATA_PER_PAGE), own"
    )
    assert ksmrs.process_stats().ksm_merging_pages == 0, "this process has none"
    assert ksmrs.stats().general_profit == PAGES * 4096 - 2 * PAGES * ksmrs._ksmrs.METADATA_PER_PAGE
