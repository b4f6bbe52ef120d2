"""How soon 90 % of what can be saved is saved, by ksmrs and by kernel KSM with the settings that each comes with, in one run.

    python benches/time_to_savings.py [--mb 64] [--processes 2] [--newcomer 0] [--alone] [--json]

The same data in each process, as in merge_equal.py. The clock runs from the moment that merging begins (run=1, all memory
opted in) until pages_sharing is nine tenths of the duplicates. Kernel KSM is set to the kernel's defaults, not to what this
machine is set to. With `--newcomer` one more process is there from the beginning, with so many MiB that nobody else has.
`--alone` leaves kernel KSM out, which would need the better part of an hour beside 10 GiB. CPU time is that of the broker and
of every process, or of ksmd and every process. Every byte is verified.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import kernel_ksm
import ksmrs
from merge_equal import MIB, PAGE, Content, Engine, Memory, Workers, fresh_broker, measure, until, warm, worker

PART = 0.9
PATIENCE_SECONDS = 300
KERNEL_DEFAULTS: dict[str, int | str] = {
    "advisor_mode": "none",
    "smart_scan": 1,
    "sleep_millisecs": 20,
    "pages_to_scan": 100,
    "use_zero_pages": 0,
    "max_page_sharing": 256,
    "run": 1,
}


class Unlike(Content):
    """Pages that no other process has."""

    def __init__(self, count: int, order: int = 0) -> None:
        super().__init__(count, order, 1 << 32)


@contextmanager
def newcomer(kind: str, nbytes: int) -> Iterator[None]:
    """A process that has memory of its own, advised as soon as it is there; none if it has none."""
    if not nbytes:
        yield
        return
    with Workers(kind, nbytes, 1, words=(__file__,)) as large:
        large.ask("opt in")
        yield
        if not all(large.ask("check")):
            raise SystemExit("a byte is wrong: this benchmark has no figures")


def until_saved(sharing: Callable[[], int], wanted: int) -> None:
    until(sharing, wanted, PATIENCE_SECONDS, pause=0.02)


def by_kernel(nbytes: int, count: int, wanted: int, large: int) -> dict[str, float]:
    def merge() -> None:
        workers.ask("opt in")
        until_saved(lambda: kernel_ksm.counter("pages_sharing"), wanted)

    with Workers("kernel", nbytes, count) as workers, kernel_ksm.turned(KERNEL_DEFAULTS), newcomer("kernel", large):
        return measure(workers, Engine(), merge, wanted)


def by_ksmrs(kind: str, nbytes: int, count: int, wanted: int, large: int = 0) -> dict[str, float]:
    def merge() -> None:
        ksmrs.tunables.run = 1
        until_saved(lambda: ksmrs.stats().pages_sharing, wanted)

    with fresh_broker() as engine, newcomer(kind, large), Workers(kind, nbytes, count) as workers:
        return measure(workers, engine, merge, wanted)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, nbytes = sys.argv[2], int(sys.argv[3])
        worker(kind, lambda: Memory(kind, nbytes, 0, Unlike))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--newcomer", type=int, default=0, metavar="MB")
    parser.add_argument("--alone", action="store_true", help="ksmrs only")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    nbytes, count = arguments.mb * MIB, arguments.processes
    wanted = int(PART * (nbytes // PAGE) * (count - 1))
    large = arguments.newcomer * MIB
    warm(nbytes * (count + 2) + large)
    refusal = "left out" if arguments.alone else kernel_ksm.unavailable()
    figures = {kind: by_ksmrs(kind, nbytes, count, wanted, large) for kind in ("private", "shared")}
    if refusal is None:
        figures["kernel"] = by_kernel(nbytes, count, wanted, large)
    if arguments.json:
        result = {"mb": arguments.mb, "processes": count, "newcomer_mb": arguments.newcomer, "figures": figures}
        print(json.dumps({**result, "kernel_unavailable": refusal}, indent=2))
        return
    beside = f", beside a newcomer with {arguments.newcomer} MiB" if large else ""
    print(f"{count} x {arguments.mb} MiB of equal data{beside}, until 90 % is saved, default settings")
    if refusal is not None:
        print(f"kernel KSM: not measured, {refusal}")
    for kind, figure in figures.items():
        print(f"{kind:8} {figure['wall_seconds']:.2f} s, {figure['merge_cpu_seconds']:.2f} s CPU")


if __name__ == "__main__":
    main()
