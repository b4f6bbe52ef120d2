"""What the results of the benches become in the report: the lines of its table, with DESIGN's targets.

Relies on the JSON that each bench prints, of which it takes what can be compared; measures nothing and draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROGRAMS = ("model_server", "data_frames", "prefork_server", "joblib_workers")
"""Of benches/programs/."""


@dataclass
class Row:
    """A line of the table; a ratio is a part of kernel KSM's figure in the same run, and so is a target, at most."""

    work: str
    unit: str
    kernel_default: float | None = None
    kernel_maximum: float | None = None
    private: float | None = None
    shared: float | None = None
    ratio_private: float | None = None
    ratio_shared: float | None = None
    target_private: float | None = None
    target_shared: float | None = None

    def reached(self, quick: bool) -> str:
        verdicts = []
        for kind in ("private", "shared"):
            ratio, target = getattr(self, f"ratio_{kind}"), getattr(self, f"target_{kind}")
            if ratio is not None and target is not None:
                verdicts.append("yes" if ratio <= target else "no")
        return "not judged" if quick and verdicts else pair(*verdicts)


def saved(work: str, engines: dict[str, dict[str, float]]) -> list[Row]:
    """What a merge saved, gross and net of all that merging takes."""
    kinds = {"kernel_maximum": ("kernel", "array by kernel"), "private": ("private", "array"), "shared": ("shared",)}
    found = []
    for word in ("gross", "net"):
        row = Row(f"{work}: saved, {word}", "MiB")
        for field, names in kinds.items():
            for figures in (engines[name] for name in names if name in engines):
                setattr(row, field, figures[f"{word}_saved_mib"])
        found.append(row)
    return found


def merged(work: str, target_private: float | None, target_shared: float | None, result: dict[str, Any]) -> Row:
    cpu = {kind: figures["cpu_seconds"] for kind, figures in result["medians"].items()}
    ratio = result["cpu_ratio_to_kernel"]
    return Row(
        f"{work}: {result['processes']} x {result['mb']} MiB",
        "s CPU",
        kernel_maximum=cpu.get("kernel", cpu.get("array by kernel")),
        private=cpu.get("private", cpu.get("array")),
        shared=cpu.get("shared"),
        ratio_private=ratio.get("private", ratio.get("array")),
        ratio_shared=ratio.get("shared"),
        target_private=target_private,
        target_shared=target_shared,
    )


def growth(result: dict[str, Any]) -> list[Row]:
    def row(work: str, unit: str, name: str, figure: str, target: float | None = None) -> Row:
        value = {kind: fits[name][figure] for kind, fits in result["fits"].items()}
        found = Row(work, unit, None, value.get("kernel"), value["private"], value["shared"])
        if target and "kernel" in value:
            found.ratio_private, found.ratio_shared = (value[kind] / value["kernel"] for kind in ("private", "shared"))
            found.target_private = found.target_shared = target
        return found

    sizes = [int(size) for size in result["sizes"]["private"]]
    span = f"merge equal data, {min(sizes)} to {max(sizes)} MiB"
    return [
        row(f"{span}: a page more", "us CPU", "cpu", "per_page"),
        row(f"{span}: a page more", "us wall", "wall", "per_page"),
        row(f"{span}: a page more", "bytes of metadata", "metadata", "per_page", 1 / 2),
        row(f"{span}: CPU grows with the power", "of pages", "cpu", "exponent"),
    ]


def read_merged(result: dict[str, Any]) -> list[Row]:
    """What reading costs before merging and after it, each in parts of what it costs in memory that kernel KSM has, or had."""
    found = []
    units = {"ns_per_load": ("random loads", "ns CPU a load"), "gb_per_cpu_second": ("sum", "ms CPU a GB")}
    for name, (work, unit) in units.items():
        for backing, engines in result["figures"].items():
            for count in engines["private"]["before"]:
                for when in ("before", "after"):
                    value = {kind: engine[when][count][name] for kind, engine in engines.items()}
                    if name == "gb_per_cpu_second":
                        value = {kind: 1e3 / speed for kind, speed in value.items()}
                    row = Row(f"{work}, {result['mb']} MiB of {backing} pages, {count} reading, {when} merging", unit)
                    row.kernel_maximum, row.private, row.shared = value.get("kernel"), value["private"], value["shared"]
                    if "kernel" in value and when == "after":
                        row.ratio_private, row.ratio_shared = (
                            value[kind] / value["kernel"] for kind in ("private", "shared")
                        )
                        row.target_private = row.target_shared = 1.0
                    found.append(row)
    return found


