"""Whoever is killed, at whichever step: nobody else loses a byte, and no memory stays behind.

A victim dies by SIGKILL at one failpoint while it merges with two bystanders that hold equal data. The bystanders must still
read what they wrote, write, and merge again; once they are gone too the broker must hold no frame and no memory.
Relies on `make mutants`, whose build has the failpoints; the wheel has none.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import ksmrs
from children import Child, brokers_in, wait_for

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "target" / "mutants"
DELAY_US = 200
SOURCE = ROOT / "rust" / "sys" / "src" / "failpoint.rs"
# The tests run without the sources too, and without the build then.
NAMED = re.findall(r'\("([a-z-]+)", Failpoint::', SOURCE.read_text()) if SOURCE.is_file() else []
# A broker lends when a client is stopped: that death is in test_lend.
BROKER_POINTS = [point for point in NAMED if point.startswith("broker-") and point != "broker-lends"]
CLIENT_POINTS = [point for point in NAMED if not point.startswith("broker-")]
AT_ONCE = 5
"""Victims that live and die at the same time."""
PAGES = 96

pytestmark = [
    pytest.mark.skipif(not (BUILD / "ksmrs").is_dir(), reason="no build with failpoints: run make mutants"),
    pytest.mark.timeout(180),
]

DATA = f"""
PAGES = {PAGES}
contents = np.random.default_rng(11).integers(0, 256, PAGES * 4096, np.uint8)
regions = [ksmrs.Region(contents.size, shared) for shared in (False, True)]
arrays = [region.array(np.uint8, contents.size) for region in regions]
for array in arrays:
    array[:] = contents
"""

VICTIM = (
    DATA
    + """
def write(step):
    # Mostly the bytes that are there already: such pages are found at rest, merged, and written in the midst of it.
    chance = np.random.default_rng(step)
    while True:
        array = arrays[chance.integers(2)]
        at = int(chance.integers(PAGES)) * 4096 + step
        kept = contents[at]
        if chance.integers(64) == 0:
            array[at] = kept ^ 0xFF
        array[at] = kept
# Arrays of NumPy's take part too, each from the merge after it was made until the next one is there.
ksmrs.merge_process(True)
for step in (1, 2):
    threading.Thread(target=write, args=(step,), daemon=True).start()
