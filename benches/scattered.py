"""Equal pages in another random order in each of two processes: what merges within the budget of mappings, and what it costs.

    python benches/scattered.py [--mb 64 128 1024] [--json]

Such pages do not join to runs, so ksmrs pays with mappings, of which it spends a third of vm.max_map_count per process; what
does not fit stays unmerged. Kernel KSM, at its maximum, needs none. CPU time and net saving as in merge_equal.py, here per page
saved. Every byte is verified.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import kernel_ksm
import ksmrs
from merge_equal import MIB, PAGE, PATIENCE_SECONDS, Engine, Workers, fresh_broker, measure, until, warm

PROCESSES = 2


def figures(workers: Workers, engine: Engine, merge: Callable[[], None], nbytes: int) -> dict[str, float]:
    found = measure(workers, engine, merge, 0)
    return {
        "us_per_saved_page": found["us_per_merged_page"],
        "part_saved": found["gross_saved_mib"] * MIB / nbytes,
        **{name: value for name, value in found.items() if name != "us_per_merged_page"},
    }


def by_kernel(nbytes: int) -> dict[str, float]:
    def merge() -> None:
        workers.ask("opt in")
        until(lambda: kernel_ksm.counter("pages_sharing"), nbytes // PAGE)

    with Workers("kernel", nbytes, PROCESSES, scattered=True) as workers, kernel_ksm.tuned_to_the_maximum():
        return figures(workers, Engine(), merge, nbytes)


def by_ksmrs(kind: str, nbytes: int) -> dict[str, float]:
    def merge() -> None:
        if not ksmrs.merge(timeout=PATIENCE_SECONDS).finished:
            raise SystemExit(f"ksmrs was not done in {PATIENCE_SECONDS} s")

    with fresh_broker() as engine, Workers(kind, nbytes, PROCESSES, scattered=True) as workers:
        return figures(workers, engine, merge, nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="+", default=[64, 128, 1024])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    refusal = kernel_ksm.unavailable()
    budget = int(Path("/proc/sys/vm/max_map_count").read_text()) // 3
    sizes: dict[str, dict[str, dict[str, float]]] = {}
    for mb in arguments.mb:
        warm(mb * MIB * (PROCESSES + 2))
        sizes[str(mb)] = {kind: by_ksmrs(kind, mb * MIB) for kind in ("private", "shared")}
        if refusal is None:
            sizes[str(mb)]["kernel"] = by_kernel(mb * MIB)
    if arguments.json:
        print(json.dumps({"budget_per_process": budget, "sizes": sizes, "kernel_unavailable": refusal}, indent=2))
        return
    print(f"{PROCESSES} processes, equal pages in random order; budget {budget} mappings a process")
    if refusal is not None:
        print(f"kernel KSM: not measured, {refusal}")
    for mb, engines in sizes.items():
        for kind, found in engines.items():
            print(
                f"{mb:>5} MiB {kind:8} {found['part_saved']:.0%} saved, {found['net_saved_mib']:.0f} MiB net, "
                f"{found['us_per_saved_page']:.1f} us CPU a page, {found['mappings_added']:.0f} mappings more"
            )


if __name__ == "__main__":
    main()