def application(result: dict[str, Any]) -> list[Row]:
    """Each mode against kernel KSM in the same mode; with merging off, what there is to lose."""
    found = []
    figures = result["figures"]
    for mode in figures["private"]:
        for name in ("streaming", "random writes"):
            for at in ("p50", "p99"):
                value = {kind: modes[mode][name][at] for kind, modes in figures.items()}
                row = Row(
                    f"application, merging {mode}: {name}, {at}", "us", None, None, value["private"], value["shared"]
                )
                if mode == "defaults":
                    row.kernel_default = value.get("kernel")
                else:
                    row.kernel_maximum = value.get("kernel")
                if "kernel" in value and mode == "without pause":
                    row.ratio_private, row.ratio_shared = (
                        value[kind] / value["kernel"] for kind in ("private", "shared")
                    )
                found.append(row)
        cpu = {kind: modes[mode]["cpu_us_per_operation"] for kind, modes in figures.items()}
        row = Row(
            f"application, merging {mode}: its own CPU", "us an operation", private=cpu["private"], shared=cpu["shared"]
        )
        setattr(row, "kernel_default" if mode == "defaults" else "kernel_maximum", cpu.get("kernel"))
        found.append(row)
    return found


def first_write(result: dict[str, Any]) -> list[Row]:
    """Of all pages by one call, against the targets; of each page alone, percentiles."""
    found = []
    targets = {"in order": (1.0, 1.3), "at random": (1.0, 4.0), "far apart": (1.0, 4.0)}
    for order, figures in result["nanoseconds_per_page"].items():
        row = Row(f"first write to a merged page, {order}", "ns a page", None, figures.get("kernel"))
        row.private, row.shared = figures["private"], figures["shared"]
        ratio = result["ratio_to_kernel"].get(order, {})
        row.ratio_private, row.ratio_shared = ratio.get("private"), ratio.get("shared")
        row.target_private, row.target_shared = targets[order]
        found.append(row)
        for at in ("p50", "p99", "p99.9"):
            single = {kind: latency[at] for kind, latency in result["microseconds"][order].items()}
            work = f"one first write, {order}, {at} (to unmerged memory {single['unmerged']:.2f})"
            found.append(Row(work, "us", None, single.get("kernel"), single["private"], single["shared"]))
    return found


def unique(result: dict[str, Any]) -> list[Row]:
    found = []
    figures, ratios = result["figures"], result["cpu_ratio_to_kernel"]
    targets = {"clean": 1 / 300, "100 % written": 1 / 10}
    for state in figures["private, tracked"]:
        for how in ("tracked", "read"):
            us = {kind: figures[f"{kind}, {how}"][state]["us_per_page"] for kind in ("private", "shared")}
            row = Row(f"scan {result['mb']} MiB of unique pages, {state}, {how}", "us CPU a page", **us)
            if ratios:
                row.kernel_maximum = figures["kernel"][state]["us_per_page"]
                row.ratio_private, row.ratio_shared = (ratios[f"{kind}, {how}"][state] for kind in us)
                row.kernel_default = figures["kernel, defaults"].get(state, {}).get("us_per_page")
            if how == "tracked":
                row.target_private = row.target_shared = targets.get(state)
            found.append(row)
    return found


def idle(result: dict[str, Any]) -> list[Row]:
    """Of private and of shared memory; what clients without any cost is in the JSON."""
    figures = result["figures"]
    units = {
        "broker_wakeups_per_second": ("the broker", "wakeups/s"),
        "client_wakeups_per_second": ("a client", "wakeups/s"),
        "broker_cpu_percent": ("the broker", "% of a CPU"),
        "client_cpu_percent": ("a client", "% of a CPU"),
        "broker_pss_mib": ("the broker", "MiB PSS"),
    }
    work = f"{result['processes']} x {result['mb']} MiB, merged and idle"
    return [
        Row(f"{work}: {who}", unit, private=figures["private"][name], shared=figures["shared"][name])
        for name, (who, unit) in units.items()
    ]


