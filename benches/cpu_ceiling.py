"""How much CPU time merging takes in a process, against its ceiling (`client_max_cpu`).

    python benches/cpu_ceiling.py [--mb 256] [--seconds 20] [--ceilings 5 20 200] [--json]

Two processes with the same data, of which each goes on writing half, are scanned and merged in the background without pause.
What the threads of ksmrs in each take is read from schedstat ten times a second; told are the whole share, and the largest
share in any second, of the one that took more, from two seconds on. At 200 percent nothing is held back. Every byte that nobody
writes is verified at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

import ksmrs
from merge_equal import MIB, PAGE, Memory, Workers, fresh_broker, worker

KINDS = ("private", "shared")
PER_SECOND = 10
WITHOUT_PAUSE = {"advisor_mode": "none", "pages_to_scan": 100_000, "sleep_millisecs": 0, "smart_scan": 0}


class Restless(Memory):
    """Memory whose second half is written from beginning to end, again and again, a word of each page."""

    def __init__(self, kind: str, nbytes: int) -> None:
        super().__init__(kind, nbytes, 0)
        whole = self.array
        self.array, self._written = whole[: whole.size // 2], whole[whole.size // 2 :].reshape(-1, PAGE // 8)
        self.content = type(self.content)(self.array.size * 8 // PAGE)
        threading.Thread(target=self._write, daemon=True).start()

    def _write(self) -> None:
        turn = 0
        while True:
            for page in self._written[turn % 4 :: 4]:
                page[3] = np.uint64(turn)
            turn += 1
            time.sleep(0.05)


def clock(pid: int) -> float:
    """Seconds of CPU that the threads of ksmrs in that process took so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().strip() in {"ksmrs-scan", "ksmrs-remap"}:
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def shares(looks: list[tuple[float, float]]) -> tuple[float, float]:
    """The share of a CPU over all looks, each a time and a clock, and the largest of any second; in percent."""
    (began, first), (ended, last) = looks[0], looks[-1]
    seconds = zip(looks, looks[PER_SECOND:], strict=False)
    largest = max((then - now) / (at - since) for (since, now), (at, then) in seconds)
    return 100 * (last - first) / (ended - began), 100 * largest


def measure(kind: str, nbytes: int, ceiling: int, seconds: float) -> dict[str, float]:
    with fresh_broker(), Workers(kind, nbytes, 2, words=(__file__,)) as workers:
        for knob, value in {**WITHOUT_PAUSE, "client_max_cpu": ceiling, "run": 1}.items():
            setattr(ksmrs.tunables, knob, value)
        pids = workers.ask("pid")
        time.sleep(2)
        looks: list[list[tuple[float, float]]] = [[] for _ in pids]
        scanned = ksmrs.stats().pages_scanned
        for _ in range(int(seconds * PER_SECOND)):
            for pid, mine in zip(pids, looks, strict=True):
                mine.append((time.monotonic(), clock(pid)))
            time.sleep(1 / PER_SECOND)
        scanned = ksmrs.stats().pages_scanned - scanned
        if not all(workers.ask("check")):
            raise SystemExit("a byte is wrong: this benchmark has no figures")
        whole, largest = (max(found) for found in zip(*map(shares, looks), strict=True))
        return {"percent": whole, "percent_in_a_second": largest, "pages_per_second": scanned / seconds}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, nbytes = sys.argv[2], int(sys.argv[3])
        worker(kind, lambda: Restless(kind, nbytes), pid=lambda _memory: os.getpid())
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--ceilings", type=int, nargs="+", default=[5, 20, 200])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.seconds < 2:
        parser.error("a largest second needs two at least")
    figures = {
        kind: {
            str(ceiling): measure(kind, arguments.mb * MIB, ceiling, arguments.seconds)
            for ceiling in arguments.ceilings
        }
        for kind in KINDS
    }
    if arguments.json:
        print(json.dumps({"mb": arguments.mb, "figures": figures}, indent=2))
        return
    for kind, ceilings in figures.items():
        for ceiling, found in ceilings.items():
            print(
                f"{kind:8} at {ceiling:>3} %: {found['percent']:5.1f} % of a CPU, in its busiest second "
                f"{found['percent_in_a_second']:5.1f} %; {found['pages_per_second']:,.0f} pages looked at per second"
            )


if __name__ == "__main__":
    main()
