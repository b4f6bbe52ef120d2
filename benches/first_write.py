"""What the first write to a merged page costs, private and shared, in order, at random, and at random to one page in 32, where
no break helps the next one: ksmrs and kernel KSM in one run.

    python benches/first_write.py [--mb 64] [--rounds 5] [--json]

One byte is written to each such page of an mmap whose twin holds the same bytes: by one call that touches every page (an
assignment to an array of positions), whose time is divided by the pages; and once more, merged anew, page by page through a
memoryview with the clock read around each, for the percentiles, which have the clock's two readings and the interpreter in
them. Unmerged memory that was written before is the floor of both. Both engines stand still meanwhile. Kernel KSM has private
memory, for it merges no other. Every byte is verified. In private regions both engines leave the copy to the kernel.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

import kernel_ksm
import ksmrs
from merge_equal import warm
from write_wait import percentiles

PAGE = 4096
MIB = 1 << 20
PATIENCE_SECONDS = 60
KINDS = {"private": mmap.MAP_PRIVATE, "shared": mmap.MAP_SHARED}
BYTE = 7
Order = np.ndarray[Any, np.dtype[np.int64]]


class Twins:
    """Two mappings with the same bytes, of which the first is written."""

    def __init__(self, nbytes: int, kind: str) -> None:
        self.content = np.random.default_rng(7).integers(0, 256, nbytes, np.uint8)
        self._maps = [mmap.mmap(-1, nbytes, flags=KINDS[kind] | mmap.MAP_ANONYMOUS) for _ in range(2)]
        self.arrays = [np.frombuffer(memory, np.uint8) for memory in self._maps]
        for array in self.arrays:
            array[:] = self.content

    def together(self, at: Order) -> float:
        """Nanoseconds a page."""
        array = self.arrays[0]
        began = time.perf_counter_ns()
        array[at] = BYTE
        took = time.perf_counter_ns() - began
        self._verify(at)
        return took / len(at)

    def one_by_one(self, at: Order) -> list[int]:
        """Nanoseconds of each."""
        view = memoryview(self.arrays[0])
        clock = time.perf_counter_ns
        took = []
        for position in at.tolist():
            began = clock()
            view[position] = BYTE
            took.append(clock() - began)
        self._verify(at)
        return took

    def _verify(self, at: Order) -> None:
        expected = self.content.copy()
        expected[at] = BYTE
        if not ((self.arrays[0] == expected).all() and (self.arrays[1] == self.content).all()):
            raise SystemExit("a byte is wrong: this benchmark has no figures")


Write = Callable[[Twins], Any]


def unmerged(kind: str) -> Callable[[int, Write], Any]:
    return lambda nbytes, write: write(Twins(nbytes, kind))


def by_kernel(nbytes: int, write: Write) -> Any:
    twins = Twins(nbytes, "private")
    with kernel_ksm.tuned_to_the_maximum():
        for array in twins.arrays:
            kernel_ksm.opt_in(array)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while kernel_ksm.counter("pages_shared") + kernel_ksm.counter("pages_sharing") < 2 * nbytes // PAGE:
            if time.monotonic() > deadline:
                raise SystemExit(f"kernel KSM merged less than everything in {PATIENCE_SECONDS} s")
            time.sleep(0.01)
        kernel_ksm.turn("run", 0)
        return write(twins)


def by_ksmrs(kind: str) -> Callable[[int, Write], Any]:
    def measure(nbytes: int, write: Write) -> Any:
        twins = Twins(nbytes, kind)
        ksmrs.tunables.run = 1
        for array in twins.arrays:
            ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
        ksmrs.merge()
        ksmrs.tunables.run = 0
        if ksmrs.process_stats().ksm_merging_pages < 2 * nbytes // PAGE:
            raise SystemExit(f"not everything merged: {ksmrs.process_stats()}")
        return write(twins)

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    nbytes = arguments.mb * MIB
    warm(8 * nbytes)
    in_order = np.arange(0, nbytes, PAGE)
    shuffled = np.random.default_rng(1).permutation
    orders = {"in order": in_order, "at random": shuffled(in_order), "far apart": shuffled(in_order[::32])}
    refusal = kernel_ksm.unavailable()
    engines = {"unmerged": unmerged("private"), "unmerged, shared": unmerged("shared")}
    if refusal is None:
        engines["kernel"] = by_kernel
    engines |= {kind: by_ksmrs(kind) for kind in KINDS}
    means: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in orders}
    singles: dict[str, dict[str, list[int]]] = {name: defaultdict(list) for name in orders}
    with tempfile.TemporaryDirectory(prefix="ksmrs-bench-") as directory:
        os.environ["KSMRS_IDLE_SECONDS"] = "1"
        ksmrs.connect(directory)
        for _ in range(arguments.rounds):
            for name, at in orders.items():
                for engine, measure in engines.items():
                    means[name][engine].append(measure(nbytes, lambda twins, at=at: twins.together(at)))
                    singles[name][engine] += measure(nbytes, lambda twins, at=at: twins.one_by_one(at))
        ksmrs.disconnect()
    medians = {name: {kind: statistics.median(runs) for kind, runs in kinds.items()} for name, kinds in means.items()}
    ratios = {
        name: {
            kind: statistics.median(ours / theirs for ours, theirs in zip(kinds[kind], kinds["kernel"], strict=True))
            for kind in KINDS
        }
        for name, kinds in means.items()
        if refusal is None
    }
    latencies = {
        name: {kind: percentiles(nanoseconds) for kind, nanoseconds in kinds.items()} for name, kinds in singles.items()
    }
    if arguments.json:
        result = {"mb": arguments.mb, "nanoseconds_per_page": medians, "microseconds": latencies}
        print(json.dumps({**result, "ratio_to_kernel": ratios, "kernel_unavailable": refusal}, indent=2))
        return
    print(f"first write to merged pages, of {nbytes // PAGE}, {arguments.rounds} rounds, us")
    if refusal is not None:
        print(f"kernel KSM: not measured, {refusal}")
    for name, kinds in medians.items():
        for kind, value in kinds.items():
            ratio = f"  {ratios[name][kind]:5.2f} of kernel KSM's" if kind in ratios.get(name, {}) else ""
            single = "  ".join(f"{at} {took:8.2f}" for at, took in latencies[name][kind].items())
            print(f"  {name:9}  {kind:16}  mean {value / 1e3:6.2f}   single: {single}{ratio}")


if __name__ == "__main__":
    main()
