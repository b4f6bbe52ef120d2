"""A client that is stopped while somebody opens its object: the opener gets every byte, and so does the client when it goes on.

The broker completes the pages in the object under the page-state protocol (rust/sys/src/protocol/lend.rs, and its model
check in rust/sys/tests); here the processes are real, stopped with SIGSTOP, and the outsider knows nothing of ksmrs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from children import Child, brokers_in, wait_for
from test_adopt import CONTENT, PAGES
from test_shared import PAGE, SHM, blocks, outsider_reads

BUILD = Path(__file__).resolve().parent.parent / "target" / "mutants"
WRITTEN_BY_OUTSIDER = 5 * PAGE + 1
WRITTEN_BY_CLIENT = [5 * PAGE + 2, 9 * PAGE]
ZERO_PAGE = 12

CLIENT = f"""
    from test_shared import *
    memory = shared_memory.SharedMemory(create=True, size=CONTENT.size)
    resource_tracker.unregister(memory._name, "shared_memory")
    memory.buf[:] = CONTENT.tobytes()
    memory.buf[{ZERO_PAGE} * PAGE : {ZERO_PAGE + 1} * PAGE] = bytes(PAGE)
    other = anonymous()
    opted_in(memory, other)
    merge(2 * PAGES - 1, memory, other)
    # Merged by the words is not yet freed at home.
    wait_for(lambda: ksmrs.merge(5) and blocks(memory.name) == 0, "holes")
    print(memory.name)
    input()
    for at in {WRITTEN_BY_CLIENT}:
        memory.buf[at] ^= 0xFF
    print("written")
    input()
    assert other[:] == CONTENT.tobytes()
    print(bytes(memory.buf).hex())
    input()
"""

OUTSIDER = """
import os, sys
with open(sys.argv[1], "r+b", buffering=0) as file:
    sys.stdout.write(file.read().hex() + "\\n")
    sys.stdout.flush()
    at = int(sys.argv[2])
    os.pwrite(file.fileno(), b"!", at)
    os.pwrite(file.fileno(), b"?", 12 * 4096 + 7)
    sys.stdin.read()
"""


def expected() -> bytearray:
    content = bytearray(CONTENT.tobytes())
    content[ZERO_PAGE * PAGE : (ZERO_PAGE + 1) * PAGE] = bytes(PAGE)
    return content


@contextmanager
def client(**environment: str) -> Iterator[tuple[Child, str]]:
    """A process with a merged object, and the object's name."""
    with Child(CLIENT, prelude=True, **environment) as child:
        name = child.line()
        try:
            yield child, name
        finally:
            (SHM / name).unlink()


@contextmanager
def outsider(name: str) -> Iterator[subprocess.Popen[str]]:
    """A process that opens the object, prints what it reads, and writes a byte in a merged page and one in a page of zeros."""
    command = [sys.executable, "-c", OUTSIDER, str(SHM / name), str(WRITTEN_BY_OUTSIDER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


def read_by(process: subprocess.Popen[str]) -> bytes:
    assert process.stdout is not None
    return bytes.fromhex(process.stdout.readline())


def after_everybody_wrote() -> bytearray:
    content = expected()
    content[WRITTEN_BY_OUTSIDER] = ord("!")
    content[ZERO_PAGE * PAGE + 7] = ord("?")
    for at in WRITTEN_BY_CLIENT:
        content[at] ^= 0xFF
    return content


def test_a_stopped_client_keeps_nobody_from_its_object() -> None:
    with client() as (child, name):
        child.kill(signal.SIGSTOP)
        try:
            with outsider(name) as process:
                assert read_by(process) == expected(), "the client is stopped all the while"
                assert blocks(name) >= CONTENT.size - PAGE
                child.kill(signal.SIGCONT)
                child.tell()
                assert child.line() == "written"
                assert outsider_reads(name) == after_everybody_wrote()
        finally:
            child.kill(signal.SIGCONT)
        child.tell()
        assert bytes.fromhex(child.line()) == after_everybody_wrote()
        child.tell()
        child.end()
        assert outsider_reads(name) == after_everybody_wrote()


def test_a_client_that_dies_while_its_pages_are_lent_takes_nothing_with_it() -> None:
    with client() as (child, name):
        child.kill(signal.SIGSTOP)
        with outsider(name) as process:
            assert read_by(process) == expected()
            child.kill(signal.SIGKILL)
            child.end(-signal.SIGKILL)
        content = after_everybody_wrote()
        for at in WRITTEN_BY_CLIENT:
            content[at] ^= 0xFF
        assert outsider_reads(name) == content


@pytest.mark.skipif(not (BUILD / "ksmrs").is_dir(), reason="no build with failpoints: run make mutants")
@pytest.mark.parametrize("hit", [1, 2])
def test_a_broker_that_dies_while_it_lends_is_not_missed(runtime_dir: Path, hit: int) -> None:
    build = {"PYTHONPATH": str(BUILD), "KSMRS_FAILPOINTS": f"broker-lends=kill@{hit}"}
    with client(**build) as (child, name):
        (broker,) = brokers_in(runtime_dir)
        child.kill(signal.SIGSTOP)
        with outsider(name) as process:
            wait_for(lambda: broker not in brokers_in(runtime_dir), "the broker's death")
            child.kill(signal.SIGCONT)
            child.tell()
            # Before it has heard of the broker's end: a write to a page that the broker owned waits for it.
            assert child.line() == "written"
            read = read_by(process)
            assert len(read) == PAGES * PAGE
            untouched = [at for at in range(0, len(read), PAGE) if at // PAGE not in {5, 9, ZERO_PAGE}]
            assert all(read[at : at + PAGE] == expected()[at : at + PAGE] for at in untouched)
        child.tell()
        assert bytes.fromhex(child.line()) == after_everybody_wrote()
        child.tell()
        child.end()
        assert outsider_reads(name) == after_everybody_wrote()
