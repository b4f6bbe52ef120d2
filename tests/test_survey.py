"""`ksmrs survey`: every figure against memory whose pages are known, and against what ksmrs then merges.

All expected numbers are arithmetic on what was put into the children's memory.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

import kernel_ksm
import ksmrs
from children import brokers_in, wait_for
from ksmrs import _survey
from surveyed import KNOWN, PAGE, holding, look


def test_every_count_of_known_memory(shared: bool) -> None:
    flags = "SHARED" if shared else "PRIVATE"
    with holding(*(KNOWN.format(flags=flags, seed=seed) for seed in (3, 4))) as children:
        found = look(*children)
    assert found.fraction == 1
    for process in found.processes:
        (kind,) = (kind for kind in process.kinds if kind.pages_read)
        assert kind.kind == ("shared memory" if shared else "anonymous")
        assert (kind.pages_present, kind.pages_fit, kind.pages_shared_already) == (
            300,
            300,
            0,
        ) or kind.pages_present > 300
        assert kind.pages_read == kind.pages_fit == 300
        assert kind.pages_fit_for_kernel == (0 if shared else 300)
        assert process.pages_read == 300
        assert process.pages_zero == 40
        assert process.duplicates_within == 50 - 1
        assert process.duplicates_between == 100 + 1
        assert process.ksm_merging_pages == 100 + 50 + 40
        assert process.pages_volatile == process.pages_unmerged_by_budget == process.pages_out_of_phase == 0
    assert (found.pages_read, found.pages_zero) == (600, 80)
    assert (found.duplicates_within, found.duplicates_between) == (2 * 49, 101)
    # 100 contents twice, and one a hundred times.
    expected = {"pages": 600, "pages_shared": 101, "pages_sharing": 100 + 99, "ksm_zero_pages": 80, "pages_volatile": 0}
    assert expected.items() <= asdict(found.ksmrs).items()
    assert found.ksmrs.saved_bytes == (199 + 80) * PAGE
    assert found.ksmrs.profit_bytes == found.ksmrs.saved_bytes - 600 * ksmrs._ksmrs.METADATA_PER_PAGE
    assert found.ksmrs.error_bytes == 0
    if shared:
        assert found.kernel_ksm.pages == found.kernel_ksm.saved_bytes == 0
    else:
        zero_frames = int(not _survey._number(_survey.KERNEL_KSM / "use_zero_pages"))
        kernel = found.kernel_ksm
        assert (kernel.pages, kernel.pages_sharing + kernel.ksm_zero_pages) == (600, 199 + 80 - zero_frames)


def merging() -> int:
    """Pages that have no memory of their own after one more merge on request."""
    ksmrs.merge(timeout=30)
    now = ksmrs.stats()
    return now.pages_sharing + now.ksm_zero_pages


@pytest.mark.parametrize("shared_too", [False, True])
def test_what_it_says_is_what_merging_gives(shared_too: bool) -> None:
    """The same processes are surveyed, opt all of it in, and merge until nothing more does."""
    merges = """
import ksmrs
for each in rooms:
    ksmrs.madvise(each.memory, ksmrs.MADV_MERGEABLE, 0, each.used)
wait()
"""
    programs = [
        f"rooms = [Room(kind) for kind in ({'PRIVATE, SHARED' if shared_too else 'PRIVATE'},)]\n"
        f"for index, room in enumerate(rooms):\n"
        f"    room.put(noise(10 + index, 300)); room.put(noise(5, 1) * 600); room.zeros(70)\n"
        f"    room.put(noise({seed} + index, 130))\n"
        f"wait()\n{merges}"
        for seed in (20, 30, 20)
    ]
    with holding(*programs) as children:
        found = look(*children)
        for child in children:
            child.tell()
            assert child.line() == "ready"
        # Regions of shared memory begin when it is known that nobody else has it.
        wait_for(lambda: merging() >= found.ksmrs.pages_sharing + found.ksmrs.ksm_zero_pages, "what was foretold", 60)
        merging()
        now = ksmrs.stats()
        for child in children:
            child.tell()
            assert child.line() == "ready"
    count = 6 if shared_too else 3
    most = ksmrs.tunables.max_page_sharing
    frames = -(-600 * count // most)
    assert found.ksmrs.ksm_zero_pages == 70 * count
    # The contents of 300 and 130 pages are apart for the kinds of memory; two of three processes have the latter in common.
    assert found.ksmrs.pages_sharing == (600 * count - frames) + (300 * 2 + 130) * (count // 3)
    for name in ("pages_shared", "pages_sharing", "ksm_zero_pages"):
        assert getattr(found.ksmrs, name) == getattr(now, name), name
    assert found.ksmrs.saved_bytes == now.saved_bytes


KERNEL_MERGES = """
room = Room()
room.put(noise(7, 200)); room.put(noise(5, 1) * 600); room.zeros(70); room.put(noise({seed}, 130))
wait()
assert libc.madvise(ctypes.c_void_p(room.address), ctypes.c_size_t(len(room.memory)), 12) == 0
wait()
"""


@pytest.mark.parametrize("use_zero_pages", [0, 1])
def test_what_it_says_of_the_kernel_is_what_the_kernel_gives(use_zero_pages: int) -> None:
    why_not = kernel_ksm.unavailable()
    if why_not or not (kernel_ksm.KSM / "use_zero_pages").exists():
        pytest.skip(why_not or "this kernel has no use_zero_pages")
    with holding(*(KERNEL_MERGES.format(seed=seed) for seed in (20, 30, 20))) as children:
        knobs: dict[str, int | str] = {
            "advisor_mode": "none",
            "smart_scan": 0,
            "sleep_millisecs": 0,
            "pages_to_scan": 10_000,
        }
        with kernel_ksm.turned({**knobs, "max_page_sharing": 100, "use_zero_pages": use_zero_pages, "run": 0}):
            found = look(*children)
            for child in children:
                child.tell()
                assert child.line() == "ready"
            kernel_ksm.turn("run", 1)
            passes = kernel_ksm.counter("full_scans")
            wait_for(lambda: kernel_ksm.counter("full_scans") > passes + 4, "four passes", 60)
            names = ("pages_shared", "pages_sharing", "ksm_zero_pages")
            given = {name: kernel_ksm.counter(name) for name in names}
            # Looked at again, what is merged is left, and nothing is given a copy by being read.
            again = look(*children)
            assert given == {name: kernel_ksm.counter(name) for name in names}
        for child in children:
            child.tell()
            assert child.line() == "ready"
    assert {name: getattr(found.kernel_ksm, name) for name in given} == given
    frames = 1800 // 100
    zeros = 210 if use_zero_pages else 0
    assert given["ksm_zero_pages"] == zeros
    # 210 of zeros fill two frames and a third one.
    assert given["pages_sharing"] == 1800 - frames + 2 * 200 + 130 + (0 if zeros else 210 - 3)
    assert again.pages_shared_already == sum(given.values())
    assert again.pages_read == 3 * 1000 - again.pages_shared_already and again.kernel_ksm.saved_bytes == 0


def test_it_starts_no_broker(runtime_dir: Path) -> None:
    with holding("room = Room(); room.put(noise(1, 3))") as (child,):
        assert look(child).pages_read == 3
    assert brokers_in(runtime_dir) == []


def test_frames_that_are_there_are_joined() -> None:
    """One process has merged already; another with the same data only joins."""
    merged = """
