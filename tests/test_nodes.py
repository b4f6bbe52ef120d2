"""`merge_across_nodes=0`: pages merge only with pages of their NUMA node, and count as the kernel would count them.

Most machines have one node, so the build with mutants is told of others: a file says which addresses are on which node
(`rust/sys/src/numa.rs`). What the kernel itself says of nodes is tested there.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from children import Child, run

BUILD = Path(__file__).resolve().parent.parent / "target" / "mutants"
FAKED = pytest.mark.skipif(not (BUILD / "ksmrs").is_dir(), reason="no build with mutants: run make mutants")

PRELUDE = """
import ctypes, re
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
PAGES = 64
NODES = os.environ.get("KSMRS_FAKE_NODES")

def place(*regions):
    '''Regions, or parts of them by their pages, and the node that each is on.'''
    lines = []
    for region, pages, node in regions:
        start, end = (region.address + page * 4096 for page in pages)
        lines.append(f"{start} {end} {node}\\n")
    with open(NODES + ".new", "w") as file:
        file.writelines(lines)
    os.replace(NODES + ".new", NODES)

def shared_and_sharing():
    stats = ksmrs.stats()
    return stats.pages_shared, stats.pages_sharing

def quiet():
    '''Nothing merges but on request, and every page is looked at.'''
    ksmrs.tunables.run = 0
    ksmrs.tunables.smart_scan = 0

def finished():
    '''A merge on request, and one more that finds nothing left.'''
    for _ in range(2):
        assert ksmrs.merge(60).finished
