"""File systems that tests mount, and what whoever comes after a process finds in the objects there."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from children import Child, state_of, wait_for
from test_shared import OUTSIDER

MNT_DETACH = 2


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    """A tmpfs with these options, which needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    path.mkdir()
    if libc.mount(b"none", str(path).encode(), b"tmpfs", 0, options.encode()) != 0:
        pytest.skip(f"no tmpfs with {options} can be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield path
    finally:
        assert libc.umount2(str(path).encode(), MNT_DETACH) == 0


def check_who_comes_after(program: str, path: Path, expected: Path, *, stops: bool) -> None:
    """Run a program that dies or stops in the end; who then opens the object finds what the program wrote down as expected."""
    with Child(program) as child:
        wait_for(lambda: state_of(child.pid) in "TZ", "the end of what the child does", 60)
        if state_of(child.pid) == "Z":
            child.end(returncode=-9)
        # What took the room, if there is such a file.
        (path.parent / "junk").unlink(missing_ok=True)
        opened = subprocess.run([sys.executable, "-c", OUTSIDER, path], check=True, stdout=subprocess.PIPE, timeout=60)
        assert opened.stdout == expected.read_bytes()
        if stops:
            os.kill(child.pid, signal.SIGCONT)
            child.end()
