"""Directed scenes for the mutants that a random oracle meets too rarely: each leads straight to where one of them errs.

Expected contents are kept outside of the regions, as in the oracle. Run by test_mutants in the build with mutants, with the
failpoints that the scene names; without a mutant every scene passes.

    python tests/scenes.py SCENE
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import children
import ksmrs
from ksmrs import _adopt, _ksmrs
from mapping_limit import give_mappings_back, take_all_mappings

PAGE = 4096
PAGES = 256


CHILDREN: list[int] = []
"""Forked and not waited for: they end with the scene."""


class Wrong(Exception):
    """A byte is not what was written."""


def content(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, PAGES * PAGE, np.uint8)


def check(array: np.ndarray[Any, np.dtype[np.uint8]], expected: np.ndarray[Any, np.dtype[np.uint8]], who: str) -> None:
    if not (array == expected).all():
        page = int(np.flatnonzero(array != expected)[0]) // PAGE
        raise Wrong(f"{who}: page {page} holds other bytes than were written")


def region_of(array: np.ndarray[Any, np.dtype[np.uint8]]) -> ksmrs.Region:
    below: Any = array.base
    while not isinstance(below, ksmrs.Region):
        below = below.obj if isinstance(below, memoryview) else below.base
    return below


def merged(*arrays: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Ask for merging until it is done."""
    for _ in range(20):
        ksmrs.merge(10)
        if ksmrs.process_stats().ksm_merging_pages >= PAGES * len(arrays):
            return
    raise SystemExit(f"the scene does not merge: {ksmrs.stats()}")


def let_go(pages: int, rounds: int = 4) -> None:
    """Ask for merging until the broker counts so many pages of this process as merged and, in so many rounds in a row, lets go
    of nothing more. What it keeps then of what was given up, it keeps for children."""
    before, quiet = None, 0
    until = time.monotonic() + 60
    while quiet < rounds:
        if time.monotonic() > until:
            raise SystemExit(f"the broker does not come to rest: {ksmrs.stats()}")
        ksmrs.merge(10)
        stats, merging = ksmrs.stats(), ksmrs.process_stats().ksm_merging_pages
        now = (stats.frames, stats.references_in_limbo, merging)
        quiet = quiet + 1 if now == before and merging == pages else 0
        before = now
        # It looks at life pages by the clock, not at each round.
        time.sleep(0.05)


def child(
    array: np.ndarray[Any, np.dtype[np.uint8]], expected: np.ndarray[Any, np.dtype[np.uint8]], registered: bool = False
) -> tuple[int, int]:
    """Fork a child that compares what it inherited when it is told to; its process, and the descriptor to tell it with.

    Python does not see the fork of an unregistered one. A registered one is ready once its pages are counted."""
    ready, go = os.pipe(), os.pipe()
    # PyDLL keeps the GIL, so that the child has it.
    process = os.fork() if registered else ctypes.PyDLL(None).fork()
    if process == 0:
        until = time.monotonic() + 20
        while registered and not ksmrs._ksmrs.is_connected() and time.monotonic() < until:
            time.sleep(0.01)
        if registered:
            ksmrs.merge(10)
        os.write(ready[1], b".")
        os.read(go[0], 1)
        os._exit(0 if (array == expected).all() else 1)
    CHILDREN.append(process)
    os.read(ready[0], 1)
    return process, go[1]


def ended(one: tuple[int, int]) -> None:
    """Tell a child to compare, and wait for its verdict."""
    os.write(one[1], b".")
    CHILDREN.remove(one[0])
    if os.waitpid(one[0], 0)[1]:
        raise Wrong("a child shows other bytes than it inherited")


def children_show_frames() -> None:
    """Two children, forked in different epochs, go on showing frames that their parent gives up; the older one ends first."""
    expected = content(1)
    arrays = [ksmrs.array(expected), ksmrs.array(expected)]
    others = [ksmrs.array(content(2)), ksmrs.array(content(2))]
    merged(*arrays, *others)
    older = child(arrays[0], expected)
    for seed, array in enumerate(others, 3):
        array[:] = content(seed)
    let_go(PAGES * len(arrays))
    younger = child(arrays[0], expected)
    for seed, array in enumerate(arrays, 5):
        array[:] = content(seed)
    let_go(0)
    ended(older)
    # Now it may free what the older child kept, and no more.
    let_go(0, rounds=20)
    ended(younger)


