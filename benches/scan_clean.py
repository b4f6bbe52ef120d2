"""What scanning costs where little changes: the scanner's CPU time per page, with dirty tracking and without, in one run.

    python benches/scan_clean.py [--mb 1024] [--passes 16] [--shared] [--json]

One region whose pages all differ is scanned again and again, each time after none of its pages, one in a hundred, or all of
them were written. The memory is the same with and without tracking, and of small pages, for huge ones are not tracked. Counted
are the CPU clocks of the scanner and of the thread that registers memory; what a write costs its writer is the time of one loop
over the pages written, and the floor of that is tracking off. Every pass is one `ksmrs.merge()`, with the background still.
Every byte is verified.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import ksmrs
from merge_equal import Memory, small_pages_only, warm

PAGE = 4096
SETTLING = 8
"""Passes after which all is registered and known, or given up."""


def clocks() -> int:
    """Nanoseconds of CPU time that the threads that look at pages took so far."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() in {"ksmrs-scan", "ksmrs-track"}:
            total += int((task / "schedstat").read_text().split()[0])
    return total


class Rewritten(Memory):
    """Memory of which a part of the pages is written again and again, a word each."""

    def __init__(self, kind: str, nbytes: int) -> None:
        super().__init__(kind, nbytes, 0)
        self.pages = self.array.reshape(-1, PAGE // 8)
        self._written = np.zeros(len(self.pages), np.uint64)

    def write(self, percent: int, turn: int) -> tuple[int, int]:
        """Pages written, and the nanoseconds that took."""
        if percent == 0:
            return 0, 0
        at = np.arange(turn % (100 // percent), len(self.pages), 100 // percent)
        began = time.perf_counter_ns()
        self.pages[at, 7] += np.uint64(1)
        took = time.perf_counter_ns() - began
        self._written[at] += np.uint64(1)
        return len(at), took

    def check(self) -> None:
        self.pages[:, 7] -= self._written
        if not self.content.fills(self.array):
            raise SystemExit("a byte is wrong: this benchmark has no figures")


def measure(memory: Rewritten, percent: int, passes: int) -> dict[str, float]:
    """Nanoseconds of scanner per page looked at, and of the writer per page written."""
    scanned = cpu = written = writing = 0
    for turn in range(SETTLING + passes):
        pages, took = memory.write(percent, turn)
        before, began = ksmrs.stats().pages_scanned, clocks()
        if not ksmrs.merge(120).finished:
            raise SystemExit("a pass took two minutes: this benchmark has no figures")
        if turn >= SETTLING:
            cpu += clocks() - began
            scanned += ksmrs.stats().pages_scanned - before
            written, writing = written + pages, writing + took
    if scanned < passes * len(memory.pages):
        raise SystemExit(f"{scanned} pages looked at in {passes} passes over {len(memory.pages)}")
    return {"scanner_ns": cpu / scanned, "writer_ns": writing / written if written else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=16)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    small_pages_only()
    os.environ.setdefault("KSMRS_RUNTIME_DIR", tempfile.mkdtemp(prefix="ksmrs-bench-"))
    nbytes = arguments.mb << 20
    warm(nbytes)
    found: dict[str, dict[str, float]] = {}
    memory: Rewritten | None = None
    for tracks in (True, False):
        ksmrs.disconnect()
        ksmrs.connect(dirty_tracking=tracks)
        ksmrs.tunables.smart_scan = 0
        ksmrs.tunables.sleep_millisecs = 3_600_000
        memory = memory or Rewritten("shared" if arguments.shared else "private", nbytes)
        ksmrs.merge()
        state = ksmrs.process_stats().dirty_tracking
        if (state == "on") != tracks:
            raise SystemExit(f"dirty tracking is {state}: nothing to compare")
        for percent in (0, 1, 100):
            found[f"{percent} % written, {'tracked' if tracks else 'read'}"] = measure(
                memory, percent, arguments.passes
            )
    assert memory is not None
    memory.check()
    if arguments.json:
        print(json.dumps(found))
        return
    kind = "shared" if arguments.shared else "private"
    print(f"{arguments.mb} MiB of {kind} memory, {arguments.passes} passes each, nanoseconds")
    print(f"{'':<24}{'scanner, per page':>20}{'writer, per page written':>28}")
    for name, figures in found.items():
        print(f"{name:<24}{figures['scanner_ns']:>20.1f}{figures['writer_ns']:>28.0f}")
    for percent in (0, 1, 100):
        tracked, read = found[f"{percent} % written, tracked"], found[f"{percent} % written, read"]
        print(f"{percent} %: tracking takes {tracked['scanner_ns'] / read['scanner_ns']:.3f} of the scanner's time")


if __name__ == "__main__":
    main()
