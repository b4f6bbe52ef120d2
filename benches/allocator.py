"""What it costs an array that lives for moments to be made in mergeable memory: `x + 1`, in turn with NumPy's own allocator.

    python benches/allocator.py [--rounds 15] [--busy] [--json]

Ratios of neighbouring measurements, the median of all rounds; a broker passes over the process meanwhile, without a pause with
--busy. In the same way: np.zeros, where a block in use again has to be cleared; and arrays of which 64 are kept at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable

import numpy as np

import ksmrs

KIB = 1024
SIZES = (64, 256, 1024, 8192)
SECONDS = 0.05
"""About how long one measurement takes."""
KEPT = 64


def added(kib: int) -> Callable[[int], None]:
    x = np.ones(kib * KIB // 8)

    def run(count: int) -> None:
        for _ in range(count):
            x + 1

    return run


def zeros(kib: int) -> Callable[[int], None]:
    nbytes = kib * KIB

    def run(count: int) -> None:
        for _ in range(count):
            np.zeros(nbytes, np.uint8)[::4096] = 1

    return run


def kept(kib: int) -> Callable[[int], None]:
    x = np.ones(kib * KIB // 8)

    def run(count: int) -> None:
        alive: deque[object] = deque(maxlen=KEPT)
        for _ in range(count):
            alive.append(x + 1)

    return run


WORK = {"x + 1": added, "zeros, one byte of each page written": zeros, f"x + 1, {KEPT} at a time": kept}


def seconds_each(run: Callable[[int], None], count: int) -> float:
    began = time.perf_counter()
    run(count)
    return (time.perf_counter() - began) / count


def measure(make: Callable[[int], Callable[[int], None]], kib: int, rounds: int) -> dict[str, float]:
    ksmrs.merge_process(False)
    run = make(kib)
    run(KEPT + 8)
    count = max(KEPT, int(SECONDS / seconds_each(run, KEPT)))
    numpys, ours, ratios = [], [], []
    for _ in range(rounds):
        ksmrs.merge_process(False)
        run(KEPT)
        numpys.append(seconds_each(run, count))
        ksmrs.merge_process(True)
        run(KEPT)
        ours.append(seconds_each(run, count))
        ratios.append(ours[-1] / numpys[-1])
    return {
        "numpy_us": statistics.median(numpys) * 1e6,
        "ksmrs_us": statistics.median(ours) * 1e6,
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--busy", action="store_true", help="passes without a pause")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in WORK}
    with tempfile.TemporaryDirectory(prefix="ksmrs-bench-") as directory:
        os.environ["KSMRS_IDLE_SECONDS"] = "1"
        ksmrs.connect(directory)
        if arguments.busy:
            ksmrs.tunables.sleep_millisecs = 0
        for name, make in WORK.items():
            for kib in SIZES:
                results[name][kib] = measure(make, kib, arguments.rounds)
        ksmrs.disconnect()
    if arguments.json:
        print(json.dumps({"rounds": arguments.rounds, "busy": arguments.busy, "work": results}, indent=2))
        return
    print(
        f"arrays in mergeable memory, time relative to NumPy's own allocator, medians of {arguments.rounds} rounds in turn"
    )
    for name, sizes in results.items():
        print(f"  {name}")
        for kib, figures in sizes.items():
            print(
                f"    {kib:5} KiB: {figures['ratio']:.2f} ({figures['ksmrs_us']:.1f} us; NumPy {figures['numpy_us']:.1f})"
            )


if __name__ == "__main__":
    main()