"""


def program(text: str, **names: object) -> str:
    return PRELUDE + "".join(f"{name} = {value!r}\n" for name, value in names.items()) + textwrap.dedent(text)


def faked(tmp_path: Path, text: str, **names: object) -> str:
    return run(program(text, **names), PYTHONPATH=str(BUILD), KSMRS_FAKE_NODES=str(tmp_path / "nodes"))


@FAKED
def test_equal_pages_make_a_frame_on_each_node(shared: bool, tmp_path: Path) -> None:
    faked(
        tmp_path,
        """
        quiet()
        ksmrs.tunables.merge_across_nodes = 0
        regions, contents = equal_regions(PAGES, SHARED, count=5)
        whole = (0, PAGES)
        place((regions[1], whole, 1), (regions[3], whole, 1), (regions[4], whole, 2))
        finished()
        assert merged(*regions[:4]) == 4 * PAGES and merged(regions[4]) == 0
        assert shared_and_sharing() == (2 * PAGES, 2 * PAGES)
        assert ksmrs.stats().pages_unshared == PAGES
        assert all(bytes(region) == contents.tobytes() for region in regions)

        try:
            ksmrs.tunables.merge_across_nodes = 1
        except ValueError as refusal:
            assert re.search(f"cannot change while {2 * PAGES} frames are shared.* set run=2", str(refusal)), refusal
        else:
            raise AssertionError("it changed while pages are merged")
        ksmrs.tunables.merge_across_nodes = 0
        ksmrs.tunables.run = 2
        ksmrs.tunables.merge_across_nodes = 1
        quiet()
        wait_merged(5 * PAGES, *regions)
        assert shared_and_sharing() == (PAGES, 4 * PAGES)

        # And back.
        ksmrs.tunables.run = 2
        ksmrs.tunables.merge_across_nodes = 0
        quiet()
        finished()
        assert merged(regions[4]) == 0
        assert shared_and_sharing() == (2 * PAGES, 2 * PAGES)
        assert all(bytes(region) == contents.tobytes() for region in regions)
        """,
        SHARED=shared,
    )


@FAKED
def test_in_the_background_too_and_zeros_of_all_nodes_are_the_same(shared: bool, tmp_path: Path) -> None:
    faked(
        tmp_path,
        """
        ksmrs.tunables.merge_across_nodes = 0
        ksmrs.tunables.run = 0
        regions, contents = equal_regions(PAGES, SHARED)
        for region in regions:
            region.array(np.uint8, (PAGES, 4096))[:8] = 0
        place((regions[0], (0, 32), 1), (regions[1], (0, PAGES), 1))
        ksmrs.tunables.run = 1
        wait_for(lambda: shared_and_sharing() == (24, 24), f"24 pages on one node, not {shared_and_sharing()}")
        wait_for(lambda: ksmrs.stats().ksm_zero_pages == 16, "zeros of both")
        done = ksmrs.stats().full_scans + 3
        wait_for(lambda: ksmrs.stats().full_scans >= done, "three more passes")
        assert shared_and_sharing() == (24, 24)
        """,
        SHARED=shared,
    )


@FAKED
def test_processes_on_one_node_merge_and_others_do_not(tmp_path: Path) -> None:
    text = """
    regions, contents = equal_regions(PAGES, count=1)
    print("made")
    sys.stdin.readline()
    assert bytes(regions[0]) == contents.tobytes()
    """
    clients = []
    try:
        run("ksmrs.tunables.merge_across_nodes = 0", PYTHONPATH=str(BUILD))
        for number, node in enumerate([0, 1, 1]):
            nodes = tmp_path / f"nodes-{number}"
            nodes.write_text(f"0 {2**63 - 1} {node}\n")
            clients.append(Child(program(text), PYTHONPATH=str(BUILD), KSMRS_FAKE_NODES=str(nodes)))
            assert clients[-1].line() == "made"
        run(
            program(
                """
                wait_for(lambda: ksmrs.merge(60) and shared_and_sharing() == (PAGES, PAGES), "merging on one node")
                finished()
                assert shared_and_sharing() == (PAGES, PAGES)
                wait_for(lambda: ksmrs.stats().pages_unshared == PAGES, "a look at who is alone")
                """
            ),
            PYTHONPATH=str(BUILD),
        )
        for client in clients:
            client.tell()
            client.end()
    finally:
        for client in clients:
            client.__exit__(None, None, None)


@FAKED
def test_a_page_that_nobody_writes_keeps_its_node(shared: bool, tmp_path: Path) -> None:
    faked(
        tmp_path,
        """
        MANY = 1024

        def tracked(region):
            maps = open("/proc/self/smaps").read()
            inside = re.search(rf"^{region.address:x}-.*?^VmFlags: ([^\\n]*)", maps, re.M | re.S)
            return inside is not None and "uw" in inside[1].split()

        ksmrs.connect(dirty_tracking=True)
        quiet()
        regions, contents = equal_regions(MANY, SHARED, count=1)
        one = regions[0]
        place((one, (0, MANY), 1))
        rounds = ksmrs.merge(60).rounds + ksmrs.merge(60).rounds
        wait_for(lambda: tracked(one), "registration")
        # Armed and read, and from then on left unread; but read once more when nodes begin to count.
        # In 16 rounds all of a shared region is read for the sake of it.
        rounds += ksmrs.merge(60).rounds
        ksmrs.tunables.merge_across_nodes = 0
        rounds += ksmrs.merge(60).rounds
        # Whoever looks now finds it elsewhere.
        place((one, (0, MANY), 2))
        twin, other = (ksmrs.Region(MANY * 4096, SHARED) for _ in range(2))
        place((one, (0, MANY), 2), (twin, (0, MANY), 1), (other, (0, MANY), 2))
        for region in (twin, other):
            region.array(np.uint8, contents.size)[:] = contents
        rounds += ksmrs.merge(60).rounds
        assert rounds < 16, rounds
        assert (merged(one), merged(twin), merged(other)) == (MANY, MANY, 0)
        assert shared_and_sharing() == (MANY, MANY)
        assert all(bytes(region) == contents.tobytes() for region in (one, twin, other))
        """,
        SHARED=shared,
    )


@FAKED
def test_a_page_that_moved_is_of_its_new_node_once_it_is_read(shared: bool, tmp_path: Path) -> None:
    faked(
        tmp_path,
        """
        ksmrs.connect(dirty_tracking=False)
        quiet()
        ksmrs.tunables.merge_across_nodes = 0
        regions, contents = equal_regions(PAGES, SHARED)
        place((regions[1], (0, PAGES), 1))
        finished()
        assert shared_and_sharing() == (0, 0) and ksmrs.stats().pages_unshared == 2 * PAGES
        place((regions[1], (0, 16), 1))
        finished()
        assert shared_and_sharing() == (PAGES - 16, PAGES - 16) and ksmrs.stats().pages_unshared == 32
        # Written, a page has memory wherever its writer is.
        array = regions[0].array(np.uint8, (PAGES, 4096))
        place((regions[0], (20, 21), 1))
        array[20] = array[0]
        finished()
        assert regions[0].page_states()[20] not in (PageState.MERGED, PageState.ZERO)
        """,
        SHARED=shared,
    )


def test_pages_of_one_node_merge_as_ever(shared: bool) -> None:
    run(
        program(
            """
            # Memory comes from the node of whoever touches it first.
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            quiet()
            ksmrs.tunables.merge_across_nodes = 0
            regions, contents = equal_regions(PAGES, SHARED)
            wait_merged(2 * PAGES, *regions)
            assert shared_and_sharing() == (PAGES, PAGES)
            assert all(bytes(region) == contents.tobytes() for region in regions)
            """,
            SHARED=shared,
        )
    )
