"""What the first write to a merged private page costs: ksmrs against kernel KSM, in one run, in pages in order and at random.

    python benches/break_private.py [--mb 64] [--rounds 5] [--json]

One byte is written to each page of an mmap whose twin holds the same bytes, by one call that touches every page (an assignment
to an array of positions). Unmerged memory that was written before is the floor. Both engines stand still
meanwhile. Every byte is verified. In private regions both engines leave the copy to the kernel.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from typing import Any

import numpy as np

import kernel_ksm
import ksmrs
from merge_equal import warm

PAGE = 4096
MIB = 1 << 20
PATIENCE_SECONDS = 60


class Twins:
    def __init__(self, nbytes: int) -> None:
        self.content = np.random.default_rng(7).integers(0, 256, nbytes, np.uint8)
        self._maps = [mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
        self.arrays = [np.frombuffer(memory, np.uint8) for memory in self._maps]
        for array in self.arrays:
            array[:] = self.content

    def write(self, at: np.ndarray[Any, Any]) -> float:
        """Nanoseconds a page."""
        array = self.arrays[0]
        began = time.perf_counter_ns()
        array[at] = 7
        took = time.perf_counter_ns() - began
        expected = self.content.copy()
        expected[at] = 7
        if not ((array == expected).all() and (self.arrays[1] == self.content).all()):
            raise SystemExit("a byte is wrong: this benchmark has no figures")
        return took / len(at)


def by_kernel(nbytes: int, at: np.ndarray[Any, Any]) -> float:
    twins = Twins(nbytes)
    with kernel_ksm.tuned_to_the_maximum():
        for array in twins.arrays:
            kernel_ksm.opt_in(array)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while kernel_ksm.counter("pages_shared") + kernel_ksm.counter("pages_sharing") < 2 * nbytes // PAGE:
            if time.monotonic() > deadline:
                raise SystemExit(f"kernel KSM merged less than everything in {PATIENCE_SECONDS} s")
            time.sleep(0.01)
        kernel_ksm.turn("run", 0)
        return twins.write(at)


def by_ksmrs(nbytes: int, at: np.ndarray[Any, Any]) -> float:
    twins = Twins(nbytes)
    ksmrs.tunables.run = 1
    for array in twins.arrays:
        ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
    ksmrs.merge()
    ksmrs.tunables.run = 0
    if ksmrs.process_stats().ksm_merging_pages < 2 * nbytes // PAGE:
        raise SystemExit(f"not everything merged: {ksmrs.process_stats()}")
    return twins.write(at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    nbytes = arguments.mb * MIB
    warm(8 * nbytes)
    in_order = np.arange(0, nbytes, PAGE)
    orders = {"in order": in_order, "at random": np.random.default_rng(1).permutation(in_order)}
    refusal = kernel_ksm.unavailable()
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in orders}
    with tempfile.TemporaryDirectory(prefix="ksmrs-bench-") as directory:
        os.environ["KSMRS_IDLE_SECONDS"] = "1"
        ksmrs.connect(directory)
        for _ in range(arguments.rounds):
            for name, at in orders.items():
                twins = Twins(nbytes)
                figures[name].setdefault("unmerged", []).append(twins.write(at))
                if refusal is None:
                    figures[name].setdefault("kernel", []).append(by_kernel(nbytes, at))
                figures[name].setdefault("ksmrs", []).append(by_ksmrs(nbytes, at))
        ksmrs.disconnect()
    medians = {name: {kind: statistics.median(runs) for kind, runs in kinds.items()} for name, kinds in figures.items()}
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(kinds["ksmrs"], kinds["kernel"], strict=True))
        for name, kinds in figures.items()
        if refusal is None
    }
    if arguments.json:
        result = {"mb": arguments.mb, "nanoseconds_per_page": medians, "ratio_to_kernel": ratios}
        print(json.dumps({**result, "kernel_unavailable": refusal}, indent=2))
        return
    print(f"first write to each of {nbytes // PAGE} merged private pages, median of {arguments.rounds} rounds")
    if refusal is not None:
        print(f"kernel KSM: not measured, {refusal}")
    for name, kinds in medians.items():
        ratio = f"; {ratios[name]:.2f} of kernel KSM's time" if name in ratios else ""
        print(f"  {name:9} " + ", ".join(f"{kind} {value / 1e3:.2f} us" for kind, value in kinds.items()) + ratio)


if __name__ == "__main__":
    main()
