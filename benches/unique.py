"""Scan memory whose pages all differ: the first pass, and later ones after none, one in a hundred or all of them were written.

    python benches/unique.py [--mb 1024] [--passes 8] [--json]

The same pages for ksmrs, private and shared, with dirty tracking and without, and for kernel KSM at its maximum, with and
without smart scan, and by its defaults; small pages for all, for huge ones are not tracked. A pass of ksmrs is one
`ksmrs.merge()` with the background still; one of kernel KSM is from run=1 until full_scans is one more and run=0 again, in
batches of 1000 pages, so that little of the next pass is in it. What was looked at is what each engine counts as scanned, or as
left out by smart scan. CPU time is that of the broker and the whole process, or of ksmd, without what the writing takes. As
much memory as will be used is touched and freed first. Every byte is verified.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import kernel_ksm
import ksmrs
from merge_equal import MIB, PATIENCE_SECONDS, Engine, fresh_broker, small_pages_only, until, warm
from scan_clean import SETTLING, Rewritten
from time_to_savings import KERNEL_DEFAULTS

STATES = {"clean": 0, "1 % written": 1, "100 % written": 100}
BATCH = 1000
MAXIMUM = {"pages_to_scan": BATCH, "sleep_millisecs": 0, "advisor_mode": "none", "use_zero_pages": 0, "run": 0}
BY_KERNEL: dict[str, dict[str, int | str]] = {
    "kernel": {**MAXIMUM, "smart_scan": 0},
    "kernel, smart scan": {**MAXIMUM, "smart_scan": 1},
    "kernel, defaults": {**KERNEL_DEFAULTS, "run": 0},
}
DEFAULT_PAGES = 20_000
"""As many as ksmd looks at in four seconds by its defaults."""
AGES = 12
"""Passes after which smart scan takes turns."""


class Cost:
    """CPU and wall time of passes, and the pages looked at in them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.cpu = self.wall = 0.0
        self.pages = self.passes = 0

    def looked_at(self) -> int:
        return self._engine.counter("pages_scanned") + self._engine.counter("pages_skipped")

    def of(self, one_pass: Callable[[], None]) -> None:
        pages, passes, cpu = self.looked_at(), self._engine.counter("full_scans"), self._engine.seconds()
        began = time.monotonic()
        one_pass()
        self.wall += time.monotonic() - began
        self.cpu += self._engine.seconds() - cpu
        self.pages += self.looked_at() - pages
        self.passes += self._engine.counter("full_scans") - passes

    def figures(self) -> dict[str, float]:
        return {
            "us_per_page": self.cpu / self.pages * 1e6,
            "pages_per_second": self.pages / self.wall,
            "cpu_seconds": self.cpu,
            "wall_seconds": self.wall,
            "passes": self.passes,
        }


def measure(
    memory: Rewritten, engine: Engine, one_pass: Callable[[], None], settling: int, passes: int
) -> dict[str, dict[str, float]]:
    first = Cost(engine)
    first.of(one_pass)
    found = {"first pass": first.figures()}
    for state, percent in STATES.items():
        cost = Cost(engine)
        for turn in range(settling + passes):
            memory.write(percent, turn)
            if turn < settling:
                one_pass()
            else:
                cost.of(one_pass)
        found[state] = cost.figures()
    memory.check()
    return found


def by_ksmrs(kind: str, tracks: bool, nbytes: int, passes: int) -> dict[str, dict[str, float]]:
    def one_pass() -> None:
        if not ksmrs.merge(PATIENCE_SECONDS).finished:
            raise SystemExit(f"no pass of ksmrs in {PATIENCE_SECONDS} s")

    with fresh_broker(dirty_tracking=tracks) as engine:
        ksmrs.tunables.smart_scan = 0
        memory = Rewritten(kind, nbytes)
        found = measure(memory, engine, one_pass, SETTLING, passes)
        state = ksmrs.process_stats().dirty_tracking
        if (state == "on") != tracks:
            raise SystemExit(f"dirty tracking is {state}")
        return found


def by_kernel(name: str, nbytes: int, passes: int) -> dict[str, dict[str, float]]:
    defaults = name == "kernel, defaults"

    def one_pass() -> None:
        wanted = kernel_ksm.counter("full_scans") + 1
        pages = cost.looked_at() + DEFAULT_PAGES
        kernel_ksm.turn("run", 1)
        if defaults:
            until(cost.looked_at, pages, pause=0.02)
        else:
            until(lambda: kernel_ksm.counter("full_scans"), wanted)
        kernel_ksm.turn("run", 0)

    memory = Rewritten("kernel", nbytes)
    with kernel_ksm.turned(BY_KERNEL[name]):
        cost = Cost(Engine())
        memory.opt_in()
        if not defaults:
            return measure(memory, Engine(), one_pass, AGES if "smart" in name else 2, passes)
        cost.of(one_pass)
        return {"first pass": cost.figures()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    nbytes = arguments.mb * MIB
    small_pages_only()
    warm(2 * nbytes)
    refusal = kernel_ksm.unavailable()
    figures = {
        f"{kind}, {'tracked' if tracks else 'read'}": by_ksmrs(kind, tracks, nbytes, arguments.passes)
        for kind in ("private", "shared")
        for tracks in (True, False)
    }
    if refusal is None:
        figures |= {name: by_kernel(name, nbytes, arguments.passes) for name in BY_KERNEL}
    ratios = {
        name: {state: found["us_per_page"] / figures["kernel"][state]["us_per_page"] for state, found in states.items()}
        for name, states in figures.items()
        if "kernel" in figures and name != "kernel"
    }
    if arguments.json:
        result = {"mb": arguments.mb, "figures": figures, "cpu_ratio_to_kernel": ratios}
        print(json.dumps({**result, "kernel_unavailable": refusal}, indent=2))
        return
    print(
        f"{arguments.mb} MiB of unique pages, {arguments.passes} passes each: us of CPU per page, pages/s by the clock"
    )
    if refusal is not None:
        print(f"kernel KSM: not measured, {refusal}")
    for name, states in figures.items():
        for state, found in states.items():
            ratio = ratios.get(name, {}).get(state)
            part = "" if ratio is None else f"; {ratio:.4f} of kernel KSM's CPU, 1/{1 / ratio:.1f}"
            print(
                f"{name:19} {state:14} {found['us_per_page']:8.4f} us {found['pages_per_second']:13,.0f} pages/s{part}"
            )


if __name__ == "__main__":
    main()
