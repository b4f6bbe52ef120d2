"""What an application loses to merging: NumPy streaming and random writes while its memory merges, against the same without.

    python benches/application.py [--mb 128] [--seconds 5] [--rounds 3] [--json]

Two processes hold the same data; one of them works, the other keeps still. Half of it is a table, the other half a work area.
In turn, a MiB of the table plus a number is stored into the work area, and one word is written into each of 64 pages of the
table at random, those of the time before being put back so that they merge again. The engine is off, or runs by its defaults,
or without pause, in this order with new processes each; ksmrs in private and in shared memory. Timed is each of the two
operations, by the clock; the working thread's own CPU time per operation does not tell how long it waited, nor what else the
machine did. CPU time of the engine is that of the broker, of the other process, and of the application beside the thread that
works; or of ksmd. As much memory as will be used is touched and freed first. Every byte is verified.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

import kernel_ksm
import ksmrs
from merge_equal import MIB, PAGE, WORDS, Engine, Memory, Workers, fresh_broker, warm, worker
from time_to_savings import KERNEL_DEFAULTS
from write_wait import percentiles

CHUNK = MIB // PAGE
PAGES = 64
WORD = 7
MODES = ("off", "defaults", "without pause")
OURS_WITHOUT_PAUSE = {"advisor_mode": "none", "pages_to_scan": 100_000, "sleep_millisecs": 0, "smart_scan": 0}


class Application(Memory):
    def __init__(self, kind: str, nbytes: int) -> None:
        super().__init__(kind, nbytes, 0)
        rows = self.array.reshape(-1, WORDS)
        half = len(rows) // 2
        self._table, self._work = rows[:half], rows[half:]
        self._word = self._table[:, WORD].copy()
        self._chance = np.random.default_rng(5)
        self._written = (np.empty(0, np.intp), 0)
        self._stored: dict[int, tuple[int, tuple[np.ndarray[Any, Any], int]]] = {}
        """By chunk: what was added, and which words of the table were others meanwhile."""

    def _stream(self, first: int, turn: int) -> None:
        np.add(self._table[first : first + CHUNK], np.uint64(turn), out=self._work[first : first + CHUNK])

    def _write(self, at: np.ndarray[Any, Any], turn: int) -> None:
        before, _ = self._written
        self._table[before, WORD] = self._word[before]
        self._table[at, WORD] = turn

    def run(self, seconds: float) -> dict[str, Any]:
        took: dict[str, list[int]] = {"streaming": [], "random writes": []}
        clock = time.perf_counter_ns
        process, thread = time.process_time(), time.thread_time()
        began = clock()
        turn = 0
        while clock() - began < seconds * 1e9:
            turn += 1
            first = turn * CHUNK % len(self._table)
            at = self._chance.integers(0, len(self._table), PAGES)
            before = clock()
            self._stream(first, turn)
            between = clock()
            self._write(at, turn)
            after = clock()
            took["streaming"].append(between - before)
            took["random writes"].append(after - between)
            self._stored[first] = (turn, self._written)
            self._written = (at, turn)
        elapsed = (clock() - began) / 1e9
        working = time.thread_time() - thread
        return {
            "operations_per_second": 2 * turn / elapsed,
            "cpu_us_per_operation": working / (2 * turn) * 1e6,
            "beside_seconds": time.process_time() - process - working,
            "seconds": elapsed,
            **{name: {"mean": statistics.fmean(each) / 1e3, **percentiles(each)} for name, each in took.items()},
        }

    def check(self) -> bool:
        """Whether both halves hold what was put there, to the byte."""
        self._write(self._written[0][:0], 0)
        if not self.content.fills(self._table if self._stored else self.array):
            return False
        for first, (turn, (at, value)) in self._stored.items():
            expected = self._table[first : first + CHUNK].copy()
            expected[at[(at >= first) & (at < first + CHUNK)] - first, WORD] = value
            expected += np.uint64(turn)
            if not (self._work[first : first + CHUNK] == expected).all():
                return False
        return True


def keep_still(engine: str) -> None:
    """Turn merging off, and leave what is merged so."""
    if engine == "kernel":
        kernel_ksm.turn("run", 0)
    else:
        ksmrs.tunables.run = 0


def run(kind: str, mode: str, nbytes: int, seconds: float) -> dict[str, Any]:
    with ExitStack() as stack:
        engine: Engine = stack.enter_context(fresh_broker()) if kind != "kernel" else Engine()
        words = (__file__, str(seconds))
        workers = stack.enter_context(Workers(kind, nbytes, 2, words=words))
        if kind == "kernel":
            if mode == "defaults":
                stack.enter_context(kernel_ksm.turned(KERNEL_DEFAULTS))
            elif mode == "without pause":
                stack.enter_context(kernel_ksm.tuned_to_the_maximum())
            else:
                stack.enter_context(kernel_ksm.turned({"run": 0}))
            workers.ask("opt in")
        elif mode != "off":
            if mode == "without pause":
                for knob, value in OURS_WITHOUT_PAUSE.items():
                    setattr(ksmrs.tunables, knob, value)
            ksmrs.tunables.run = 1
        before, other = engine.seconds(), sum(workers.ask("cpu")[1:])
        (found,) = workers.ask("run", 1)
        engine_seconds = engine.seconds() - before
        if kind != "kernel":
            engine_seconds += found["beside_seconds"] + sum(workers.ask("cpu")[1:]) - other
        found["engine_cpu_share"] = engine_seconds / found["seconds"]
        found["pages_sharing"] = engine.counter("pages_sharing")
        keep_still(kind)
        if not all(workers.ask("check")):
            raise SystemExit("a byte is wrong: this benchmark has no figures")
        return found


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: median([run[name] for run in runs])
        if isinstance(value, dict)
        else statistics.median(r[name] for r in runs)
        for name, value in runs[0].items()
    }


def main() -> None:
    if sys.argv[2:3] == ["--worker"]:
        seconds, kind, nbytes = float(sys.argv[1]), sys.argv[3], int(sys.argv[4])
        worker(kind, lambda: Application(kind, nbytes), run=lambda memory: memory.run(seconds), check=Application.check)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.mb < 2 or arguments.mb % 2:
        parser.error(f"--mb {arguments.mb}: table and work area are whole MiB; give an even number")
    nbytes = arguments.mb * MIB
    warm(3 * nbytes)
    refusal = kernel_ksm.unavailable()
    kinds = ["private", "shared", *(["kernel"] if refusal is None else [])]
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {kind: {mode: [] for mode in MODES} for kind in kinds}
    for _ in range(arguments.rounds):
        # In turn, so that a noisy minute is everybody's.
        for kind in kinds:
            for mode in MODES:
                runs[kind][mode].append(run(kind, mode, nbytes, arguments.seconds))
    figures = {kind: {mode: median(each) for mode, each in modes.items()} for kind, modes in runs.items()}
    if arguments.json:
        result = {"mb": arguments.mb, "seconds": arguments.seconds, "figures": figures}
        print(json.dumps({**result, "kernel_unavailable": refusal}, indent=2))
        return
    print(
        f"two processes with the same {arguments.mb} MiB, medians of {arguments.rounds} rounds of {arguments.seconds} s"
    )
    if refusal is not None:
        print(f"kernel KSM: not measured, {refusal}")
    for kind, modes in figures.items():
        for mode, found in modes.items():
            rate, cpu = "operations_per_second", "cpu_us_per_operation"
            parts = found[rate] / modes["off"][rate], found[cpu] / modes["off"][cpu]
            print(
                f"{kind:8} {mode:14} {found[rate]:8,.0f} operations/s, {parts[0]:.2f} of without; "
                f"{found[cpu]:.0f} us CPU each, {parts[1]:.2f} of without; "
                f"engine {found['engine_cpu_share']:.0%} of a CPU, {found['pages_sharing']:,.0f} pages sharing"
            )
            for name in ("streaming", "random writes"):
                print(f"    {name:14} " + ", ".join(f"{at} {us:.0f} us" for at, us in found[name].items()))


if __name__ == "__main__":
    main()
