"""Merge equal data of several processes: ksmrs, private and shared, against kernel KSM tuned to its maximum, in one run.

    python benches/merge_equal.py [--mb 256] [--processes 2] [--rounds 3] [--arrays] [--json]

Each process fills memory with the same pseudo-random bytes: regions of ksmrs's own against an mmap or, with --arrays, ndarrays
as NumPy makes them (of huge pages where the kernel agrees), opted in where they are by both. CPU time is that of the broker
and of every process (ksmrs), or of ksmd and every process (kernel KSM), from the moment that merging begins until every
duplicate is merged; then each process reads every page once, and what that costs is added, since merging may leave faults for
the first reader. ksmrs pays for a last round that finds nothing more; ksmd is stopped the moment it is done. Every byte is
verified before a figure is printed. What was saved is given gross and net (footprint.py). A virtual machine backs its memory
on first touch, so as much memory as will be used is touched and freed first.
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
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import footprint
import kernel_ksm
import ksmrs
from ksmrs import _ksmrs

PAGE = 4096
MIB = 1 << 20
WORDS = PAGE // 8
PART = 1024
"""Pages at a time."""
PATIENCE_SECONDS = 300
PR_SET_THP_DISABLE = 41


def pages(numbers: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The pages of these numbers, a row each, always the same and no two alike: what splitmix64 makes of each word's place."""
    words = numbers[:, None] * np.uint64(WORDS) + np.arange(1, WORDS + 1, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words


class Content:
    """The same pages whatever the order, 0 or the seed of a random one; made a part at a time, so that they take no memory."""

    def __init__(self, count: int, order: int = 0, first: int = 0) -> None:
        self._numbers = np.arange(first, first + count, dtype=np.uint64)
        if order:
            np.random.default_rng(order).shuffle(self._numbers)

    def parts(self, array: np.ndarray[Any, Any]) -> Iterator[tuple[Any, Any]]:
        rows = array.reshape(-1, WORDS)
        for at in range(0, len(rows), PART):
            part = rows[at : at + PART]
            yield part, pages(self._numbers[at : at + len(part)])

    def fill(self, array: np.ndarray[Any, Any]) -> None:
        for rows, content in self.parts(array):
            rows[:] = content

    def fills(self, array: np.ndarray[Any, Any]) -> bool:
        return all((rows == content).all() for rows, content in self.parts(array))


class Memory:
    """A worker's memory, of one of the five kinds, advised before it is filled."""

    def __init__(
        self, kind: str, nbytes: int, order: int, content: type[Content] = Content, advice: int | None = None
    ) -> None:
        if kind == "kernel":
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.array = np.frombuffer(self._map, np.uint64)
        elif kind.startswith("array"):
            # Its first and last page are not whole: a page more makes as many whole ones as the others have.
            self.array = np.empty((nbytes + PAGE) // 8, np.uint64)
        else:
            self.array = ksmrs.empty(nbytes // 8, np.uint64, shared=kind == "shared")
        if advice is not None:
            kernel_ksm.advise(self.array, advice)
        self.content = content(self.array.size // WORDS, order)
        self.content.fill(self.array)
        if kind == "array":
            ksmrs.madvise(self.array, ksmrs.MADV_MERGEABLE)

    def opt_in(self) -> None:
        kernel_ksm.opt_in(self.array)


def worker(kind: str, make: Callable[[], Any], **more: Callable[[Any], Any]) -> None:
    """Make memory and do as a driver says, line by line; what it says beside the usual is done with that memory."""
    # What the program itself needs to make and check contents is there before.
    trial = np.empty(2 * PART * WORDS, np.uint64)
    Content(2 * PART, 1).fill(trial)
    Content(2 * PART, 1).fills(trial)
    del trial
    empty = footprint.of()
    if kind not in ("kernel", "array by kernel"):
        # Merging begins when the driver says so, in all processes at once.
        ksmrs.connect()
    memory = make()
    commands: dict[str, Callable[[], Any]] = {
        "cpu": time.process_time,
        "empty": lambda: asdict(empty),
        "footprint": lambda: asdict(footprint.of()),
        "opt in": memory.opt_in,
        "read": lambda: int(memory.array[:: PAGE // 8].sum()) and None,
        "check": lambda: memory.content.fills(memory.array),
        **{name: partial(call, memory) for name, call in more.items()},
    }
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


class Workers:
    """Processes that each hold so many bytes of a kind; the last word on their command line is the order of their pages."""

    def __init__(
        self, kind: str, nbytes: int, count: int, scattered: bool = False, words: tuple[str, ...] = ()
    ) -> None:
        command = [sys.executable, *(words or (__file__,)), "--worker", kind, str(nbytes)]
        self.nbytes = nbytes * count
        self._processes = [
            subprocess.Popen(
                [*command, str(number if scattered else 0)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]
        for process in self._processes:
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"worker {process.pid} did not start")

    def ask(self, command: str, count: int | None = None) -> list[Any]:
        """What the workers, or the first few of them, answer; they do it at the same time."""
        asked = self._processes[:count]
        for process in asked:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in asked if process.stdout is not None]

    def cpu(self) -> float:
        return float(sum(self.ask("cpu")))

    def footprint(self, command: str = "footprint") -> footprint.Footprint:
        return footprint.together(footprint.Footprint(**found) for found in self.ask(command))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(60)


class Engine:
    """Who merges: its CPU time, and what it counts. The kernel's."""

    pid: int | None = None

    def seconds(self) -> float:
        return kernel_ksm.ksmd_seconds()

    def counter(self, name: str) -> int:
        return kernel_ksm.counter(name)


class Broker(Engine):
    """A broker, and this process, which is a client of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def seconds(self) -> float:
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9 + time.process_time()

    def counter(self, name: str) -> int:
        return int(getattr(ksmrs.stats(), name))


def measure(workers: Workers, engine: Engine, merge: Callable[[], None], merged_pages: int) -> dict[str, float]:
    """What it cost to merge, and what that saved; 0 pages stands for as many as share a frame afterwards."""
    # Once more: a virtual machine may give free memory back to its host within seconds.
    warm(workers.nbytes)
    filled, machine = workers.footprint(), footprint.machine()
    cpu = workers.cpu() + engine.seconds()
    began = time.monotonic()
    merge()
    wall = time.monotonic() - began
    merged = workers.cpu() + engine.seconds() - cpu
    sharing, shared = (engine.counter(name) for name in ("pages_sharing", "pages_shared"))
    before = workers.cpu()
    workers.ask("read")
    reads = workers.cpu() - before
    footprints = footprint.Footprints(workers.footprint("empty"), filled, workers.footprint())
    memory = footprint.net(workers.nbytes, footprints, sharing, shared, engine.pid)
    grown = {f"{name}_grown_mib": (now - machine[name]) / MIB for name, now in footprint.machine().items()}
    if not all(workers.ask("check")):
        raise SystemExit("a byte is wrong: this benchmark has no figures")
    return {
        "cpu_seconds": merged + reads,
        "merge_cpu_seconds": merged,
        "first_read_seconds": reads,
        "wall_seconds": wall,
        "us_per_merged_page": (merged + reads) / (merged_pages or sharing) * 1e6,
        **memory,
        **grown,
    }


def until(counted: Callable[[], int], wanted: int, patience: float = PATIENCE_SECONDS, pause: float = 0.002) -> None:
    """Wait until so many pages are counted, looking again after each pause."""
    deadline = time.monotonic() + patience
    while (found := counted()) < wanted:
        if time.monotonic() > deadline:
            raise SystemExit(f"{found} pages of {wanted} in {patience} s")
        time.sleep(pause)


def merge_by_kernel(workers: Workers, wanted: int) -> None:
    workers.ask("opt in")
    until(lambda: kernel_ksm.counter("pages_shared") + kernel_ksm.counter("pages_sharing"), wanted)


def merge_by_ksmrs(_workers: Workers, wanted: int) -> None:
    report = ksmrs.merge(timeout=PATIENCE_SECONDS)
    stats = ksmrs.stats()
    if not report.finished or stats.pages_shared + stats.pages_sharing != wanted:
        raise SystemExit(f"ksmrs merged less than everything: {report}, {stats}")


def run_kernel(kind: str, nbytes: int, count: int) -> dict[str, float]:
    wanted = nbytes // PAGE * count
    with Workers(kind, nbytes, count) as workers, kernel_ksm.tuned_to_the_maximum():
        return measure(workers, Engine(), lambda: merge_by_kernel(workers, wanted), wanted)


@contextmanager
def fresh_broker(**options: Any) -> Iterator[Broker]:
    """Connect to a broker of one's own, not merging yet."""
    with tempfile.TemporaryDirectory(prefix="ksmrs-bench-") as directory:
        os.environ["KSMRS_RUNTIME_DIR"] = directory
        os.environ["KSMRS_IDLE_SECONDS"] = "1"
        ksmrs.connect(directory, **options)
        ksmrs.tunables.run = 0
        broker = _ksmrs.status()
        if broker is None:
            raise RuntimeError("the broker is gone")
        yield Broker(broker["pid"])
        ksmrs.disconnect()


def run_ksmrs(kind: str, nbytes: int, count: int) -> dict[str, float]:
    wanted = nbytes // PAGE * count
    with fresh_broker() as engine, Workers(kind, nbytes, count) as workers:
        return measure(workers, engine, lambda: merge_by_ksmrs(workers, wanted), wanted)


def small_pages_only() -> None:
    """No transparent huge pages in this process and those it starts."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def warm(nbytes: int) -> None:
    """Touch and free as much memory as will be used."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, nbytes, PAGE):
        memory[offset] = 1
    memory.close()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, nbytes, order = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        worker(kind, lambda: Memory(kind, nbytes, order))
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
            f"{figure['first_read_seconds']:.2f} s), {figure['wall_seconds']:.2f} s wall{ratio}; saved "
            f"{figure['gross_saved_mib']:.0f} MiB, net {figure['net_saved_mib']:.1f}; in huge pages "
            f"{figure['huge_before_mib']:.0f} MiB before, {figure['huge_after_mib']:.0f} after"
        )


if __name__ == "__main__":
    main()