import ksmrs
room = Room(); room.put(noise(1, 200)); room.put(noise(1, 200))
ksmrs.madvise(room.memory, ksmrs.MADV_MERGEABLE, 0, room.used)
while ksmrs.process_stats().ksm_merging_pages < 400:
    ksmrs.merge(timeout=5)
"""
    with holding(merged, "room = Room(); room.put(noise(1, 200))") as children:
        found = look(*children, min_bytes=64 << 10)
        of_mine, of_other = found.processes
        assert of_mine.pages_merged_already == 400
        assert of_other.pages_merged_already == 0
        (kind,) = (kind for kind in of_mine.kinds if kind.kind == "frames of ksmrs")
        assert kind.pages_merged_already == kind.pages_read == 400
        assert found.ksmrs.pages_sharing >= 200
        less = look(children[0], min_bytes=64 << 10)
    # What the first one alone would save is all that its interpreter has twice.
    assert found.ksmrs.pages_sharing - less.ksmrs.pages_sharing >= 200


OUT_OF_PHASE = """
room = Room()
room.put(bytes({offset}) if {offset} else b"")
room.put(noise(1, {pages}))
"""


@pytest.mark.parametrize("offset", [16, 48, 2048, 4080])
def test_data_at_another_offset_is_found_and_counted_page_by_page(offset: int) -> None:
    with holding(OUT_OF_PHASE.format(offset=0, pages=256), OUT_OF_PHASE.format(offset=offset, pages=256)) as children:
        found = look(*children)
        aligned = look(children[0])
    # Of the second one only the whole pages: its first and its last page hold other bytes as well.
    assert found.pages_out_of_phase == found.processes[1].pages_out_of_phase == 255
    (shift,) = found.shifts
    assert (shift.pages, shift.phase, shift.pid, shift.other_pid) == (
        255,
        PAGE - offset,
        children[1].pid,
        children[0].pid,
    )
    assert found.ksmrs.pages_sharing == found.ksmrs.ksm_zero_pages == 0, "nobody can merge it"
    assert aligned.pages_out_of_phase == 0 and aligned.shifts == ()


def test_only_pages_that_are_equal_are_out_of_phase() -> None:
    changes = "\nfor page in (40, 41, 42, 43, 100, 101, 102, 103): room.memory[page * PAGE + 900] ^= 1"
    with holding(
        OUT_OF_PHASE.format(offset=0, pages=256), OUT_OF_PHASE.format(offset=16, pages=256) + changes
    ) as children:
        found = look(*children)
    assert found.pages_out_of_phase == 255 - 8


def test_data_in_phase_or_that_repeats_itself_is_not_out_of_phase() -> None:
    in_phase = OUT_OF_PHASE.format(offset=PAGE, pages=256)
    repeats = "room = Room(); room.put((noise(9, 3)[:9000]) * 200)"
    with holding(OUT_OF_PHASE.format(offset=0, pages=256), in_phase, repeats) as children:
        found = look(*children)
    assert found.pages_out_of_phase == 0 and found.shifts == ()
    assert found.ksmrs.pages_sharing == 256


def test_a_numpy_array_and_one_of_ksmrs_are_out_of_phase() -> None:
    program = """
import numpy as np, ksmrs
data = np.random.default_rng(1).integers(0, 256, 8 << 20, np.uint8)
mine = ksmrs.array(data)
"""
    with holding(program) as (child,):
        found = look(child, min_bytes=0)
    (longest, *_) = found.shifts
    assert longest.phase in {16, PAGE - 16}
    assert (8 << 20) // PAGE - 1 <= longest.pages <= (8 << 20) // PAGE
