"""How fast merged memory is read: the same memory before and after merging, by ksmrs and kernel KSM, in one worker and in all.

    python benches/read_merged.py [--mb 256] [--workers 4] [--rounds 5] [--json]

Each worker holds the same data, once of small pages and once, where the kernel agrees, of huge ones. Bandwidth is that of
NumPy's sum over all of it; latency is the time of a load whose address the load before it gave, along a random cycle through
every cache line, in compiled code (rust/sys/examples/chase.rs, built here with rustc). Both per second of the worker's own
CPU time, so that more workers than processors do not count as slow; by the clock it is in the JSON. The engine stands still
meanwhile, and everything was read once since it was merged. Every byte is verified.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import kernel_ksm
from merge_equal import (
    MIB,
    PAGE,
    WORDS,
    Content,
    Memory,
    Workers,
    fresh_broker,
    merge_by_kernel,
    merge_by_ksmrs,
    warm,
    worker,
)

LINE_WORDS = 8
STEPS = 1_000_000
SOURCE = Path(__file__).resolve().parent.parent / "rust" / "sys" / "examples" / "chase.rs"
LIBRARY = SOURCE.parents[3] / "target" / "benches" / "libchase.so"
BACKINGS = {"4 KiB": mmap.MADV_NOHUGEPAGE, "2 MiB": mmap.MADV_HUGEPAGE}
FIGURES = ("gb_per_cpu_second", "ns_per_load", "gb_per_second", "ns_per_load_by_the_clock")


def build() -> None:
    """Make the library that chases, unless it is there and no older than what it is made from."""
    if LIBRARY.exists() and LIBRARY.stat().st_mtime >= SOURCE.stat().st_mtime:
        return
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    made = LIBRARY.with_suffix(f".{os.getpid()}")
    command = ["rustc", "--edition", "2024", "-O", "--crate-type", "cdylib", "-o", made, SOURCE]
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit(f"no rustc in PATH to build {LIBRARY} from {SOURCE}: build it with `make bench`") from None
    made.replace(LIBRARY)


class Chained(Content):
    """Pages whose every cache line begins with the index of another line's first word, all in one random cycle."""

    def __init__(self, count: int, order: int = 0, first: int = 0) -> None:
        super().__init__(count, order, first)
        cycle = np.random.default_rng(11).permutation(count * WORDS // LINE_WORDS).astype(np.uint64) * np.uint64(
            LINE_WORDS
        )
        self._next = np.empty_like(cycle)
        self._next[cycle // np.uint64(LINE_WORDS)] = np.roll(cycle, -1)

    def parts(self, array: np.ndarray[Any, Any]) -> Iterator[tuple[Any, Any]]:
        at = 0
        for rows, content in super().parts(array):
            lines = content.reshape(-1)[::LINE_WORDS]
            lines[:] = self._next[at : at + len(lines)]
            at += len(lines)
            yield rows, content


class Reader:
    """A worker's memory, and the place in the cycle that was come to."""

    def __init__(self, kind: str, nbytes: int, advice: int) -> None:
        self._memory = Memory(kind, nbytes, 0, Chained, advice)
        self.array, self.content, self.opt_in = self._memory.array, self._memory.content, self._memory.opt_in
        self._chase = ctypes.CDLL(str(LIBRARY)).chase
        self._chase.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
        self._chase.restype = ctypes.c_uint64
        self._at = 0

    def sum(self) -> tuple[float, float]:
        """Seconds of CPU and by the clock that a sum over everything takes."""
        cpu, clock = time.thread_time(), time.perf_counter()
        self.array.sum()
        return time.thread_time() - cpu, time.perf_counter() - clock

    def chase(self) -> tuple[float, float]:
        """The same for a load, each address from the one before."""
        cpu, clock = time.thread_time(), time.perf_counter()
        self._at = self._chase(self.array.ctypes.data, self._at, STEPS)
        return (time.thread_time() - cpu) / STEPS, (time.perf_counter() - clock) / STEPS


def reads(workers: Workers, nbytes: int, count: int, rounds: int) -> dict[str, float]:
    """Medians over rounds and the first so many workers, which read at the same time."""
    sums, loads = [], []
    for _ in range(rounds):
        sums += workers.ask("sum", count)
        loads += workers.ask("chase", count)
    (sum_cpu, sum_clock), (load_cpu, load_clock) = (
        [statistics.median(took) for took in zip(*each, strict=True)] for each in (sums, loads)
    )
    figures = (nbytes / sum_cpu / 1e9, load_cpu * 1e9, nbytes / sum_clock / 1e9, load_clock * 1e9)
    return dict(zip(FIGURES, figures, strict=True))


def run(kind: str, backing: str, nbytes: int, workers: int, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"before": {}, "after": {}}
    wanted = nbytes // PAGE * workers
    merge: Callable[[Workers, int], None] = merge_by_kernel if kind == "kernel" else merge_by_ksmrs
    with ExitStack() as stack:
        # Workers connect to the broker that is there when they start.
        if kind != "kernel":
            stack.enter_context(fresh_broker())
        all_of_them = stack.enter_context(Workers(kind, nbytes, workers, words=(__file__, backing)))
        if kind == "kernel":
            stack.enter_context(kernel_ksm.tuned_to_the_maximum())
        for when in ("before", "after"):
            all_of_them.ask("sum")
            found[f"huge_{when}_mib"] = all_of_them.footprint().huge / MIB
            for count in sorted({1, workers}):
                found[when][str(count)] = reads(all_of_them, nbytes, count, rounds)
            if when == "before":
                merge(all_of_them, wanted)
                if kind == "kernel":
                    kernel_ksm.turn("run", 0)
        if not all(all_of_them.ask("check")):
            raise SystemExit("a byte is wrong: this benchmark has no figures")
    return found


def main() -> None:
    if sys.argv[2:3] == ["--worker"]:
        backing, kind, nbytes = sys.argv[1], sys.argv[3], int(sys.argv[4])
        worker(kind, lambda: Reader(kind, nbytes, BACKINGS[backing]), sum=Reader.sum, chase=Reader.chase)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    nbytes = arguments.mb * MIB
    build()
    warm(nbytes * (arguments.workers + 1))
    refusal = kernel_ksm.unavailable()
    kinds = ["private", "shared", *(["kernel"] if refusal is None else [])]
    figures = {
        backing: {kind: run(kind, backing, nbytes, arguments.workers, arguments.rounds) for kind in kinds}
        for backing in BACKINGS
    }
    if arguments.json:
        result = {"mb": arguments.mb, "workers": arguments.workers, "figures": figures}
        print(json.dumps({**result, "kernel_unavailable": refusal}, indent=2))
        return
    print(f"{arguments.workers} workers with the same {arguments.mb} MiB, medians of {arguments.rounds} rounds")
    if refusal is not None:
        print(f"kernel KSM: not measured, {refusal}")
    for backing, by_kind in figures.items():
        for kind, found in by_kind.items():
            huge = ", ".join(f"{found[f'huge_{when}_mib']:.0f} {when}" for when in ("before", "after"))
            print(f"{kind} memory of {backing} pages (in huge pages, MiB: {huge})")
            for count in found["before"]:
                before, after = (found[when][count] for when in ("before", "after"))
                print(
                    f"  {count} reading: {before['gb_per_cpu_second']:.1f} GB/s, merged {after['gb_per_cpu_second']:.1f}; "
                    f"{before['ns_per_load']:.1f} ns a load, merged {after['ns_per_load']:.1f}"
                )


if __name__ == "__main__":
    main()