chance = np.random.default_rng(3)
until = time.monotonic() + 60
while time.monotonic() < until:
    spare = contents.copy()
    # And memory that leaves while some of it merges.
    plain = bytearray(contents)
    ksmrs.madvise(plain, ksmrs.MADV_MERGEABLE)
    ksmrs.merge(1)
    ksmrs.madvise(plain, ksmrs.MADV_UNMERGEABLE)
    for region in regions:
        first = int(chance.integers(PAGES // 2)) * 4096
        for advice in (ksmrs.MADV_UNMERGEABLE, ksmrs.MADV_MERGEABLE):
            ksmrs.madvise(region, advice, first, PAGES // 2 * 4096)
sys.exit(3)  # it never came to the failpoint
"""
)

BYSTANDER = (
    DATA
    + """
version = 0
for line in sys.stdin:
    command = line.strip()
    if command == "write":
        # Every third page, so that runs break up; the same in every bystander, so that they merge again.
        version += 1
        contents[version % 3 * 4096 + 100 :: 3 * 4096] ^= 0x5A
        for array in arrays:
            array[version % 3 * 4096 + 100 :: 3 * 4096] ^= 0x5A
    elif command == "merge":
        def all_merged():
            try:
                ksmrs.merge(5)
            except ksmrs.BrokerError:
                pass  # it died while we said hello; the next request finds the next one
            return merged(*regions) == 2 * PAGES
        wait_for(all_merged, "merging", 60)
    elif command == "disconnect":
        ksmrs.disconnect()
    elif command == "connect":
        ksmrs.connect()
    elif command == "close":
        wrong = sum(int((array != contents).sum()) for array in arrays)
        del array, arrays
        regions.clear()
        gc.collect()
        print(wrong, flush=True)
        continue
    print(sum(int((array != contents).sum()) for array in arrays), flush=True)
"""
)


class Bystanders:
    """Clients that do as they are told, all at once, and then look at every byte they have."""

    def __init__(self, children: list[Child]) -> None:
        self._children = children

    def do(self, command: str, after: str) -> None:
        for child in self._children:
            child.tell(command)
        wrong = [child.line() for child in self._children]
        assert wrong == ["0"] * len(wrong), f"wrong bytes in the bystanders, {command} after {after}: {wrong}"

    def go_on(self, after: str) -> None:
        for command in ("verify", "write", "merge", "write", "merge", "verify"):
            self.do(command, after)


@contextmanager
def bystanders(count: int = 2) -> Iterator[Bystanders]:
    with ExitStack() as stack:
        children = [stack.enter_context(Child(BYSTANDER, PYTHONPATH=str(BUILD))) for _ in range(count)]
        yield Bystanders(children)
        for child in children:
            child.end_of_input()
        for child in children:
            child.end()


def nothing_kept() -> None:
    """Everybody is gone: the broker has neither clients nor frames nor memory in its store."""

    def nothing() -> bool:
        stats = ksmrs.stats()
        return stats.clients <= 1 and stats.frames == 0 == stats.store_bytes

    try:
        wait_for(nothing, "an empty store")
    except AssertionError as kept:
        raise AssertionError(f"kept after everyone was gone: {ksmrs.stats()}") from kept


def test_the_failpoints_are_found() -> None:
    assert len(CLIENT_POINTS) >= 12 and len(BROKER_POINTS) >= 3


@pytest.mark.parametrize("hit", [1, 7])
@pytest.mark.parametrize("first", range(0, len(CLIENT_POINTS), AT_ONCE))
def test_a_client_dies(first: int, hit: int) -> None:
    points = CLIENT_POINTS[first : first + AT_ONCE]
    with bystanders() as others, ExitStack() as stack:
        others.do("merge", "the beginning")
        victims = {}
        for point in points:
            armed = f"{point}=kill@{hit}"
            if point == "take-back":
                # Time for a writer to come.
                armed += f";merge-frozen=delay:{10 * DELAY_US}"
            victim = Child(VICTIM, PYTHONPATH=str(BUILD), KSMRS_FAILPOINTS=armed)
            victims[point] = stack.enter_context(victim)
        for point, victim in victims.items():
            try:
                victim.end(-signal.SIGKILL)
            except AssertionError as lived:
                raise AssertionError(f"{point} did not kill its victim at hit {hit}: {lived}") from lived
        others.go_on(f"deaths at {points}, hit {hit}")
        # The third is the test, when it asks.
        wait_for(lambda: ksmrs.stats().clients <= 3, "the end of all victims")
        others.do("close", f"deaths at {points}, hit {hit}")
    nothing_kept()


@pytest.mark.parametrize("hit", [1, 7])
def test_the_broker_dies(runtime_dir: Path, hit: int) -> None:
    with bystanders() as others:
        others.do("merge", "the beginning")
        for point in BROKER_POINTS:
            # Only a broker that a process with the failpoint starts has the failpoint, not those after it.
            others.do("disconnect", "merging")
            for pid in brokers_in(runtime_dir):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: brokers_in(runtime_dir) == [], "the end of the broker without failpoints")
            with Child("ksmrs.connect()", PYTHONPATH=str(BUILD), KSMRS_FAILPOINTS=f"{point}=kill@{hit}") as starter:
                starter.end()
            (doomed,) = brokers_in(runtime_dir)
            others.do("connect", f"a start of a broker that will die at {point}")
            for _ in range(40):
                others.do("write", point)
                others.do("merge", point)
                if doomed not in brokers_in(runtime_dir):
                    break
            assert doomed not in brokers_in(runtime_dir), f"{point} did not kill the broker at hit {hit}"
            others.go_on(f"the broker's death at {point}")
        others.do("close", "the brokers' deaths")
    nothing_kept()


def test_slow_at_every_step_is_not_wrong() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "oracle.py", "10"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(BUILD),
            "KSMRS_FAILPOINTS": ";".join(f"{point}=delay:{DELAY_US}" for point in CLIENT_POINTS),
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = ast.literal_eval(done.stdout)
    assert report["verified"] > 0 and report["merges"] > 0 and report["breaks"] > 0, report
