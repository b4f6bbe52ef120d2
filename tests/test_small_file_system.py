"""Objects in a file system of a limited size: merging gives room back that somebody else may take, and no byte is lost by it.

The file system is a tmpfs of a few MiB that the test mounts, which needs root; what is measured of it is statvfs and st_blocks.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ksmrs
from children import run, wait_for
from file_systems import check_who_comes_after, mounted
from test_adopt import CONTENT, PAGES, merge, merged_pages
from test_shared import OUTSIDER

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    with mounted(tmp_path / "small", f"size={SIZE}") as path:
        yield path


def room(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_bsize


def fill_up(folder: Path) -> Path:
    """Take all the room that there is."""
    path = folder / "somebody else's"
    with path.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    assert room(folder) == 0
    return path


def mapped(path: Path) -> mmap.mmap:
    path.write_bytes(CONTENT.tobytes())
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), CONTENT.size)


def test_what_merges_gives_its_room_back_and_writes_still_have_theirs(small: Path) -> None:
    memories = [mapped(small / name) for name in "ab"]
    for memory in memories:
        ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
    before = room(small)
    merge(2 * PAGES, *memories)
    wait_for(lambda: room(small) >= before + 2 * CONTENT.size, "room in the file system")
    taken = fill_up(small)
    # No page has room at home now, and every write is kept all the same.
    expected = bytearray(CONTENT.tobytes())
    for at in range(0, len(expected), 2 * 4096):
        memories[0][at] ^= 0xFF
        expected[at] ^= 0xFF
    assert memories[0][:] == expected
    assert memories[1][:] == CONTENT.tobytes()
    assert room(small) == 0
    taken.unlink()
    for memory in memories:
        ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
    assert (small / "a").read_bytes() == expected
    assert (small / "b").read_bytes() == CONTENT.tobytes()
    assert (small / "a").stat().st_blocks * 512 == CONTENT.size
    for memory in memories:
        memory.close()


def test_nothing_merges_where_there_is_no_room_to_come_back(small: Path) -> None:
    memories = [mapped(small / name) for name in "ab"]
    fill_up(small)
    for memory in memories:
        ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
    for _ in range(3):
        ksmrs.merge(5)
        assert merged_pages(*memories) == 0
        assert all((small / name).stat().st_blocks * 512 == CONTENT.size for name in "ab")
    for memory in memories:
        assert memory[:] == CONTENT.tobytes()
        ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
        memory.close()


def test_whoever_opens_an_object_waits_until_its_pages_have_room(small: Path) -> None:
    memories = [mapped(small / name) for name in "ab"]
    for memory in memories:
        ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
    merge(2 * PAGES, *memories)
    taken = fill_up(small)
    with subprocess.Popen([sys.executable, "-c", OUTSIDER, small / "a"], stdout=subprocess.PIPE) as outsider:
        wait_for(lambda: any("no room at home" in reason for reason in ksmrs.process_stats().not_merging), "a recall")
        assert outsider.poll() is None
        taken.unlink()
        assert outsider.communicate(timeout=40)[0] == CONTENT.tobytes()
    for memory in memories:
        assert memory[:] == CONTENT.tobytes()
        ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
        memory.close()


def test_pages_of_a_dead_client_are_written_back_when_there_is_room(small: Path) -> None:
    for name in "ab":
        (small / name).write_bytes(CONTENT.tobytes())
    run(
        f"""
        import mmap
        memories = []
        for name in "ab":
            with open({str(small)!r} + "/" + name, "r+b") as file:
                memories.append(mmap.mmap(file.fileno(), {CONTENT.size}))
            ksmrs.madvise(memories[-1], ksmrs.MADV_MERGEABLE)
        wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages >= {2 * PAGES}, "merging", 60)
        wait_for(lambda: all(os.stat({str(small)!r} + "/" + name).st_blocks == 0 for name in "ab"), "holes")
        with open({str(small)!r} + "/junk", "ab", buffering=0) as file:
            try:
                while file.write(bytes(4096)): pass
            except OSError:
                pass
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        returncode=-9,
    )
    with subprocess.Popen([sys.executable, "-c", OUTSIDER, small / "a"], stdout=subprocess.PIPE) as outsider:
        with pytest.raises(subprocess.TimeoutExpired):
            outsider.wait(1)
        (small / "junk").unlink()
        assert outsider.communicate(timeout=40)[0] == CONTENT.tobytes()
    assert (small / "b").read_bytes() == CONTENT.tobytes()


SCARCE = """
    import mmap
    small, room, written, last, stops = {small!r}, {room}, {written}, {last}, {stops}
    memories = []
    for name in "ab":
        with open(small + "/" + name, "r+b") as file:
            object = os.dup(file.fileno())
            memories.append(mmap.mmap(file.fileno(), {size}))
        ksmrs.madvise(memories[-1], ksmrs.MADV_MERGEABLE)
    wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages >= {pages} * 2, "merging", 60)
    wait_for(lambda: all(os.stat(small + "/" + name).st_blocks == 0 for name in "ab"), "holes")
    ksmrs.tunables.run = 0
    memory = memories[1]
    for page in written:
        memory[page * 4096] ^= 0xFF
    if room is None:
        os.ftruncate(object, 12 * 4096)
    else:
        with open(small + "/junk", "ab", buffering=0) as junk:
            while os.statvfs(small).f_bfree > room:
                junk.write(bytes(4096))
    if last is None:
        try:
            ksmrs.madvise(memory, ksmrs.MADV_UNMERGEABLE)
            raise SystemExit("there was room")
        except (OSError, MemoryError):
            pass
    else:
        memory[last * 4096] ^= 0xFF
    there = memory[: 12 * 4096] if room is None else memory[:]
    with open({expected!r}, "wb") as file:
        file.write(there)
    if stops:
        os.kill(os.getpid(), signal.SIGSTOP)
        assert memory[:] == there, "pages changed while the process was stopped"
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


SCARCITIES = {
    # Pages of room, pages that are written while there is more of it, the page that is written then.
    "the first part of a block": (3, (15, 9, 13, 11, 14, 10, 12), 1),
    "the last page of a block": (1, (0, 1, 2, 3, 4, 5, 6), 15),
    "pages in order": (3, (0, 1, 2), 3),
    "opting out": (3, (), None),
    "an object cut short": (None, (0, 2, 4, 6, 1, 3, 5), 8),
}


@pytest.mark.parametrize(
    ("case", "stops"),
    [
        (case, stops)
        for case, (room, _, _) in SCARCITIES.items()
        for stops in (False, True)
        if not (stops and room is None)
    ],
)
def test_what_got_no_room_leaves_no_page_half_made(small: Path, tmp_path: Path, case: str, stops: bool) -> None:
    """A break takes pages along, there is room for a few of them, and then the process dies or stands still."""
    room, written, last = SCARCITIES[case]
    for name in "ab":
        (small / name).write_bytes(CONTENT.tobytes())
    program = SCARCE.format(
        small=str(small),
        room=room,
        written=written,
        last=last,
        stops=stops,
        size=CONTENT.size,
        pages=PAGES,
        expected=str(tmp_path / "expected"),
    )
    check_who_comes_after(program, small / "b", tmp_path / "expected", stops=stops)
    assert (small / "a").read_bytes() == CONTENT.tobytes()