def born_children_show_frames() -> None:
    """A registered child goes on showing frames that their parent gives up, counted in its own name."""
    expected = content(1)
    arrays = [ksmrs.array(expected), ksmrs.array(expected)]
    merged(*arrays)
    born = child(arrays[0], expected, registered=True)
    for seed, array in enumerate(arrays, 5):
        array[:] = content(seed)
    let_go(0, rounds=20)
    ended(born)


def unregistered_siblings_show_frames() -> None:
    """A child that nobody knows of goes on showing frames that its parent gave up, though its sibling is registered."""
    expected = content(1)
    arrays = [ksmrs.array(expected), ksmrs.array(expected)]
    merged(*arrays)
    unknown = child(arrays[0], expected)
    for seed, array in enumerate(arrays, 5):
        array[:] = content(seed)
    let_go(0)
    born = child(arrays[0], content(5), registered=True)
    # Both have merged with what it inherited.
    let_go(PAGES * len(arrays))
    ended(unknown)
    ended(born)


def frames_move() -> None:
    """Frames lie in an order that only those knew who are gone; they move, and whoever shows them must never see it."""
    ksmrs.tunables.advisor_mode = "none"
    ksmrs.tunables.pages_to_scan, ksmrs.tunables.sleep_millisecs = 100_000, 1
    expected = content(1)
    scattered = expected.reshape(PAGES, PAGE)[np.arange(PAGES) * 37 % PAGES].ravel()
    founders = [ksmrs.array(scattered), ksmrs.array(scattered)]
    merged(*founders)
    heirs = [ksmrs.array(expected), ksmrs.array(expected)]
    merged(*founders, *heirs)
    for seed, array in enumerate(founders, 2):
        array[:] = content(seed)
    until = time.monotonic() + 60
    while ksmrs.stats().pages_migrated < PAGES * len(heirs):
        for array in heirs:
            check(array, expected, "heir, meanwhile")
        if time.monotonic() > until:
            raise SystemExit(f"nothing moves: {ksmrs.stats()}")
    for array in heirs:
        check(array, expected, "heir")


def late_answer() -> None:
    """A client answers a proposal long after the broker stopped waiting, and maps what it was offered."""
    expected = content(1)
    arrays = [ksmrs.array(expected), ksmrs.array(expected)]
    merged(*arrays)
    victim = subprocess.Popen(
        [sys.executable, __file__, "late-answer-victim"],
        env={**os.environ, "KSMRS_FAILPOINTS": "merge-committing=delay:9000000"},
    )
    # The victim is in the middle of its merge as soon as its pages say so; it tells through a file.
    mark = Path(os.environ["KSMRS_RUNTIME_DIR"], "committing")
    until = time.monotonic() + 60
    while not mark.exists():
        if victim.poll() is not None or time.monotonic() > until:
            raise SystemExit("the victim did not come as far as a merge")
        time.sleep(0.01)
    while ksmrs.stats().clients_unplanned == 0:
        # The broker gives up on a client after five seconds.
        if time.monotonic() > until:
            raise SystemExit("the broker does not give up on the victim")
        ksmrs.merge(1)
    for seed, array in enumerate(arrays, 2):
        array[:] = content(seed)
    let_go(0)
    if victim.wait(60):
        raise Wrong("the victim mapped a frame that was no longer its own")


def late_answer_victim() -> None:
    expected = content(1)
    array = ksmrs.array(expected)
    region = region_of(array)
    thread = threading.Thread(target=ksmrs.merge, args=(20,))
    thread.start()
    until = time.monotonic() + 30
    while ksmrs.PageState.COMMITTING not in region.page_states():
        if time.monotonic() > until:
            raise SystemExit("nothing was proposed")
        time.sleep(0.005)
    Path(os.environ["KSMRS_RUNTIME_DIR"], "committing").touch()
    while ksmrs.PageState.COMMITTING in region.page_states():
        check(array, expected, "victim, meanwhile")
        time.sleep(0.05)
    check(array, expected, "victim")
    thread.join()
    check(array, expected, "victim, at last")


