"""How long a write waits: one byte written per page at random while its region merges, against the same without merging.

    python benches/write_wait.py [--seconds 10] [--mb 64] [--json]

A thread of its own asks for merging without pause, so pages are frozen, merged, broken and merged again all the time. What is
timed is a store through a memoryview, clock included; the slowest of all says how long a freeze, a break or the scheduler held
a writer up. On two processors the scheduler alone takes milliseconds: the run without merging tells how many.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time

import numpy as np

import ksmrs

PAGE = 4096
MIB = 1 << 20


def percentiles(nanoseconds: list[int]) -> dict[str, float]:
    ordered = sorted(nanoseconds)
    at = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    return {name: ordered[int(part * (len(ordered) - 1))] / 1e3 for name, part in at.items()} | {
        "max": ordered[-1] / 1e3
    }


def writes(view: memoryview, pages: int, seconds: float) -> list[int]:
    chance = random.Random(1)
    took = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(200):
            at = chance.randrange(pages) * PAGE
            began = time.perf_counter_ns()
            view[at] = 1
            took.append(time.perf_counter_ns() - began)
            # Back to what its twin holds, so that it merges again.
            view[at] = 0
        time.sleep(0.002)
    return took


def measure(shared: bool, nbytes: int, seconds: float) -> dict[str, dict[str, float]]:
    content = np.random.default_rng(3).integers(0, 256, nbytes, np.uint8)
    content[::PAGE] = 0
    ours, twin = (ksmrs.array(content, shared=shared) for _ in range(2))
    view = memoryview(ours)
    ksmrs.tunables.run = 0
    floor = writes(view, nbytes // PAGE, seconds / 4)
    ksmrs.tunables.run = 1
    stop = threading.Event()

    def merging() -> None:
        while not stop.is_set():
            ksmrs.merge(5)

    thread = threading.Thread(target=merging)
    thread.start()
    before = ksmrs.process_stats()
    took = writes(view, nbytes // PAGE, seconds)
    after = ksmrs.process_stats()
    stop.set()
    thread.join()
    view.release()
    if not ((ours == content).all() and (twin == content).all()):
        raise SystemExit("a byte is wrong: this benchmark has no figures")
    counts = {"writes": float(len(took)), "merges": float(after.merges - before.merges)}
    return {"unmerged": percentiles(floor), "merging": percentiles(took), "counts": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ksmrs-bench-") as directory:
        os.environ["KSMRS_IDLE_SECONDS"] = "1"
        ksmrs.connect(directory)
        result = {
            "shared" if shared else "private": measure(shared, arguments.mb * MIB, arguments.seconds)
            for shared in (False, True)
        }
        ksmrs.disconnect()
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for kind, figures in result.items():
        print(f"{kind}: {figures['counts']['writes']:.0f} writes while {figures['counts']['merges']:.0f} pages merged")
        for when in ("unmerged", "merging"):
            print(f"  {when:8} " + ", ".join(f"{name} {value:.1f} us" for name, value in figures[when].items()))


if __name__ == "__main__":
    main()
