"""Shared memory that programs made: merged in place, guarded by a lease, whole again for whoever opens it.

Outsiders are plain processes that know nothing of ksmrs: they open a name and must read every byte. What is freed is measured
by the object's st_blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import posix_ipc
import pytest

import ksmrs
from children import Child, run, wait_for, wait_merged
from ksmrs import _adopt
from test_adopt import CONTENT, PAGES, content, mappings_of_the_store, merge, merged_pages, opted_in

# Before any test has a runtime directory: it stays, and belongs to none of them.
resource_tracker.ensure_running()

PAGE = 4096
SHM = Path("/dev/shm")
OUTSIDER = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"


def outsider_reads(name: str) -> bytes:
    """What another program finds in an object that it opens by its name."""
    return subprocess.run(
        [sys.executable, "-c", OUTSIDER, SHM / name.lstrip("/")], check=True, stdout=subprocess.PIPE, timeout=40
    ).stdout


def bytes_of(memory: shared_memory.SharedMemory) -> memoryview:
    assert memory.buf is not None, "closed"
    return memory.buf


def blocks(name: str) -> int:
    return (SHM / name.lstrip("/")).stat().st_blocks * 512


def anonymous() -> mmap.mmap:
    memory = mmap.mmap(-1, CONTENT.size)
    memory[:] = CONTENT.tobytes()
    return memory


@contextlib.contextmanager
def shared_memory_object() -> Iterator[shared_memory.SharedMemory]:
    memory = shared_memory.SharedMemory(create=True, size=CONTENT.size)
    bytes_of(memory)[:] = CONTENT.tobytes()
    try:
        yield memory
    finally:
        memory.close()
        memory.unlink()


@contextlib.contextmanager
def posix_object() -> Iterator[tuple[str, mmap.mmap]]:
    name = f"/ksmrs-test-{os.getpid()}"
    made = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=CONTENT.size)
    memory = mmap.mmap(made.fd, made.size)
    made.close_fd()
    memory[:] = CONTENT.tobytes()
    try:
        yield name, memory
    finally:
        ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
        memory.close()
        posix_ipc.unlink_shared_memory(name)


def reasons() -> str:
    return "\n".join(ksmrs.process_stats().not_merging)


def multiprocessing_array() -> Any:
    """An array of `multiprocessing` at the same phase as everything else."""
    array = multiprocessing.get_context("spawn").Array("B", CONTENT.size)
    assert ctypes.addressof(array.get_obj()) % PAGE == 0
    ctypes.memmove(array.get_obj(), CONTENT.tobytes(), CONTENT.size)
    return array


def test_anonymous_shared_memory_merges_in_place() -> None:
    one, other = anonymous(), anonymous()
    view = np.frombuffer(one, np.uint8)
    opted_in(one, other)
    merge(2 * PAGES, one, other)
    assert content(one) == content(other) == CONTENT.tobytes()
    view[5 * PAGE] ^= 255
    assert one[5 * PAGE] == CONTENT[5 * PAGE] ^ 255 and other[5 * PAGE] == CONTENT[5 * PAGE]
    del view
    ksmrs.madvise(one, ksmrs.MADV_UNMERGEABLE)
    ksmrs.madvise(other, ksmrs.MADV_UNMERGEABLE)
    assert mappings_of_the_store() == 0 and _adopt._holds == {}
    one.close()
    other.close()


def test_its_kinds_merge_with_each_other() -> None:
    with shared_memory_object() as memory, posix_object() as (name, mapped):
        half, unnamed = np.frombuffer(mapped, np.uint8)[: CONTENT.size // 2], anonymous()
        opted_in(memory, half, unnamed)
        merge(2 * PAGES + PAGES // 2, memory.buf, half, unnamed)
        assert blocks(memory.name) == 0
        assert blocks(name) == CONTENT.size // 2
        assert content(memory.buf) == content(mapped) == content(unnamed) == CONTENT.tobytes()
        for buffer in (memory, half, unnamed):
            ksmrs.madvise(buffer, ksmrs.MADV_UNMERGEABLE)
        assert blocks(memory.name) == blocks(name) == CONTENT.size
        assert mappings_of_the_store() == 0 and _adopt._holds == {}
        del half


def test_an_outsider_waits_and_reads_every_byte_and_merging_ends_until_it_is_gone() -> None:
    with shared_memory_object() as memory, posix_object() as (_, mapped):
        opted_in(memory, mapped)
        merge(2 * PAGES, memory, mapped)
        assert blocks(memory.name) == 0
        bytes_of(memory)[3 * PAGE] = 0
        expected = content(memory.buf)
        assert outsider_reads(memory.name) == expected
        with (SHM / memory.name).open("r+b") as opened:
            assert merged_pages(memory.buf) == 0 and merged_pages(mapped) == PAGES
            ksmrs.merge(5)
            assert merged_pages(memory.buf) == 0 and "open more than once" in reasons()
            opened.write(b"abc")
        assert bytes(bytes_of(memory)[:3]) == b"abc"
        merge(PAGES - 2, memory.buf)
        wait_for(lambda: not reasons(), "the end of what kept it from merging", 10)
        assert outsider_reads(memory.name) == b"abc" + expected[3:]


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "sys.exit()", "os.execv('/bin/true', ['true'])"]
)
def test_an_object_outlives_its_client_with_all_its_bytes(end: str) -> None:
    with Child(
        f"""
        from test_shared import *
        memory = shared_memory.SharedMemory(create=True, size=CONTENT.size)
        resource_tracker.unregister(memory._name, "shared_memory")
        memory.buf[:] = CONTENT.tobytes()
        other = anonymous()
        opted_in(memory, other)
        merge(2 * PAGES, memory, other)
        memory.buf[7 * PAGE + 1] = 0
        assert blocks(memory.name) <= 16 * PAGE
        print(memory.name)
        input()
        {end}
        """
    ) as child:
        name = child.line()
        try:
            expected = CONTENT.copy()
            expected[7 * PAGE + 1] = 0
            child.tell()
            child.end(-signal.SIGKILL if "SIGKILL" in end else 0)
            assert outsider_reads(name) == expected.tobytes()
            assert blocks(name) == CONTENT.size
        finally:
            (SHM / name).unlink()


def test_what_was_opted_in_in_part_is_opted_in_as_a_whole() -> None:
    memory, other = anonymous(), anonymous()
    ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE, 0, 16 * PAGE)
    ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
    opted_in(memory, other)
    merge(2 * PAGES, memory, other)
    assert content(memory) == content(other) == CONTENT.tobytes()


def test_a_dead_broker_leaves_objects_whole() -> None:
    with shared_memory_object() as memory, posix_object() as (_, mapped):
        opted_in(memory, mapped)
        merge(2 * PAGES, memory, mapped)
        os.kill(broker_pid(), signal.SIGKILL)
        assert outsider_reads(memory.name) == CONTENT.tobytes()
        merge(2 * PAGES, memory, mapped)
        assert blocks(memory.name) == 0
        ksmrs.disconnect()
        assert outsider_reads(memory.name) == CONTENT.tobytes()
        ksmrs.connect()
        merge(2 * PAGES, memory, mapped)


def broker_pid() -> int:
    from ksmrs import _ksmrs

    status = _ksmrs.status()
    assert status is not None
    return int(status["pid"])


def test_a_process_that_has_it_already_keeps_it_from_merging() -> None:
    run(
        """
        from test_shared import *
        memory, other = anonymous(), anonymous()
        ready, wait = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            memory[PAGE] = 1
            os.write(ready[1], b"x")
            os.read(wait[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        opted_in(memory, other)
        ksmrs.merge(5)
        assert merged_pages(memory) == 0 and f"process {pid} maps it too" in reasons(), reasons()
        os.write(wait[1], b"x")
        os.waitpid(pid, 0)
        merge(2 * PAGES - 2, memory, other)
        assert reasons() == "" and memory[PAGE] == 1
        # A child forked from now on sees all of it, and writes to the same memory.
        pid = os.fork()
        if pid == 0:
            same = content(other) == CONTENT.tobytes()
            memory[2 * PAGE] = 2
            os.write(ready[1], b"y" if same else b"n")
            os.read(wait[0], 1)
            os._exit(0)
        assert os.read(ready[0], 1) == b"y" and memory[2 * PAGE] == 2
        ksmrs.merge(5)
        assert merged_pages(memory, other) == 0
        os.write(wait[1], b"x")
        os.waitpid(pid, 0)
        merge(2 * PAGES - 4, memory, other)
        assert memory[2 * PAGE] == 2
        """
    )


def test_two_processes_never_opt_the_same_object_in() -> None:
    with (
        posix_object() as (name, mapped),
        Child(
            f"""
        from test_shared import *
        opened = posix_ipc.SharedMemory({name!r})
        mapped = mmap.mmap(opened.fd, opened.size)
        opted_in(mapped)
        ksmrs.merge(5)
        print(reasons(), flush=True)
        input()
        assert content(mapped) == CONTENT.tobytes()
        """
        ) as child,
    ):
        assert child.line().endswith(f"process {os.getpid()} maps it too")
        opted_in(mapped)
        ksmrs.merge(5)
        assert merged_pages(mapped) == 0 and f"process {child.pid}" in reasons()
        child.tell()
        child.end()


def test_shared_memory_closes_and_its_bytes_stay() -> None:
    with shared_memory_object() as memory, posix_object() as (_, mapped):
        opted_in(memory, mapped)
        merge(2 * PAGES, memory, mapped)
        memory.close()
        assert outsider_reads(memory.name) == CONTENT.tobytes()
        again = shared_memory.SharedMemory(memory.name)
        opted_in(again)
        again.close()
        with pytest.raises(BufferError):
            mapped.close()


def test_holes_get_no_memory_by_being_scanned() -> None:
    memory = shared_memory.SharedMemory(create=True, size=1024 * PAGE)
    bytes_of(memory)[: 8 * PAGE] = CONTENT.tobytes()[: 8 * PAGE]
    try:
        opted_in(memory)
        wait_for(lambda: ksmrs.merge(5).finished and ksmrs.stats().full_scans > 3, "full scans")
        assert blocks(memory.name) <= 16 * PAGE
        assert bytes(bytes_of(memory)[8 * PAGE :]) == bytes(1016 * PAGE)
    finally:
        memory.close()
        memory.unlink()


def test_what_may_not_take_part_is_refused_with_its_path(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(CONTENT.tobytes())
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        # On a tmpfs it would be as good as any object.
        on_tmpfs = (
            subprocess.run(["stat", "-fc", "%T", tmp_path], check=True, stdout=subprocess.PIPE).stdout == b"tmpfs\n"
        )
        if not on_tmpfs:
            with pytest.raises(ksmrs.ForeignMemoryError, match=str(file)):
                ksmrs.madvise(mapped, ksmrs.MADV_MERGEABLE)
        assert mapped[:] == CONTENT.tobytes()
    fd = os.memfd_create("ksmrs-test")
    os.truncate(fd, CONTENT.size)
    with mmap.mmap(fd, CONTENT.size) as mapped:
        mapped[:] = CONTENT.tobytes()
        with pytest.raises(ksmrs.ForeignMemoryError, match="exclusive"):
            ksmrs.madvise(mapped, ksmrs.MADV_MERGEABLE)
        other = anonymous()
        ksmrs.madvise(mapped, ksmrs.MADV_MERGEABLE, exclusive=True)
        opted_in(other)
        merge(2 * PAGES, mapped, other)
        assert os.fstat(fd).st_blocks == 0
        ksmrs.madvise(mapped, ksmrs.MADV_UNMERGEABLE)
        assert os.pread(fd, CONTENT.size, 0) == CONTENT.tobytes()
        ksmrs.madvise(other, ksmrs.MADV_UNMERGEABLE)
    os.close(fd)


def test_an_object_that_the_program_maps_twice_is_refused() -> None:
    half = CONTENT.size // 2
    fd = os.memfd_create("ksmrs-test")
    os.truncate(fd, CONTENT.size)
    with mmap.mmap(fd, CONTENT.size) as mapped:
        mapped[:] = CONTENT.tobytes()
        with mmap.mmap(fd, half) as again:
            with pytest.raises(
                ksmrs.ForeignMemoryError, match=r"memfd:ksmrs-test.* maps the same object once more.*unmap it"
            ):
                ksmrs.madvise(mapped, ksmrs.MADV_MERGEABLE, exclusive=True)
            assert again[:] == mapped[:half] and merged_pages(mapped) == 0
            # What it does not show may take part.
            ksmrs.madvise(mapped, ksmrs.MADV_MERGEABLE, half, half, exclusive=True)
        ksmrs.madvise(mapped, ksmrs.MADV_MERGEABLE, exclusive=True)
        ksmrs.madvise(mapped, ksmrs.MADV_UNMERGEABLE)
    os.close(fd)


def test_an_object_that_is_cut_short_loses_no_merged_page() -> None:
    ksmrs.tunables.smart_scan = 0
    fd = os.memfd_create("ksmrs-test")
    os.truncate(fd, CONTENT.size)
    with mmap.mmap(fd, CONTENT.size) as mapped:
        mapped[:] = CONTENT.tobytes()
        ksmrs.madvise(mapped, ksmrs.MADV_MERGEABLE, exclusive=True)
        other = anonymous()
        opted_in(other)
        merge(2 * PAGES, mapped, other)
        os.truncate(fd, CONTENT.size // 2)
        assert ksmrs.merge(30).finished
        stats = ksmrs.stats()
        assert (stats.pages_shared, stats.pages_sharing, stats.frames) == (PAGES, PAGES, PAGES)
        assert mapped[:] == CONTENT.tobytes()
        with pytest.raises(OSError, match=r"cut short: make it as long as it was \(ftruncate\) and opt out again"):
            ksmrs.madvise(mapped, ksmrs.MADV_UNMERGEABLE)
        assert mapped[:] == CONTENT.tobytes()
        os.truncate(fd, CONTENT.size)
        ksmrs.madvise(mapped, ksmrs.MADV_UNMERGEABLE)
        assert mapped[:] == os.pread(fd, CONTENT.size, 0) == CONTENT.tobytes()
        ksmrs.madvise(other, ksmrs.MADV_UNMERGEABLE)
    os.close(fd)


def test_a_region_with_a_name() -> None:
    name = f"/ksmrs-test-named-{os.getpid()}"
    region = ksmrs.Region(CONTENT.size, name=name)
    try:
        with pytest.raises(FileExistsError, match=name):
            ksmrs.Region(CONTENT.size, name=name)
        array = region.array(np.uint8, (CONTENT.size,))
        array[:] = CONTENT
        other = anonymous()
        opted_in(other)

        wait_merged(PAGES, region)
        assert blocks(name) == 0 and region.name == name and region.shared
        assert outsider_reads(name) == CONTENT.tobytes()
        wait_merged(PAGES, region)
        array[PAGE] = 0
        del array
        region.close()
        assert outsider_reads(name)[PAGE] == 0
        del region
        ksmrs.madvise(other, ksmrs.MADV_UNMERGEABLE)
        assert mappings_of_the_store() == 0
    finally:
        posix_ipc.unlink_shared_memory(name)


def test_an_embedded_broker_leaves_named_objects_alone() -> None:
    run(
        """
        from test_shared import *
        ksmrs.connect(embedded=True)
        with shared_memory_object() as memory:
            one, other = anonymous(), anonymous()
            opted_in(memory, one, other)
            merge(2 * PAGES, one, other)
            assert merged_pages(memory) == 0 and "embedded broker" in reasons(), reasons()
        """
    )


def test_an_array_sent_to_a_spawned_process_is_opted_out_first() -> None:
    run(
        """
        from test_adopt import states
        from test_shared import *
        array, other = multiprocessing_array(), anonymous()
        opted_in(array, other)
        merge(2 * PAGES - 1, array, other)
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=add_one, args=(array,))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert states(array) == b""
        assert bytes(array.get_obj())[:CONTENT.size] == (CONTENT + 1).tobytes()
        """,
        seconds=100,
    )


def add_one(array: Any) -> None:
    view = np.frombuffer(array.get_obj(), np.uint8)
    assert view[: CONTENT.size].tobytes() == CONTENT.tobytes()
    view[:] += 1