def cpu_ceiling(result: dict[str, Any]) -> list[Row]:
    figures = result["figures"]
    return [
        Row(
            f"a client's scanner and remapper at client_max_cpu={ceiling}, busiest second",
            "% of a CPU",
            private=figures["private"][ceiling]["percent_in_a_second"],
            shared=figures["shared"][ceiling]["percent_in_a_second"],
        )
        for ceiling in figures["private"]
    ]


def program(name: str, result: dict[str, Any]) -> list[Row]:
    """What a real program takes with each engine, as a part of what it takes without."""
    found = []
    for figure in (
        "memory when merged, MiB",
        "CPU a request while merging, ms",
        "CPU a request after merging, ms",
        "p99 while merging, ms",
    ):
        value = {how: figures[figure]["median"] for how, figures in result["of_without"].items()}
        without = result["figures"]["without"][figure]["median"]
        row = Row(f"{name}: {figure}, {without:,.4g} without", "of that", value.get("kernel"), None, value["ksmrs"])
        found.append(row)
    return found


def rows(results: dict[str, Any]) -> list[Row]:
    """The table of DESIGN's targets, as far as they were measured."""
    found = []
    merges = {
        "merge_2": ("merge equal data", 1 / 5, 1 / 4),
        "merge_8": ("merge equal data", 1 / 5, 1 / 3),
        "merge_arrays": ("merge equal ndarrays in place", None, None),
    }
    for name, targets in merges.items():
        if name in results:
            row = merged(*targets, results[name])
            found += [row, *saved(row.work, results[name]["medians"])]
    for size, engines in results.get("scattered", {}).get("sizes", {}).items():
        us = {kind: figures["us_per_saved_page"] for kind, figures in engines.items()}
        part = {kind: ours / us["kernel"] for kind, ours in us.items() if "kernel" in us}
        target = 2 / 3 if size == "64" else None
        work = f"merge equal pages in random order: 2 x {size} MiB"
        row = Row(work, "us CPU a page saved", None, us.get("kernel"), us["private"], us["shared"])
        row.ratio_private, row.ratio_shared = part.get("private"), part.get("shared")
        row.target_private = row.target_shared = target
        found.append(row)
        found += saved(work, engines)
    for result in (results[name] for name in ("time_to_savings", "beside_a_newcomer") if name in results):
        for unit, name in (("s", "wall_seconds"), ("s CPU", "merge_cpu_seconds")):
            value = {kind: figures[name] for kind, figures in result["figures"].items()}
            work = f"until 90 % is saved, default settings: {result['processes']} x {result['mb']} MiB"
            if result["newcomer_mb"]:
                work += f" beside {result['newcomer_mb']} MiB"
            found.append(Row(work, unit, value.get("kernel"), None, value["private"], value["shared"]))
    if "first_write" in results:
        found += first_write(results["first_write"])
    if "growth" in results:
        found += growth(results["growth"])
    if "read_merged" in results:
        found += read_merged(results["read_merged"])
    if "application" in results:
        found += application(results["application"])
    if "unique" in results:
        found += unique(results["unique"])
    for name, sizes in results.get("allocator", {}).get("work", {}).items():
        for kib, figures in sizes.items():
            unit = "of NumPy's time, 1.2 wanted" if name == "x + 1" else "of NumPy's time"
            found.append(Row(f"merge_process, {kib} KiB, {name}", unit, private=figures["ratio"]))
    if "idle" in results:
        found += idle(results["idle"])
    if "cpu_ceiling" in results:
        found += cpu_ceiling(results["cpu_ceiling"])
    for name in PROGRAMS:
        if name in results:
            found += program(name, results[name])
    for name, figures in results.get("scan_clean", {}).items():
        found.append(Row(f"scan unique pages again, {name}", "ns a page", private=figures["scanner_ns"]))
    return found


def pair(*values: str) -> str:
    return " / ".join(values) or "-"