def writer_in_the_freeze(seconds: float = 25) -> None:
    """A writer keeps hitting pages that are frozen, compared and mapped."""
    expected = content(1)
    mine, twin = ksmrs.array(expected), ksmrs.array(expected)
    stop = threading.Event()

    def merging() -> None:
        while not stop.is_set():
            ksmrs.merge(5)

    thread = threading.Thread(target=merging, daemon=True)
    thread.start()
    until = time.monotonic() + seconds
    value = 0
    while time.monotonic() < until:
        for page in (0, 100, 200):
            at = page * PAGE + 7
            value = value % 255 + 1
            old = expected[at]
            new = (int(old) + value) % 256
            mine[at] = new
            time.sleep(0.0005)
            if mine[at] != new:
                raise Wrong(f"page {page}: {mine[at]}, not {new}")
            mine[at] = old
            time.sleep(0.001)
            if mine[at] != old:
                raise Wrong(f"page {page}: {mine[at]}, not {old}")
    stop.set()
    thread.join()
    check(mine, expected, "writer")
    check(twin, expected, "twin")


def left_while_merging(rounds: int = 3) -> None:
    """Two mappings merge with each other and leave, the second while the broker hears that they show its frames."""
    for seed in range(rounds):
        expected = content(seed)
        both = [mmap.mmap(-1, expected.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
        for mapping in both:
            mapping[:] = expected.tobytes()
            ksmrs.madvise(mapping, ksmrs.MADV_MERGEABLE)
        regions = [region for hold in list(_adopt._holds.values()) for region in hold.regions]

        def states(regions: list[_ksmrs.Adopted] = regions) -> set[int]:
            return {state for region in regions for state in region.page_states()}

        merging = threading.Thread(target=ksmrs.merge, args=(10,))
        leaving = threading.Thread(target=ksmrs.madvise, args=(both[1], ksmrs.MADV_UNMERGEABLE))
        merging.start()
        children.wait_for(lambda: ksmrs.PageState.COMMITTING in states(), "a proposal")
        (broker,) = children.brokers_in(Path(os.environ["KSMRS_RUNTIME_DIR"]))
        os.kill(broker, signal.SIGSTOP)
        try:
            children.wait_for(lambda: states() == {ksmrs.PageState.MERGED}, "the merge")
            ksmrs.madvise(both[0], ksmrs.MADV_UNMERGEABLE)
            leaving.start()
            children.wait_for(lambda: ksmrs.PageState.LEAVING in states(), "a page that leaves")
        finally:
            os.kill(broker, signal.SIGCONT)
        for thread in (leaving, merging):
            thread.join()
        for mapping in both:
            check(np.frombuffer(mapping, np.uint8), expected, f"round {seed}")


def held_at_the_limit() -> None:
    """Shared memory is written while nothing can be mapped, and opted out before it is home; nobody else shows its frames."""
    expected = content(1)
    mine, twin = ksmrs.array(expected, shared=True), ksmrs.array(expected, shared=True)
    region = region_of(mine)
    merged(mine, twin)
    take_all_mappings()
    written = slice(PAGE // 2, mine.size // 2, 2 * PAGE)
    mine[written] ^= 255
    first = PAGES // 2
    if set(region.page_states()[first:]) != {ksmrs.PageState.DETACHED}:
        raise SystemExit("nothing is detached: this shows nothing")
    ksmrs.madvise(mine, ksmrs.MADV_UNMERGEABLE, first * PAGE)
    give_mappings_back()
    mine[: first * PAGE], twin[:] = content(3)[: first * PAGE], content(2)
    let_go(0, rounds=20)
    check(mine[first * PAGE :], expected[first * PAGE :], "opted out")


SCENES = {
    "children-show-frames": children_show_frames,
    "born-children-show-frames": born_children_show_frames,
    "unregistered-siblings-show-frames": unregistered_siblings_show_frames,
    "frames-move": frames_move,
    "late-answer": late_answer,
    "late-answer-victim": late_answer_victim,
    "writer-in-the-freeze": writer_in_the_freeze,
    "left-while-merging": left_while_merging,
    "held-at-the-limit": held_at_the_limit,
}

if __name__ == "__main__":
    signal.alarm(110)
    try:
        SCENES[sys.argv[1]]()
    finally:
        for process in CHILDREN:
            os.kill(process, signal.SIGKILL)
