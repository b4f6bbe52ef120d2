"""How the cost of merging grows with memory, from 64 MiB to 8 GiB: CPU per page, wall time, metadata; linear, or not.

    python benches/growth.py [--mb 64 256 1024 4096 8192] [--json]

Two processes hold the same data, which is half of each size; merged by ksmrs, private and shared, and by kernel KSM at its
maximum, measured as in merge_equal.py, one round per size. CPU, wall time and metadata are fitted by a straight line over the
number of pages, least squares, of the relative error for times: the slope is the cost of a page more, the intercept what any
merge costs; the exponent is the slope between logarithms, 1 where growth is linear. Metadata is what the broker, the clients
and the mappings take beside the data, or ksm_rmap_items and stable nodes (footprint.py). Every byte is verified.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

import kernel_ksm
from merge_equal import MIB, PAGE, run_kernel, run_ksmrs, warm

PROCESSES = 2
KINDS = ("private", "shared")
FITTED = {"cpu": "us_per_page", "wall": "wall_us_per_page", "metadata": "metadata_bytes_per_page"}


def cost(mb: int, found: dict[str, float]) -> dict[str, float]:
    pages = mb * MIB // PAGE
    return {
        "pages": pages,
        "us_per_page": found["cpu_seconds"] / pages * 1e6,
        "wall_us_per_page": found["wall_seconds"] / pages * 1e6,
        "wall_seconds": found["wall_seconds"],
        "metadata_bytes_per_page": (found["gross_saved_mib"] - found["net_saved_mib"]) * MIB / pages,
        "net_saved_mib": found["net_saved_mib"],
        "huge_before_part": found["huge_before_mib"] / mb,
        "huge_after_part": found["huge_after_mib"] / mb,
    }


def fit(costs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    pages = np.array([each["pages"] for each in costs])
    found = {}
    for name, per_page in FITTED.items():
        total = pages * np.array([each[per_page] for each in costs])
        # Noise in time grows with it; that in memory does not, and what is fixed may be more than all that grows.
        slope, intercept = np.polyfit(pages, total, 1, w=None if name == "metadata" else 1 / total)
        found[name] = {"per_page": slope, "fixed": intercept}
        if name != "metadata":
            found[name]["exponent"], _ = np.polyfit(np.log(pages), np.log(total), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="+", default=[64, 256, 1024, 4096, 8192])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if len(set(arguments.mb)) < 2:
        parser.error("growth needs two sizes at least, as --mb 64 128")
    warm((max(arguments.mb) + 512) * MIB)
    refusal = kernel_ksm.unavailable()
    kinds = (*KINDS, "kernel") if refusal is None else KINDS
    sizes: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in kinds}
    for mb in sorted(set(arguments.mb)):
        for kind in kinds:
            run = run_kernel if kind == "kernel" else run_ksmrs
            sizes[kind][str(mb)] = cost(mb, run(kind, mb * MIB // PROCESSES, PROCESSES))
    fits = {kind: fit(list(costs.values())) for kind, costs in sizes.items()}
    if arguments.json:
        print(json.dumps({"sizes": sizes, "fits": fits, "kernel_unavailable": refusal}, indent=2))
        return
    if refusal is not None:
        print(f"kernel KSM: not measured, {refusal}")
    for kind, costs in sizes.items():
        for mb, found in costs.items():
            print(
                f"{kind:8} {mb:>5} MiB: {found['us_per_page']:6.2f} us CPU a page, {found['wall_seconds']:7.2f} s wall, "
                f"{found['metadata_bytes_per_page']:7.1f} bytes of metadata a page; in huge pages "
                f"{found['huge_before_part']:.0%} before, {found['huge_after_part']:.0%} after"
            )
        for name, line in fits[kind].items():
            unit, scale, fixed = ("bytes", MIB, "MiB") if name == "metadata" else ("us", 1e6, "s")
            print(
                f"{kind:8} {name}: {line['per_page']:.2f} {unit} a page more, {line['fixed'] / scale:.2f} {fixed} fixed"
                + (f"; grows with the power {line['exponent']:.3f}" if "exponent" in line else "")
            )


if __name__ == "__main__":
    main()
