"""Dirty tracking: nothing but the scanner's work depends on it, and nothing of it is left where ksmrs gave memory back.

The children have no huge pages, for memory made of them is not tracked. What a scan must never miss is tested in
`rust/sys/tests`.
"""

from __future__ import annotations

import json
import textwrap

import pytest

import ksmrs
from children import run

PRELUDE = """
import ctypes, json
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
PAGES = 2048

def tracked(address, pages=1):
    '''How many mappings of a range are registered with a userfaultfd.'''
    found = inside = 0
    for line in open("/proc/self/smaps"):
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start < address + pages * 4096 and end > address
        elif inside and line.startswith("VmFlags:"):
            found += "uw" in line.split()
    return found

def contents(seed):
    return np.random.default_rng(seed).integers(1, 256, (PAGES, 4096), np.uint8)

def passes(count):
    before = ksmrs.stats().full_scans
    wait_for(lambda: ksmrs.stats().full_scans >= before + count, "passes", 60)

def quick():
    ksmrs.tunables.advisor_mode = "none"
    ksmrs.tunables.pages_to_scan = 20_000
    ksmrs.tunables.sleep_millisecs = 1
    ksmrs.tunables.smart_scan = 0
"""


def child(program: str) -> str:
    return run(PRELUDE + textwrap.dedent(program))


COUNTED = """
wait_for(lambda: ksmrs.process_stats().dirty_tracking == ("on" if TRACKS else "off: switched off"), "the switch")
quick()
regions = [ksmrs.Region(PAGES * 4096, shared=SHARED) for _ in range(2)]
arrays = [region.array(np.uint8, (PAGES, 4096)) for region in regions]
common = contents(1)
for array, seed in zip(arrays, (2, 3)):
    array[:] = contents(seed)
passes(6)
assert any(tracked(region.address, PAGES) for region in regions) == TRACKS
seen = []
def count():
    passes(4)
    stats = ksmrs.stats()
    names = "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages"
    seen.append([getattr(stats, name) for name in names])
count()
for array in arrays:
    array[512:900] = common[512:900]
    array[1000:1032] = 0
count()
arrays[0][600] = arrays[0][601]
arrays[1][7] = arrays[0][8]
arrays[1][1200:1300] = arrays[0][1200:1300]
count()
with ksmrs.pinned(regions[0]):
    count()
count()
assert (arrays[0][7] == contents(2)[7]).all() and (arrays[0][512:600] == common[512:600]).all()
print(json.dumps(seen))
"""


@pytest.mark.parametrize("switch", ["argument", "environment"])
def test_on_and_off_count_the_same(shared: bool, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for tracks in (True, False):
        argument = f"dirty_tracking={tracks}" if switch == "argument" else ""
        if not argument:
            monkeypatch.setenv("KSMRS_DIRTY_TRACKING", str(int(tracks)))
        program = f"SHARED, TRACKS = {shared}, {tracks}\nksmrs.connect({argument})\n{COUNTED}"
        counts.append(json.loads(child(program).splitlines()[-1]))
    assert counts[0] == counts[1]
    assert len({tuple(count) for count in counts[0]}) > 2, "nothing merged, so nothing was compared"


def test_memory_that_was_opted_out_is_registered_with_nothing() -> None:
    child(
        """
        import mmap
        quick()
        other = ksmrs.Region(4096)  # without any there are no passes
        kinds = {"private": mmap.MAP_PRIVATE, "shared": mmap.MAP_SHARED}
        for kind, flags in kinds.items():
            for merged in (False, True):
                memory = mmap.mmap(-1, PAGES * 4096, flags=flags | mmap.MAP_ANONYMOUS)
                array = np.frombuffer(memory, np.uint8)
                array[:] = contents(4).ravel()
                address = array.__array_interface__["data"][0]
                ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
                wait_for(lambda: tracked(address, PAGES), f"{kind}: registration")
                if merged:
                    twin = ksmrs.array(array[: 700 * 4096])
                    wait_for(lambda: ksmrs.process_stats().ksm_merging_pages >= 1400, "merging")
                ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
                assert tracked(address, PAGES) == 0
                passes(3)
                assert tracked(address, PAGES) == 0, f"{kind}: registered again"
                assert (array == contents(4).ravel()).all()
                # So it may be opted in once more.
                ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
                wait_for(lambda: tracked(address, PAGES), "registration once more")
                ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
                del array
                memory.close()
        """
    )


def test_a_forked_child_tracks_for_itself() -> None:
    child(
        """
        quick()
        region = ksmrs.Region(PAGES * 4096)
        array = region.array(np.uint8, (PAGES, 4096))
        array[:] = contents(5)
        wait_for(lambda: tracked(region.address, PAGES), "registration")

        def born():
            assert tracked(region.address, PAGES) == 0
            # Else it merges with its parent's.
            array[:] = contents(8)
            wait_for(lambda: tracked(region.address, PAGES), "registration in the child")
            assert ksmrs.process_stats().dirty_tracking == "on"
            array[100:400] = 9
            wait_for(lambda: ksmrs.merge(30) and counted() >= 300, "merging of what was written")
            assert (array[400:] == contents(8)[400:]).all() and (array[100:400] == 9).all()

        ended(forked(born))
        assert (array == contents(5)).all()
        assert tracked(region.address, PAGES)
        """
    )


def test_a_disconnected_process_tracks_nothing() -> None:
    child(
        """
        quick()
        region = ksmrs.Region(PAGES * 4096)
        region.array(np.uint8, (PAGES, 4096))[:] = contents(6)
        wait_for(lambda: tracked(region.address, PAGES), "registration")
        ksmrs.disconnect()
        wait_for(lambda: not tracked(region.address, PAGES), "the end of registrations")
        assert ksmrs.process_stats().dirty_tracking == "off: not connected"
        ksmrs.connect(dirty_tracking=False)
        assert ksmrs.merge(30).finished
        assert ksmrs.process_stats().dirty_tracking == "off: switched off"
        ksmrs.disconnect()
        ksmrs.connect(dirty_tracking=True)
        wait_for(lambda: tracked(region.address, PAGES), "registration once more")
        """
    )


def test_where_the_kernel_refuses_pages_are_read() -> None:
    child(
        """
        # Who changed its rights without an exec may not open its pagemap.
        PR_SET_DUMPABLE = 4
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        quick()
        one, two = (ksmrs.array(contents(7)) for _ in range(2))
        wait_for(lambda: ksmrs.merge(30) and ksmrs.process_stats().ksm_merging_pages == 2 * PAGES, "merging")
        state = ksmrs.process_stats().dirty_tracking
        assert os.geteuid() == 0 or state.startswith("off: open on /proc/thread-self/pagemap"), state
        """
    )


def test_nothing_is_tracked_before_the_first_region() -> None:
    assert run("print(ksmrs.process_stats().dirty_tracking)").strip() == ksmrs.ProcessStats().dirty_tracking


def test_connections_that_end_at_once_leave_no_userfaultfd(runtime_dir: object) -> None:
    run(
        """
        from conftest import ksmrs_objects, nothing_left
        for turn in range(300):
            region = ksmrs.Region(2 * 4096)
            ksmrs.connect()
            region.close()
            ksmrs.disconnect()
            if turn % 30 == 29:
                wait_for(nothing_left, f"the end of {ksmrs_objects()}", 5)
        """
    )
