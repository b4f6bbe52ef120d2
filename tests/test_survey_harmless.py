"""`ksmrs survey` changes nothing in the process that it looks at, and keeps to its own bounds: memory, CPU, error."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ksmrs
from children import Child, state_of, wait_for
from ksmrs import _doctor, _survey
from surveyed import HOLDS, LEAST, MIB, PAGE, holding, look


def smaps(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    # The shares of a library's pages change with every other program that begins or ends.
    return {
        name: found[name]
        for name in ("Rss", "Pss_Anon", "Anonymous", "Private_Dirty", "Swap", "LazyFree", "AnonHugePages")
    }


def states(*pids: int) -> list[str]:
    return [state_of(pid) for pid in pids]


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


def test_a_share_of_the_cpu_is_kept_and_a_wish_to_end_it_is_heard() -> None:
    program = "room = Room(); room.put(noise(1, 1000) * 60)"
    with holding(program) as (child,):
        slow = look(child, cpu=0.1)
        assert slow.cpu_seconds < 0.1 * slow.seconds * 1.3

        def interrupt(stage: str, done: int, pages: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            look(child, cpu=0.01, progress=interrupt)
    # Its thread has ended, and its descriptors are closed: the fixture looks.
    assert os.getpriority(os.PRIO_PROCESS, 0) == PRIORITY


PRIORITY = os.getpriority(os.PRIO_PROCESS, 0)
