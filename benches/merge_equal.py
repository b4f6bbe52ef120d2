"""Merge equal data of several processes: ksmrs, private and shared, against kernel KSM tuned to its maximum, in one run.

    python benches/merge_equal.py [--mb 256] [--processes 2] [--rounds 3] [--arrays] [--json]

Each process fills memory with the same pseudo-random bytes: regions of ksmrs's own against an mmap or, with --arrays, ndarrays
as NumPy makes them (of huge pages where the kernel agrees), opted in where they are by both. CPU time is that of the broker
and of every process (ksmrs), or of ksmd and every process (kernel KSM), from the moment that merging begins until every
duplicate is merged; then each process reads every page once, and what that costs is added, since merging may leave faults for
the first reader. ksmrs pays for a last round that finds nothing more; ksmd is stopped the moment it is done. Every byte is
verified before a figure is printed. A virtual machine backs its memory on first touch, so as much memory as will be used is
touched and freed first.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import kernel_ksm
import ksmrs
from ksmrs import _ksmrs

PAGE = 4096
MIB = 1 << 20
PATIENCE_SECONDS = 120


def content(nbytes: int, order: int = 0) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The same pages whatever the order, 0 or the seed of a random one."""
    words = np.random.default_rng(7).integers(0, 1 << 63, nbytes // 8, np.uint64)
    if order == 0:
        return words
    pages = words.reshape(-1, PAGE // 8)
    return pages[np.random.default_rng(order).permutation(len(pages))].reshape(-1)


class Memory:
    """A worker's memory, of one of the five kinds."""

    def __init__(self, kind: str, nbytes: int, order: int) -> None:
        if kind == "kernel":
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.array = np.frombuffer(self._map, np.uint64)
        elif kind.startswith("array"):
            # Its first and last page are not whole: a page more makes as many whole ones as the others have.
            self.array = np.empty((nbytes + PAGE) // 8, np.uint64)
        else:
            self.array = ksmrs.empty(nbytes // 8, np.uint64, shared=kind == "shared")
        self.array[:] = content(self.array.nbytes, order)
        if kind == "array":
            ksmrs.madvise(self.array, ksmrs.MADV_MERGEABLE)

    def opt_in(self) -> None:
        kernel_ksm.opt_in(self.array)


def worker(kind: str, nbytes: int, order: int) -> None:
    if kind not in ("kernel", "array by kernel"):
        # Merging begins when the driver says so, in all processes at once.
        ksmrs.connect()
    memory = Memory(kind, nbytes, order)
    commands = {
        "cpu": time.process_time,
        "mappings": lambda: len(Path("/proc/self/maps").read_text().splitlines()),
        "page tables": lambda: int(Path("/proc/self/status").read_text().partition("VmPTE:")[2].split()[0]) * 1024,
        "opt in": memory.opt_in,
        "read": lambda: int(memory.array[:: PAGE // 8].sum()) and None,
        "check": lambda: bool((memory.array == content(memory.array.nbytes, order)).all()),
    }
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


class Workers:
    def __init__(self, kind: str, nbytes: int, count: int, scattered: bool = False) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", kind, str(nbytes), str(number if scattered else 0)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]
        for process in self._processes:
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"worker {process.pid} did not start")

    def ask(self, command: str) -> list[Any]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in self._processes if process.stdout is not None]

    def cpu(self) -> float:
        return float(sum(self.ask("cpu")))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(60)


def broker_seconds(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def measure(workers: Workers, engine_cpu: Any, merge: Any, pages: int) -> dict[str, float]:
    cpu = workers.cpu() + engine_cpu()
    began = time.monotonic()
    merge()
    wall = time.monotonic() - began
    merged = workers.cpu() + engine_cpu() - cpu
    before = workers.cpu()
    workers.ask("read")
    reads = workers.cpu() - before
    if not all(workers.ask("check")):
        raise SystemExit("a byte is wrong: this benchmark has no figures")
    return {
        "cpu_seconds": merged + reads,
        "merge_cpu_seconds": merged,
        "first_read_seconds": reads,
        "wall_seconds": wall,
        "us_per_merged_page": (merged + reads) / pages * 1e6,
    }


def until(counted: Callable[[], int], wanted: int, patience: float = PATIENCE_SECONDS, pause: float = 0.002) -> None:
    """Wait until so many pages are counted, looking again after each pause."""
    deadline = time.monotonic() + patience
    while (found := counted()) < wanted:
        if time.monotonic() > deadline:
            raise SystemExit(f"{found} pages of {wanted} in {patience} s")
        time.sleep(pause)


def run_kernel(kind: str, nbytes: int, count: int) -> dict[str, float]:
    pages = nbytes // PAGE * count

    def merge() -> None:
        workers.ask("opt in")
        until(lambda: kernel_ksm.counter("pages_shared") + kernel_ksm.counter("pages_sharing"), pages)

    with Workers(kind, nbytes, count) as workers, kernel_ksm.tuned_to_the_maximum():
        return measure(workers, kernel_ksm.ksmd_seconds, merge, pages)


@contextmanager
def fresh_broker() -> Iterator[Callable[[], float]]:
    """Connect to a broker of one's own, not merging yet; gives the CPU seconds of it and of this process so far."""
    with tempfile.TemporaryDirectory(prefix="ksmrs-bench-") as directory:
        os.environ["KSMRS_RUNTIME_DIR"] = directory
        os.environ["KSMRS_IDLE_SECONDS"] = "1"
        ksmrs.connect(directory)
        ksmrs.tunables.run = 0
        broker = _ksmrs.status()
        if broker is None:
            raise RuntimeError("the broker is gone")
        pid = broker["pid"]
        yield lambda: broker_seconds(pid) + time.process_time()
        ksmrs.disconnect()


def run_ksmrs(kind: str, nbytes: int, count: int) -> dict[str, float]:
    pages = nbytes // PAGE * count

    def merge() -> None:
        report = ksmrs.merge(timeout=PATIENCE_SECONDS)
        stats = ksmrs.stats()
        if not report.finished or stats.pages_shared + stats.pages_sharing != pages:
            raise SystemExit(f"ksmrs merged less than everything: {report}, {stats}")

    with fresh_broker() as engine, Workers(kind, nbytes, count) as workers:
        return measure(workers, engine, merge, pages)


def warm(nbytes: int) -> None:
    """Touch and free as much memory as will be used."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, nbytes, PAGE):
        memory[offset] = 1
    memory.close()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arrays", action="store_true", help="ndarrays as NumPy makes them, in place")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    nbytes, count = arguments.mb * MIB, arguments.processes
    warm(nbytes * (count + 2))
    refusal = kernel_ksm.unavailable()
    rival, ours = ("array by kernel", ["array"]) if arguments.arrays else ("kernel", ["private", "shared"])
    kinds = ([rival] if refusal is None else []) + ours
    figures: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        # In turn, so that a noisy minute is everybody's.
        for kind in kinds:
            run = (run_kernel if kind == rival else run_ksmrs)(kind, nbytes, count)
            figures[kind].append(run)
    medians = {
        kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for kind, runs in figures.items()
    }
    ratios = {
        kind: statistics.median(
            run["cpu_seconds"] / theirs["cpu_seconds"]
            for run, theirs in zip(figures[kind], figures[rival], strict=True)
        )
        for kind in ours
        if refusal is None
    }
    if arguments.json:
        result = {"mb": arguments.mb, "processes": count, "medians": medians, "cpu_ratio_to_kernel": ratios}
        print(json.dumps({**result, "kernel_unavailable": refusal}, indent=2))
        return
    print(f"{count} x {arguments.mb} MiB of equal data, median of {arguments.rounds} rounds")
    if refusal is not None:
        print(f"kernel KSM: not measured, {refusal}")
    width = max(map(len, kinds))
    for kind, figure in medians.items():
        ratio = f", {ratios[kind]:.2f} of kernel KSM's CPU" if kind in ratios else ""
        print(
            f"{kind:{width}} {figure['cpu_seconds']:.2f} s CPU ({figure['us_per_merged_page']:.1f} us a page; first reads "
            f"{figure['first_read_seconds']:.2f} s), {figure['wall_seconds']:.2f} s wall{ratio}"
        )


if __name__ == "__main__":
    main()
