"""`ksmrs survey`: every figure against memory whose pages are known, and against what ksmrs then merges.

Children hold the memory in one mapping much larger than any of an interpreter's own, so that `min_bytes` leaves nothing else
to be counted; all expected numbers are arithmetic on what was put there.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kernel_ksm
import ksmrs
from children import Child, brokers_in, ended, forked, wait_for
from ksmrs import _doctor, _survey, _survey_command, _survey_refusal, _survey_report

PAGE = 4096
MIB = 1 << 20
LEAST = 256 * MIB
"""No mapping of an interpreter without NumPy is as large."""
ROOT = os.geteuid() == 0

HOLDS = f"""
import ctypes, mmap, os, random, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
PAGE = {PAGE}
PRIVATE, SHARED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
class Room:
    # A mapping of its own, without huge pages: these would bring pages that nobody wrote.
    def __init__(self, flags=PRIVATE, size={LEAST}):
        self.memory = mmap.mmap(-1, size, flags=flags)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        assert libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(size), 15) == 0
        self.used = 0
    def put(self, data):
        self.memory[self.used : self.used + len(data)] = data
        self.used += len(data)
    def zeros(self, pages):
        # Written, so that they have memory of their own.
        self.put(b"x" * pages * PAGE)
        self.used -= pages * PAGE
        self.put(bytes(pages * PAGE))
def noise(seed, pages):
    return random.Random(seed).randbytes(pages * PAGE)
def wait():
    print("ready", flush=True)
    return sys.stdin.readline()
"""
"""What a child's memory is made with: pages are alike only where their seeds are."""


@contextmanager
def holding(*programs: str) -> Iterator[list[Child]]:
    """Children that made memory and wait to be told to end."""
    with ExitStack() as stack:
        held = [stack.enter_context(Child(HOLDS + program + "\nwait()", prelude=False)) for program in programs]
        for child in held:
            assert child.line() == "ready"
        yield held
        for child in held:
            child.tell()
            child.end()


def look(*children: Child, **options: Any) -> ksmrs.Survey:
    return ksmrs.survey([child.pid for child in children], **{"settle": 0, "cpu": 1.0, "min_bytes": LEAST, **options})


KNOWN = """
room = Room({flags})
room.put(noise(1, 100))
room.put(noise(2, 1) * 50)
room.zeros(40)
room.put(noise({seed}, 110))
"""
"""300 pages: 100 contents that another has too, 50 times one content, 40 of zeros, 110 of nobody else's."""


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


