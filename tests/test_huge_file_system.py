"""Objects in a file system that makes huge pages: whoever comes after the process finds every byte.

A page that is there is taken for the object's own, newer than its frame; so none may be there that nobody wrote. The file
system is a tmpfs that the test mounts, which needs root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from file_systems import check_who_comes_after, mounted

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def file_system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A tmpfs whose huge pages are as the parameter says."""
    with mounted(tmp_path / "huge", f"size={16 * SIZE},huge={request.param}") as path:
        yield path


PROGRAM = """
    import ctypes, mmap
    libc = ctypes.CDLL(None, use_errno=True)
    MADV_COLLAPSE = 25
    class Piece(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]
    folder, collapse, referred, equal, written, stops = {folder!r}, {collapse}, {referred}, {equal}, {written}, {stops}
    HUGE = 2 << 20
    def start(memory):
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memories, pipes, below = [], [], []
    for name in "ab":
        with open(folder + "/" + name, "r+b") as file:
            memory = mmap.mmap(file.fileno(), {size})
            # Huge pages have to lie in the file as they do in memory, and the next mapping comes right below the last one.
            while collapse and (rest := start(memory) % HUGE):
                memory.close()
                below.append(mmap.mmap(-1, rest))
                memory = mmap.mmap(file.fileno(), {size})
        address = start(memory)
        if collapse:
            # EAGAIN where a page is on its way just now.
            done = lambda: libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), MADV_COLLAPSE) == 0
            wait_for(done, "huge pages")
        ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
        for page in range(1, len(memory) // 4096, 512) if referred else ():
            pipes.append(os.pipe())
            piece = Piece(address + page * 4096, 4096)
            assert libc.vmsplice(pipes[-1][1], ctypes.byref(piece), ctypes.c_ulong(1), 0) == 4096
        memories.append(memory)
    wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages >= 2 * equal, "merging", 60)
    if not referred:
        wait_for(lambda: all(os.stat(folder + "/" + name).st_blocks == 0 for name in "ab"), "holes")
    ksmrs.merge(5)
    ksmrs.tunables.run = 0
    for page in written:
        memories[1][page * 4096] ^= 0xFF
    there = memories[1][:]
    with open({expected!r}, "wb") as file:
        file.write(there)
    if stops:
        os.kill(os.getpid(), signal.SIGSTOP)
        assert memories[1][:] == there, "pages changed while the process was stopped"
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""

CASES = {
    # What huge pages there are; whether the program asks for some; whether pages are in a pipe; what is written at last.
    "a write to one page": ("always", False, False, (700,)),
    "as many as fit in a file": ("within_size", False, False, (700,)),
    "a page of each is in a pipe": ("always", False, True, ()),
    "a page of each is in a pipe, and others are written": ("always", False, True, (2, 600)),
    "only where the program asked": ("never", True, True, ()),
}


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize(
    ("file_system", "case"), [(how, case) for case, (how, *_) in CASES.items()], indirect=["file_system"]
)
def test_whoever_comes_after_the_process_finds_every_byte(
    file_system: Path, tmp_path: Path, case: str, stops: bool
) -> None:
    """Pages merge, the process dies or stands still, and somebody else opens the objects."""
    _, collapse, referred, written = CASES[case]
    random = np.random.default_rng(5)
    contents = random.integers(1, 255, (2, SIZE // 4096, 4096), np.uint8)
    # Where something is to be left of each huge page, every other page merges.
    equal = slice(0, None, 2 if referred else 1)
    contents[1, equal] = contents[0, equal]
    for name, content in zip("ab", contents, strict=True):
        (file_system / name).write_bytes(content.tobytes())
    program = PROGRAM.format(
        folder=str(file_system),
        collapse=collapse,
        referred=referred,
        equal=len(contents[0, equal]),
        written=written,
        stops=stops,
        size=SIZE,
        expected=str(tmp_path / "expected"),
    )
    check_who_comes_after(program, file_system / "b", tmp_path / "expected", stops=stops)
    assert (file_system / "a").read_bytes() == contents[0].tobytes()
