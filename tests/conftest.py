"""Gives every test a runtime directory, hence a broker, of its own, and looks for what it left behind.

A leak is a failure of the test that made it: descriptors, threads, processes, files in /dev/shm, memory objects that are still
mapped. Never sleeps until something probably happened; never kills by name.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import children
import ksmrs

KEPT = {"ksmrs-table": 1, "ksmrs-staging": 1, "ksmrs-life": 2}
"""What a process that used ksmrs keeps mapped to its end, at most; the client's threads stay as well."""


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PR_GET_THP_DISABLE = 42


def pytest_configure() -> None:
    """Ctrl-C is tested, also where the run was started in the background and inherited that it be ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Which of the two runs this is: with huge pages everywhere, or with none."""
    if ctypes.CDLL(None).prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1:
        return "transparent huge pages: none in this process and its children"
    if HUGE_PAGES.exists():
        return f"transparent huge pages: {'always, for this run' if os.access(HUGE_PAGES, os.W_OK) else HUGE_PAGES.read_text()}"
    return "transparent huge pages: this kernel has none"


@contextmanager
def huge_pages_for(whom: str) -> Iterator[None]:
    """Who gets huge pages, in the kernel's words; only where the caller may say so."""
    before = HUGE_PAGES.read_text()
    HUGE_PAGES.write_text(whom)
    try:
        yield
    finally:
        HUGE_PAGES.write_text(before[before.index("[") + 1 : before.index("]")])


@pytest.fixture(scope="session", autouse=True)
def huge_pages() -> Iterator[None]:
    """Huge pages wherever they fit, where the caller may say so; `unprivileged.py` runs everything again without any."""
    if not os.access(HUGE_PAGES, os.W_OK):
        yield
        return
    with huge_pages_for("always"):
        yield


def links(folder: Path) -> list[str]:
    found = []
    for entry in folder.iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue  # it was the one that lists the folder
    return found


def descriptors() -> Counter[str]:
    """What the program's own descriptors lead to."""
    return Counter(links(Path("/proc/self/fd")))


def ksmrs_objects() -> Counter[str]:
    """Mappings of ksmrs's memory objects by name, and what only the client's threads hold open."""
    mapped = Counter(re.findall(r"/memfd:(ksmrs-?\w*)", Path("/proc/self/maps").read_text()))
    for task in Path("/proc/self/task").iterdir():
        try:
            held = links(task / "fd") if (task / "comm").read_text().startswith("ksmrs-") else []
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has just ended
        for link in held:
            name = re.search(r"memfd:(ksmrs-?\w*)|(socket|userfaultfd)", link)
            if name is not None and (name[1] or name[2]) not in KEPT:
                mapped[f"descriptor {link}"] += 1
    return mapped


def nothing_left() -> bool:
    return all(count <= KEPT.get(name, 0) for name, count in ksmrs_objects().items())


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test's own runtime directory; everything that it starts inherits it."""
    gc.collect()
    before = descriptors()
    files = shared_memory()
    threads = threading.active_count()
    with tempfile.TemporaryDirectory(prefix="ksmrs-test-") as directory:
        path = Path(directory)
        monkeypatch.setenv("KSMRS_RUNTIME_DIR", str(path))
        monkeypatch.setenv("KSMRS_IDLE_SECONDS", "30")
        yield path
        gc.collect()
        ksmrs.disconnect()
        children.kill_brokers(path, signal.SIGTERM)
        left = children.processes_in(path)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"processes left behind: {left}"
    assert threading.active_count() == threads
    # Other programs make and remove files there too; what is left of a test stays.
    children.wait_for(
        lambda: not shared_memory() - files, f"the end of new files in /dev/shm ({shared_memory() - files})", 10
    )
    try:
        children.wait_for(nothing_left, "the end of all of ksmrs's objects", 10)
    except AssertionError as left_over:
        raise AssertionError(f"left mapped or open: {ksmrs_objects()}") from left_over
    opened = descriptors() - before
    assert not opened, f"descriptors left open: {opened}"


@pytest.fixture(params=[False, True], ids=["private", "shared"])
def shared(request: pytest.FixtureRequest) -> bool:
    """Both kinds of region."""
    return bool(request.param)
