"""What it costs that ksmrs is there while nothing happens: wakeups, CPU time and memory, of the broker and of a client.

    python benches/idle.py [--mb 256] [--processes 4] [--seconds 60] [--settle 30] [--json]

With default settings, once with processes that are connected and have no regions, once per kind of memory with the same data
in each, all of it merged, that nobody touches any more. Looked at is from `--settle` seconds after that on, for `--seconds`.
Wakeups are voluntary context switches, CPU time is that of schedstat, summed over a process's threads; of clients the figures
are per process. The broker's memory is its RSS without the frame stores, and its PSS; it grows with pages, not with time.
Every byte is verified at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import footprint
import ksmrs
from merge_equal import MIB, PAGE, Memory, Workers, fresh_broker, until, worker

PATIENCE_SECONDS = 300
KINDS = ("none", "private", "shared")


class Nothing:
    """The memory of a worker that has none."""

    def opt_in(self) -> None:
        """There is nothing to opt in."""


class Activity:
    """What the threads of a process did so far."""

    def __init__(self, pid: int) -> None:
        self.wakeups = self.nanoseconds = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            self.wakeups += footprint.fields(f"{task}/status")["voluntary_ctxt_switches"]
            self.nanoseconds += int((task / "schedstat").read_text().split()[0])
        self.at = time.monotonic()

    def since(self, before: Activity) -> dict[str, float]:
        seconds = self.at - before.at
        return {
            "wakeups_per_second": (self.wakeups - before.wakeups) / seconds,
            "cpu_percent": (self.nanoseconds - before.nanoseconds) / seconds / 1e7,
        }


def measure(kind: str, nbytes: int, count: int, seconds: float, settle: float) -> dict[str, float]:
    with fresh_broker() as broker, Workers(kind, nbytes, count, words=(__file__,)) as workers:
        assert broker.pid is not None
        ksmrs.tunables.run = 1
        if kind != "none":
            wanted = nbytes // PAGE * (count - 1)
            until(lambda: ksmrs.stats().pages_sharing, wanted, PATIENCE_SECONDS, pause=0.1)
        pids = workers.ask("pid")
        time.sleep(settle)
        began, passes = [Activity(pid) for pid in (broker.pid, *pids)], ksmrs.stats().full_scans
        time.sleep(seconds)
        now = [Activity(pid).since(before) for pid, before in zip((broker.pid, *pids), began, strict=True)]
        memory = footprint.fields(f"/proc/{broker.pid}/smaps_rollup")
        status = footprint.fields(f"/proc/{broker.pid}/status")
        found = {
            **{f"broker_{name}": value for name, value in now[0].items()},
            **{f"client_{name}": sum(each[name] for each in now[1:]) / count for name in now[0]},
            "passes_per_second": (ksmrs.stats().full_scans - passes) / seconds,
            "broker_rss_mib": (status["RssAnon"] + status["RssFile"]) / MIB,
            "broker_pss_mib": memory["Pss"] / MIB,
        }
        if kind != "none" and not all(workers.ask("check")):
            raise SystemExit("a byte is wrong: this benchmark has no figures")
        return found


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, nbytes = sys.argv[2], int(sys.argv[3])
        worker(kind, Nothing if kind == "none" else lambda: Memory(kind, nbytes, 0), pid=lambda _memory: os.getpid())
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--settle", type=float, default=30)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sizes = (arguments.mb * MIB, arguments.processes)
    figures = {kind: measure(kind, *sizes, arguments.seconds, arguments.settle) for kind in KINDS}
    if arguments.json:
        print(json.dumps({"mb": arguments.mb, "processes": arguments.processes, "figures": figures}, indent=2))
        return
    print(
        f"{arguments.processes} clients with {arguments.mb} MiB each, all merged and untouched, {arguments.seconds} s"
    )
    for kind, found in figures.items():
        print(
            f"{kind:8} broker {found['broker_wakeups_per_second']:.1f} wakeups/s, {found['broker_cpu_percent']:.3f} % CPU, "
            f"RSS {found['broker_rss_mib']:.1f} MiB, PSS {found['broker_pss_mib']:.1f}; a client "
            f"{found['client_wakeups_per_second']:.1f} wakeups/s, {found['client_cpu_percent']:.3f} % CPU; "
            f"{found['passes_per_second']:.2f} passes/s"
        )


if __name__ == "__main__":
    main()