def smaps(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    # The shares of a library's pages change with every other program that begins or ends.
    return {
        name: found[name]
        for name in ("Rss", "Pss_Anon", "Anonymous", "Private_Dirty", "Swap", "LazyFree", "AnonHugePages")
    }


def states(*pids: int) -> list[str]:
    return [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in pids]


def pagemap(pid: int, address: int, pages: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as file:
        file.seek(address // PAGE * 8)
        return np.frombuffer(file.read(pages * 8), np.uint64)


def test_nothing_changes_in_the_process() -> None:
    """Pages without memory, swapped ones where there is swap, and those a fork shares stay what they are; nobody is stopped."""
    program = """
room = Room()
room.put(noise(1, 200))
libc.madvise(ctypes.c_void_p(room.address + 200 * PAGE), ctypes.c_size_t(100 * PAGE), 22)  # zero page by reading
for page in range(200, 300): room.memory[page * PAGE]
room.used = 300 * PAGE
room.put(noise(2, 50))
libc.madvise(ctypes.c_void_p(room.address + 300 * PAGE), ctypes.c_size_t(50 * PAGE), 21)  # paged out, if there is swap
child = os.fork()
if child == 0:
    libc.prctl(1, signal.SIGKILL)  # when its parent ends
    signal.pause()
room.memory[0] = room.memory[0]
print(room.address, child, flush=True)
wait()
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""
    with Child(HOLDS + program, prelude=False) as child:
        address, fork = map(int, child.line().split())
        assert child.line() == "ready"
        wait_for(lambda: states(child.pid, fork) == ["S", "S"])
        before = [(smaps(pid), pagemap(pid, address, 2000)) for pid in (child.pid, fork)]
        found = ksmrs.survey([child.pid, fork], settle=0.1, cpu=1)
        after = [(smaps(pid), pagemap(pid, address, 2000)) for pid in (child.pid, fork)]
        assert states(child.pid, fork) == ["S", "S"]
        assert "TracerPid:\t0" in Path(f"/proc/{child.pid}/status").read_text()
        child.tell()
        child.end()
    for (memory, pages), (memory_after, pages_after) in zip(before, after, strict=True):
        assert memory == memory_after
        assert (pages == pages_after).all(), np.flatnonzero(pages != pages_after)
    shares = {process.pid: process for process in found.processes}
    # All but the page that was written since: sharing it already, they are not to be had once more.
    assert shares[fork].pages_shared_already >= 199
    assert shares[child.pid].pages_shared_already >= 199


def test_pages_that_a_fork_shares_save_nothing() -> None:
    program = """
room = Room()
room.put(noise(1, 300) * 2)
child = os.fork()
if child == 0:
    libc.prctl(1, signal.SIGKILL)  # when its parent ends
    signal.pause()
print(child, flush=True)
wait()
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""
    with Child(HOLDS + program, prelude=False) as child:
        fork = int(child.line())
        assert child.line() == "ready"
        found = ksmrs.survey([child.pid, fork], settle=0, min_bytes=LEAST)
        child.tell()
        child.end()
    assert found.pages_shared_already == 2 * 600
    assert found.pages_read == found.ksmrs.saved_bytes == 0


def test_pages_written_between_the_looks_are_volatile() -> None:
    program = """
room = Room()
room.put(noise(1, 100)); room.put(noise(1, 100)); room.zeros(20)
wait()
for page in [*range(50, 60), 150, 205]: room.memory[page * PAGE] ^= 255
"""
    with holding(program) as (child,):
        made = ksmrs._ksmrs.Survey(MIB, 1.0, LEAST // PAGE)
        made.add(child.pid)
        while made.step(1)[0] == "look":
            pass
        child.tell()
        assert child.line() == "ready"
        while made.step(1)[0] != "done":
            pass
        counted = made.tally((256, True), (256, True), 20_000)
    assert counted["ksmrs"]["pages"] == counted["kernel"]["pages"] == 220
    assert counted["ksmrs"]["pages_volatile"] == counted["kernel"]["pages_volatile"] == 12
    # Of ten pairs at least one page is another now, of one of them both; what is left of the others has no other.
    assert (counted["ksmrs"]["pages_sharing"], counted["ksmrs"]["ksm_zero_pages"]) == (100 - 10, 19)
    assert [made.classes(0).count(number) for number in (0, 1, 2, 6)] == [9, 19, 180, 12]


def test_an_estimate_lies_within_its_error_and_memory_within_its_bound() -> None:
    """20,000 contents of which half are there twice, and a list that has no room for them."""
    program = (
        "room = Room(); room.put(noise(1, 16000)); room.zeros(500); room.put(noise(1, 16000)); room.put(noise(2, 8000))"
    )
    with holding(program) as (child,):
        whole = look(child)
        small = [look(child, memory=MIB) for _ in range(3)]
        sampled = [look(child, sample=0.1) for _ in range(3)]
    assert whole.ksmrs.pages_sharing == 16000 and whole.memory_bytes == 40500 * 28
    for found in small:
        assert found.memory_bytes <= MIB and found.fraction in {0.5, 1 / 4, 1 / 8}
    for found in sampled:
        assert found.fraction == pytest.approx(0.1, rel=1e-6)
    for found in [*small, *sampled]:
        expected_error = (16000 * (1 - found.fraction) / found.fraction) ** 0.5 * PAGE
        assert found.ksmrs.error_bytes == pytest.approx(expected_error, rel=0.1)
        # Five standard errors: once in two million surveys by chance.
        assert abs(found.ksmrs.saved_bytes - whole.ksmrs.saved_bytes) < 5 * expected_error
        assert found.ksmrs.ksm_zero_pages == found.pages_zero == 500, "zeros are counted, not estimated"
        assert found.pages_read == 40500 and any("estimates" in limit for limit in found.limits)
        # A sample of pages by position would have found a tenth of a tenth.
        assert found.duplicates_within > 16000 * found.fraction


def test_scattered_pages_beyond_the_budget_of_mappings_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each second page is equal to one of the other process: two mappings each."""
    program = "room = Room()\nfor page in range(600): room.put(noise(page, 1)); room.put(noise({seed} + page, 1))"
    number = _survey._number
    with holding(program.format(seed=10_000), program.format(seed=20_000)) as children:
        all_of_it = look(*children)
        monkeypatch.setattr(_survey, "_number", lambda path: 3 * 200 if path.name == "max_map_count" else number(path))
        found = look(*children)
    assert all_of_it.ksmrs.pages_sharing == 600
    # A hundred runs each, the first ones in both; so these are whole pairs.
    for process in found.processes:
        assert process.pages_unmerged_by_budget == 600 - 200 // 2
        assert process.ksm_merging_pages == 100
    assert found.ksmrs.pages_sharing == found.ksmrs.pages_shared == 100
    assert any("vm.max_map_count" in limit for limit in found.limits)


def test_a_process_that_ends_meanwhile_does_not_count() -> None:
    dying = Child(HOLDS + "room = Room(); room.put(noise(1, 3000) * 2)\nwait()", prelude=False)
    with holding("room = Room(); room.put(noise(1, 3000))") as (stays,), dying as dies:
        assert dies.line() == "ready"
        made = ksmrs._ksmrs.Survey(MIB, 1.0, LEAST // PAGE)
        for child in (stays, dies):
            made.add(child.pid)
        while made.step(0.0001)[0] == "look" and made.kept()[2] < 3200:
            pass
        assert made.kept()[2] >= 3200
        dies.kill()
        dies.end(-signal.SIGKILL)
        while made.step(1)[0] != "done":
            pass
        counted = made.tally((256, True), (256, True), 20_000)
    assert [process["ended"] for process in counted["processes"]] == [False, True]
    assert counted["ksmrs"]["pages_sharing"] == 0
    assert made.kept()[2] == 3000


def test_a_thread_is_not_another_process() -> None:
    program = """
import threading
thread = threading.Thread(target=signal.pause, daemon=True)
thread.start()
room = Room(); room.put(noise(1, 100))
print(thread.native_id, flush=True)
"""
    with Child(HOLDS + program + "wait()", prelude=False) as child:
        thread = int(child.line())
        assert child.line() == "ready"
        found = ksmrs.survey([child.pid, thread], settle=0, min_bytes=LEAST)
        child.tell()
        child.end()
    assert found.ksmrs.pages_sharing == 0 and found.pages_read == 100
    assert "has the memory of another one" in found.processes[1].refusal


def test_shared_memory_that_two_processes_map_is_none_that_ksmrs_merges() -> None:
    """Each touches pages of its own, so that no page is in both page tables."""
    program = """
room = Room(SHARED)
filled, tell = os.pipe()
child = os.fork()
room.used = 100 * PAGE if child else 0
room.put(noise(1, 100))
if child == 0:
    libc.prctl(1, signal.SIGKILL)
    os.write(tell, b"!")
    signal.pause()
os.read(filled, 1)
print(child, flush=True)
wait()
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""
    with Child(HOLDS + program, prelude=False) as child:
        fork = int(child.line())
        assert child.line() == "ready"
        alone = ksmrs.survey(child.pid, settle=0, min_bytes=LEAST)
        found = ksmrs.survey([child.pid, fork], settle=0, min_bytes=LEAST)
        child.tell()
        child.end()
    assert alone.pages_read == 100, "nobody said that there is another"
    assert found.pages_read == found.ksmrs.saved_bytes == 0
    for process in found.processes:
        kinds = {kind.kind: kind for kind in process.kinds}
        assert "shared memory" not in kinds and kinds["file"].pages_present >= 100


def test_addresses_without_memory_take_no_time() -> None:
    """As a sanitizer's shadow: terabytes of addresses, one page in each 64 GiB."""
    program = """
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
shadow = libc.mmap(None, 1 << 42, 3, 0x4022, -1, 0)
assert libc.madvise(ctypes.c_void_p(shadow), ctypes.c_size_t(1 << 42), 15) == 0
for at in range(0, 1 << 42, 1 << 36): ctypes.memset(shadow + at, 7, 1)
"""
    with holding(program) as (child,):
        found = look(child)
    assert found.pages_read == 64 and found.duplicates_within == 63
    version = _doctor.kernel_version(platform.release())
    if version >= _doctor.TRACKING_KERNEL:
        # Entry by entry they take 13 s.
        assert found.cpu_seconds < 2


def test_its_memory_is_bounded() -> None:
    """Of 300 MiB, all of it different, all of it elsewhere at another offset: the most that lists can hold."""
    program = "data = noise(1, 36000)\nroom = Room(); room.put(data); room.put(b'x' * 16); room.put(data[:-16])"
    surveys = f"""
import resource, sys, ksmrs
ksmrs.survey(int(sys.argv[1]), settle=0, cpu=1, min_bytes=1 << 40, memory={4 * MIB})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
found = ksmrs.survey(int(sys.argv[1]), settle=0, cpu=1, min_bytes={LEAST}, memory=int(sys.argv[2]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
print(found.pages_read, after - before, found.fraction, found.pages_out_of_phase)
"""
    with holding(program.replace("Room()", f"Room(size={300 * MIB})")) as (child,):
        for memory, fractions in ((64 * MIB, {1}), (MIB, {1 / 2, 1 / 4})):
            line = [sys.executable, "-c", surveys, str(child.pid), str(memory)]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            pages, grown, fraction, out_of_phase = map(float, done.stdout.split())
            assert pages == 72_000
            assert fraction in fractions
            # The buffer for reading, a thread's stack and what the allocator rounds up are fixed.
            most = min(memory, 72_000 * ksmrs._ksmrs.Survey.BYTES_PER_PAGE)
            assert grown < most * 1.1 + 1.5 * MIB, (memory, grown)
            assert out_of_phase == pytest.approx(35_999, rel=0.02), "an estimate where contents are sampled"


@pytest.mark.parametrize(
    ("pids", "refused"), [([1 << 22], "there is none"), ([], "no process"), ([0], "is no process")]
)
def test_no_process_to_look_at_is_an_error(pids: list[int], refused: str) -> None:
    with pytest.raises(ksmrs.KsmrsError, match=refused) as raised:
        ksmrs.survey(pids)
    assert isinstance(raised.value, OSError if pids == [1 << 22] else ValueError)


@pytest.mark.parametrize(
    ("option", "value"),
    [("sample", 0), ("sample", 1.5), ("cpu", 0), ("memory", 1000), ("settle", -1), ("min_bytes", -1)],
)
def test_what_is_out_of_range_is_named(option: str, value: float) -> None:
    with pytest.raises(ksmrs.ArgumentError, match=f"{option}={value}"):
        ksmrs.survey(os.getpid(), **{option: value})  # type: ignore[arg-type]


def test_one_that_may_be_looked_at_is_enough() -> None:
    with holding("room = Room(); room.put(noise(1, 7))") as (child,):
        found = ksmrs.survey([1 << 22, child.pid], settle=0, min_bytes=LEAST)
    none, one = found.processes
    assert "there is none" in none.refusal and none.pages_read == 0
    assert one.refusal == "" and one.pages_read == 7


UNDUMPABLE = "assert libc.prctl(4, 0, 0, 0, 0) == 0"


def test_refusals_say_what_forbids_it_and_the_next_step() -> None:
    """As an ordinary user, for root is refused nothing."""
    with holding("room = Room()", UNDUMPABLE) as (child, undumpable):
        said = as_nobody([child.pid, undumpable.pid, 1])
    if ROOT:
        assert all("it is of user 0 (root), and this is 65534" in line and "as root" in line for line in said), said
    else:
        assert said[0] == "looked at"
        assert "it is not dumpable" in said[1] and "as root" in said[1]
        assert "it is of user 0 (root)" in said[2]


@pytest.mark.skipif(not ROOT, reason="only root can make a process of somebody else's")
def test_an_ordinary_user_looks_at_its_own_and_at_none_that_is_not_dumpable() -> None:
    drops = "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
    # Whoever changes its user is not dumpable until it says so.
    with holding(drops, drops + "libc.prctl(4, 1, 0, 0, 0)") as (undumpable, child):
        said = as_nobody([undumpable.pid, child.pid])
    assert "it is not dumpable" in said[0] and "as root" in said[0]
    assert said[1] == "looked at"


def as_nobody(pids: list[int]) -> list[str]:
    """What an ordinary user hears of these processes."""
    ours, theirs = os.pipe()

    def ask() -> None:
        if ROOT:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        for pid in pids:
            try:
                ksmrs.survey(pid, settle=0)
                os.write(theirs, b"looked at\n")
            except ksmrs.SystemCallError as refused:
                assert isinstance(refused, OSError)
                os.write(theirs, f"{refused}\n".encode())

    ended(forked(ask))
    os.close(theirs)
    with os.fdopen(ours) as said:
        return said.read().splitlines()


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        (1, "ksmrs survey -- COMMAND"),
        (2, "root only"),
        (3, "nobody until the next boot"),
        (None, "security module|seccomp"),
    ],
)
def test_yama_is_named(scope: int | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "ptrace_scope"
    if scope is not None:
        file.write_text(f"{scope}\n")
    monkeypatch.setattr(_survey_refusal, "YAMA", file)
    assert re.search(said, _survey_refusal.reason(os.getpid(), PermissionError(errno.EACCES, "refused")))


def command(*arguments: str | int | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ksmrs", "survey", *map(str, arguments)]
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
        **options,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_json_has_every_field_and_a_picture_every_page(tmp_path: Path) -> None:
    with holding(*(KNOWN.format(flags="PRIVATE", seed=seed) for seed in (3, 4))) as children:
        pids = [str(child.pid) for child in children]
        done = command("--json", "--settle", "0", "--min-bytes", LEAST, "--png", tmp_path / "pages.png", *pids)
        people = command("--settle", "0", "--min-bytes", str(LEAST), *pids)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said) == {field for field in ksmrs.Survey.__dataclass_fields__ if field != "page_classes"} | {
        "page_size"
    }
    assert set(said["ksmrs"]) == set(said["kernel_ksm"]) == set(_survey.EngineSurvey.__dataclass_fields__)
    for process in said["processes"]:
        assert set(process) == set(_survey.ProcessSurvey.__dataclass_fields__)
        assert all(set(kind) == set(_survey.MappingKind.__dataclass_fields__) for kind in process["kinds"])
    assert (said["ksmrs"]["pages_sharing"], said["pages_read"], said["page_size"]) == (199, 600, PAGE)
    assert people.returncode == 0 and people.stderr == "", "no bar where there is no terminal"
    assert "what merging would save, of 2.3 MiB read" in people.stdout
    for child in children:
        assert str(child.pid) in people.stdout

    pixels = np.asarray(Image.open(tmp_path / "pages.png").convert("RGB"))
    expected = [3] * 100 + [3] * 50 + [1] * 40 + [0] * 110
    for first in (0, 2):  # 300 pages are a line and a bit
        for page, number in enumerate(expected):
            colour = tuple(pixels[first + page // 256, page % 256].tolist())
            assert colour == _survey_report.CLASSES[number][1], (first, page)


def test_classes_have_colours_of_their_own() -> None:
    colours = [colour for _, colour in _survey_report.CLASSES.values()]
    assert len(set(colours)) == len(colours) and list(_survey_report.CLASSES) == list(range(len(colours)))


def program_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "program.py"
    path.write_text(HOLDS + text)
    return path


def test_a_command_is_surveyed_with_its_children_and_passes_its_status_on(tmp_path: Path) -> None:
    """It ends when the report is there, so the survey looked while it lived."""
    report = tmp_path / "report.json"
    program = program_file(
        tmp_path,
        f"""
import pathlib, time
for seed in (3, 4):
    if os.fork() == 0: break
else:
    seed = None
if seed is not None:
    room = Room(); room.put(noise(1, 500)); room.put(noise(seed, 20))
report = pathlib.Path({str(report)!r})
os.write(1, b"its own output\\n")
while not (report.exists() and report.read_text().endswith("}}\\n")): time.sleep(0.05)
if seed is None:
    os.wait(); os.wait()
sys.exit(7)
""",
    )
    done = command("--json", "--output", report, "--settle", "0", "--min-bytes", LEAST, "--", sys.executable, program)
    assert done.returncode == 7, done.stderr
    assert done.stdout == "its own output\n" * 3 and done.stderr == ""
    said = json.loads(report.read_text())
    assert [process["pages_read"] for process in said["processes"]] == [0, 520, 520]
    assert said["ksmrs"]["pages_sharing"] == 500


def test_a_command_that_ends_too_early_says_so() -> None:
    done = command("--", sys.executable, "-c", "print('done'); raise SystemExit(3)")
    assert (done.returncode, done.stdout) == (3, "done\n")
    assert "before it was looked at" in done.stderr and "--after" in done.stderr
    killed = command("--", sys.executable, "-c", "import os; os.kill(os.getpid(), 15)")
    assert killed.returncode == 128 + 15
    assert command("--", "no-such-command-anywhere").returncode == 1


def test_a_signal_asks_for_the_look(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    program = program_file(
        tmp_path,
        f"""
import pathlib, time
room = Room(); room.put(noise(1, 30) * 2)
report = pathlib.Path({str(report)!r})
os.kill(os.getppid(), signal.SIGUSR1)
while not (report.exists() and report.read_text().endswith("}}\\n")): time.sleep(0.05)
""",
    )
    options: list[str | int | Path] = [
        "--json",
        "--output",
        report,
        "--after",
        "3600",
        "--settle",
        "0",
        "--min-bytes",
        LEAST,
    ]
    done = command(*options, "--", sys.executable, program)
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["ksmrs"]["pages_sharing"] == 30


def test_memory_has_stopped_growing_after_two_seconds_of_the_same() -> None:
    growth = _survey_command.Growth()
    assert not growth.has_stopped(0, 0.0), "nothing there is not worth a look"
    assert not growth.has_stopped(1000, 1.0)
    assert not growth.has_stopped(1005, 2.9)
    assert growth.has_stopped(1009, 3.0)
    assert not growth.has_stopped(1011, 3.1), "more than a hundredth"
    assert not growth.has_stopped(1011, 5.0)
    assert growth.has_stopped(1011, 5.2)


def test_options_that_mean_nothing_are_refused() -> None:
    assert "--after is for a command" in command("--after", "1", "1").stderr
    assert "--children is for processes" in command("--children", "--", "true").stderr
    assert "name processes by their numbers" in command("1", "--", "true").stderr
    assert "is not a valid integer" in command("true").stderr, "without -- it is no command"
    assert command().returncode == 2


def test_a_share_of_the_cpu_is_kept_and_a_wish_to_end_it_is_heard() -> None:
    program = "room = Room(); room.put(noise(1, 1000) * 60)"
    with holding(program) as (child,):
        fast = look(child, cpu=1.0)
        slow = look(child, cpu=0.1)
        assert slow.cpu_seconds < 0.1 * slow.seconds * 1.3
        assert slow.seconds > 3 * fast.seconds

        def interrupt(stage: str, done: int, pages: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            look(child, cpu=0.01, progress=interrupt)
    # Its thread has ended, and its descriptors are closed: the fixture looks.
    assert os.getpriority(os.PRIO_PROCESS, 0) == PRIORITY


PRIORITY = os.getpriority(os.PRIO_PROCESS, 0)
