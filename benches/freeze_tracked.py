"""The freeze of private memory that is tracked, and of the same memory that is not: tracked pages are compared before it.

    python benches/freeze_tracked.py [--pages 512] [--rounds 25] [--json]

An array of small pages (huge ones are never tracked) that equals nothing is scanned until it is tracked; then a twin comes,
and both merge. Meanwhile one byte is read into the middle of the array again and again, as in freeze_window.py; timed is the
time from the first EFAULT to the next success.
Each round has arrays of its own, in turn with tracking and in a process without. Every byte is verified.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import ksmrs
from freeze_window import PAGE, probe, small_pages

PATIENCE_SECONDS = 30
PASSES = 8
"""Until an array that nobody writes is registered and armed: it is looked at four times."""


def is_tracked(array: np.ndarray[Any, Any]) -> bool:
    """Whether the kernel says that the mapping is registered for it."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if not name.endswith(":"):
            first, end = (int(address, 16) for address in name.split("-"))
            inside = first <= array.ctypes.data < end
        elif inside and name == "VmFlags:":
            return "uw" in line.split()
    return False


def wait_passes(count: int) -> None:
    until = ksmrs.stats().full_scans + count
    deadline = time.monotonic() + PATIENCE_SECONDS
    while ksmrs.stats().full_scans < until:
        if time.monotonic() > deadline:
            raise SystemExit(f"no {count} passes in {PATIENCE_SECONDS} s")
        time.sleep(0.002)


def window(content: np.ndarray[Any, np.dtype[np.uint8]], tracking: bool) -> int:
    """Nanoseconds for which a page of the array refused to be read into; 0 if no call met that."""
    ksmrs.tunables.run = 1
    array = small_pages(content)
    wait_passes(PASSES)
    if is_tracked(array) != tracking:
        raise SystemExit(f"the array is {'not ' if tracking else ''}tracked: {ksmrs.process_stats().dirty_tracking}")
    ksmrs.tunables.run = 0
    twin = small_pages(content)
    file = os.memfd_create("content")
    os.write(file, content.tobytes())
    at = content.nbytes // PAGE // 2 * PAGE
    merged = threading.Event()

    def merge() -> None:
        ksmrs.merge(PATIENCE_SECONDS)
        merged.set()

    thread = threading.Thread(target=merge)
    thread.start()
    closed, _ = probe(memoryview(array)[at : at + 1], file, at, merged)
    thread.join()
    os.close(file)
    if not ((array == content).all() and (twin == content).all()):
        raise SystemExit("a byte is wrong: this benchmark has no figures")
    return closed


def worker(pages: int, tracking: bool) -> None:
    """One window for each line of the standard input."""
    with tempfile.TemporaryDirectory(prefix="ksmrs-bench-") as directory:
        os.environ["KSMRS_IDLE_SECONDS"] = "1"
        ksmrs.connect(directory, dirty_tracking=tracking)
        ksmrs.tunables.advisor_mode = "none"
        ksmrs.tunables.pages_to_scan, ksmrs.tunables.sleep_millisecs = 100_000, 2
        ksmrs.tunables.smart_scan = 0
        for line in sys.stdin:
            content = np.random.default_rng(int(line)).integers(0, 256, pages * PAGE, np.uint8)
            print(window(content, tracking), flush=True)
        ksmrs.disconnect()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), sys.argv[3] == "tracked")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kinds = ("tracked", "not tracked")
    workers = {
        kind: subprocess.Popen(
            [sys.executable, __file__, "--worker", str(arguments.pages), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in kinds
    }
    met: dict[str, list[int]] = {kind: [] for kind in kinds}
    for round_ in range(arguments.rounds):
        for kind, process in workers.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{round_}\n")
            process.stdin.flush()
            closed = int(process.stdout.readline())
            if closed:
                met[kind].append(closed)
    for process in workers.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait(PATIENCE_SECONDS)
    medians = {kind: statistics.median(took) / 1e6 for kind, took in met.items() if took}
    if len(medians) < len(kinds):
        raise SystemExit(f"no freeze of {arguments.pages} pages was met")
    if arguments.json:
        print(json.dumps({"pages": arguments.pages, "median_ms": medians, "met": {k: len(v) for k, v in met.items()}}))
        return
    for kind, median in medians.items():
        print(f"{arguments.pages} pages, {kind:11}: closed for {median:.2f} ms, median of {len(met[kind])}")
    print(f"tracked / not tracked: {medians['tracked'] / medians['not tracked']:.2f}")


if __name__ == "__main__":
    main()
