"""What opting memory in and out costs the caller: ndarrays as NumPy makes them, all of them merged in between.

    python benches/adopted_memory.py [--mb 1024] [--rounds 3] [--json]

Two arrays of equal bytes are opted in and merged; then one is opted out (its bytes are copied) and the other is dropped
(nothing is). Beside it, in the same round, what NumPy needs to copy such an array and to free one, since memory cannot be
given back faster than it can be written. As much memory as will be used is touched and freed first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

import ksmrs
from merge_equal import warm

MIB = 1 << 20


def milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def one_round(nbytes: int) -> dict[str, float]:
    content = np.random.default_rng(7).integers(0, 1 << 63, nbytes // 8, np.uint64)
    arrays = [content.copy(), content.copy()]
    figures: dict[str, float] = {}
    spare: list[np.ndarray[tuple[int, ...], np.dtype[np.uint64]]] = []
    figures["numpy copy"] = milliseconds(lambda: spare.append(content.copy()))
    figures["numpy free"] = milliseconds(spare.clear)
    figures["opt in"] = milliseconds(lambda: [ksmrs.madvise(array, ksmrs.MADV_MERGEABLE) for array in arrays]) / 2
    ksmrs.merge()
    pages = sum(array.nbytes // 4096 - 1 for array in arrays)
    if ksmrs.process_stats().ksm_merging_pages < pages:
        raise SystemExit(f"not everything merged: {ksmrs.process_stats()}")
    figures["opt in again"] = milliseconds(lambda: ksmrs.madvise(arrays[0], ksmrs.MADV_MERGEABLE))
    figures["opt out"] = milliseconds(lambda: ksmrs.madvise(arrays[0], ksmrs.MADV_UNMERGEABLE))
    if not all((array == content).all() for array in arrays):
        raise SystemExit("a byte is wrong: this benchmark has no figures")
    figures["drop"] = milliseconds(lambda: arrays.__delitem__(1))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    nbytes = arguments.mb * MIB
    warm(6 * nbytes)
    with tempfile.TemporaryDirectory(prefix="ksmrs-bench-") as directory:
        os.environ["KSMRS_IDLE_SECONDS"] = "1"
        ksmrs.connect(directory)
        rounds = [one_round(nbytes) for _ in range(arguments.rounds)]
        ksmrs.disconnect()
    figures = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    if arguments.json:
        print(json.dumps({"mb": arguments.mb, "milliseconds": figures}, indent=2))
        return
    print(f"{arguments.mb} MiB, median of {arguments.rounds} rounds, milliseconds of the caller's time")
    for name, value in figures.items():
        print(f"  {name:12} {value:9.2f}")


if __name__ == "__main__":
    main()
