"""One report of all benches, run in turn on one machine: report.json, report.md and, with matplotlib, a plot.

    python benches/report.py [--quick] [--only NAME ...] [--without-kernel] [--to benches/report]

Each bench is a child process with --json; what is compared is compared within one child, by that bench. Kernel KSM's knobs
are the same afterwards, also after Ctrl-C or SIGTERM or when a child, or this process, is killed. Without root or without
kernel KSM, ksmrs is measured alone, and the report says so. A bench that fails is named in the report, and the exit status is
1; a program whose packages are missing is named as skipped. Quick figures are of sizes too small to judge, and are not
judged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kernel_ksm

HERE = Path(__file__).resolve().parent
LIMIT_SECONDS = 1800
"""A bench that takes longer is stuck."""
PATIENCE_SECONDS = 30
"""How long an interrupted bench may take to put the knobs back itself."""


SKIPPED = 77
"""The status of a program whose packages are not installed."""
PROGRAMS = ("model_server", "data_frames", "prefork_server", "joblib_workers")


@dataclass(frozen=True)
class Scenario:
    script: str
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


SCENARIOS = {
    "merge_2": Scenario("merge_equal.py", ("--mb", "256"), ("--mb", "8", "--rounds", "1")),
    "merge_8": Scenario(
        "merge_equal.py", ("--processes", "8", "--mb", "128"), ("--processes", "4", "--mb", "4", "--rounds", "1")
    ),
    "merge_arrays": Scenario("merge_equal.py", ("--arrays",), ("--arrays", "--mb", "8", "--rounds", "1")),
    "scattered": Scenario("scattered.py", (), ("--mb", "4")),
    "time_to_savings": Scenario("time_to_savings.py", (), ("--mb", "8")),
    "beside_a_newcomer": Scenario("time_to_savings.py", ("--newcomer", "4096"), ("--mb", "8", "--newcomer", "64")),
    "first_write": Scenario("first_write.py", (), ("--mb", "4", "--rounds", "1")),
    "growth": Scenario("growth.py", (), ("--mb", "64", "512")),
    "read_merged": Scenario("read_merged.py", (), ("--mb", "16", "--workers", "2", "--rounds", "1")),
    "application": Scenario("application.py", (), ("--mb", "8", "--seconds", "0.5", "--rounds", "1")),
    "unique": Scenario("unique.py", (), ("--mb", "16", "--passes", "2")),
    "scan_clean": Scenario("scan_clean.py", (), ("--mb", "16", "--passes", "2")),
    "idle": Scenario("idle.py", (), ("--mb", "8", "--processes", "2", "--seconds", "2", "--settle", "1")),
    "cpu_ceiling": Scenario("cpu_ceiling.py", (), ("--mb", "16", "--seconds", "2", "--ceilings", "20")),
    "adopted_memory": Scenario("adopted_memory.py", (), ("--mb", "16", "--rounds", "1")),
    "allocator": Scenario("allocator.py", (), ("--rounds", "1")),
    "write_wait": Scenario("write_wait.py", (), ("--seconds", "1", "--mb", "4")),
    "freeze_window": Scenario("freeze_window.py", (), ("--seconds", "0.2", "--rounds", "150")),
    "freeze_tracked": Scenario("freeze_tracked.py", (), ("--rounds", "3")),
    **{name: Scenario(f"programs/{name}.py", ("--rounds", "3"), ("--quick",)) for name in PROGRAMS},
}


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
    targets = {"in order": (1.0, 1.3), "at random": (1.0, 4.0)}
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


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Every figure of a result with its way to it."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}, {key}" if name else str(key))]
    if isinstance(value, list):
        return [leaf for at, inner in enumerate(value) for leaf in leaves(inner, f"{name}, {at}")]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [(name, figure(value))]
    return [(name, "-" if value is None else str(value))]


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "huge_pages": choice.read_text().strip() if choice.exists() else "none",
    }


def stop(child: subprocess.Popen[str]) -> None:
    """End a bench and its workers, which have a session of their own: first politely, so that it puts the knobs back.

    Returns when nobody writes to its standard error any more: its workers are gone, and so is who puts back what it could not.
    """
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        try:
            child.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return


class Skipped(Exception):
    """A bench cannot run here; why."""


def run(scenario: Scenario, quick: bool, environment: dict[str, str]) -> tuple[dict[str, Any] | None, str]:
    """What a bench found, or None and the last line that it said."""
    command = [sys.executable, str(HERE / scenario.script), *(scenario.quick if quick else scenario.full), "--json"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, err = child.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"not done after {LIMIT_SECONDS} s"
    finally:
        stop(child)
    said = err.strip().splitlines()
    if child.returncode == SKIPPED:
        raise Skipped(said[-1])
    if child.returncode != 0:
        return None, f"status {child.returncode}: {said[-1] if said else 'nothing said'}"
    try:
        return json.loads(out), ""
    except ValueError:
        return None, f"wrote no JSON: {out[:80]!r}"


def markdown(report: dict[str, Any], table: list[Row]) -> str:
    about, quick = report["machine"], report["quick"]
    lines = [
        "# Figures of ksmrs",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['memory_mib']:,} MiB, Linux {about['kernel']}, "
        f"Python {about['python']}, transparent huge pages {about['huge_pages']}. "
        f"Taken in one run of `make bench`, {report['seconds']:.0f} s.",
        "",
    ]
    if report["kernel_unavailable"]:
        lines += [f"Kernel KSM was not measured: {report['kernel_unavailable']}. These are ksmrs's figures alone.", ""]
    if quick:
        lines += ["Quick: sizes too small to judge anything by.", ""]
    lines += [
        "Ratio and target are parts of the figure of kernel KSM at its maximum in the same run, private / shared.",
        "",
        "| work | unit | kernel KSM, default | kernel KSM, maximum | private | shared | ratio | target | reached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table:
        figures = [figure(v) for v in (row.kernel_default, row.kernel_maximum, row.private, row.shared)]
        ratio = pair(*(figure(v) for v in (row.ratio_private, row.ratio_shared) if v is not None))
        target = pair(*(figure(v) for v in (row.target_private, row.target_shared) if v is not None))
        lines.append(f"| {' | '.join([row.work, row.unit, *figures, ratio, target, row.reached(quick)])} |")
    if report["failed"]:
        lines += ["", "## Failed", "", *(f"- {name}: {why}" for name, why in report["failed"].items())]
    if report["skipped"]:
        lines += ["", "## Skipped", "", *(f"- {name}: {why}" for name, why in report["skipped"].items())]
    lines += ["", "## All figures"]
    for name, result in report["results"].items():
        scenario = SCENARIOS[name]
        words = " ".join((scenario.script, *(scenario.quick if quick else scenario.full)))
        lines += ["", f"`benches/{words}`", "", "| figure | value |", "| --- | --- |"]
        lines += [f"| {way} | {value} |" for way, value in leaves(result)]
    return "\n".join(lines) + "\n"


def plot(table: list[Row], to: Path) -> str | None:
    """Draw what was compared, as parts of kernel KSM's figure; why not, if not."""
    bars = [
        (f"{row.work}, {kind}", getattr(row, f"ratio_{kind}"), getattr(row, f"target_{kind}"))
        for row in table
        for kind in ("private", "shared")
        if getattr(row, f"ratio_{kind}") is not None
    ]
    if not bars:
        return "nothing was compared with kernel KSM"
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError:
        return "matplotlib is missing; pip install -r benches/requirements.txt"
    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    chart, axes = pyplot.subplots(figsize=(10, 1 + 0.5 * len(bars)), layout="constrained")
    # From 1, as good as the kernel: what is better goes to the left.
    axes.barh([name for name, _, _ in bars], [ratio - 1 for _, ratio, _ in bars], left=1)
    axes.set_xscale("log")
    axes.margins(y=0.01)
    for at, (_, _, target) in enumerate(bars):
        if target is not None:
            axes.plot([target, target], [at - 0.4, at + 0.4], color="black")
    axes.axvline(1, color="grey", linestyle="dotted")
    axes.set_xlabel("part of kernel KSM's figure at its maximum, same run; black: target")
    axes.invert_yaxis()
    chart.savefig(to, dpi=120)
    pyplot.close(chart)
    return None


def interrupt(number: int, _frame: object) -> None:
    # Nothing interrupts what puts the knobs back.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all works")
    parser.add_argument("--only", nargs="+", choices=sorted(SCENARIOS), metavar="NAME", help=", ".join(SCENARIOS))
    parser.add_argument("--without-kernel", action="store_true", help="leave kernel KSM alone")
    parser.add_argument("--to", type=Path, default=HERE / "report")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    environment = dict(os.environ)
    if arguments.without_kernel:
        environment[kernel_ksm.WITHOUT] = os.environ[kernel_ksm.WITHOUT] = "1"
    report: dict[str, Any] = {
        "machine": machine(),
        "quick": arguments.quick,
        "kernel_unavailable": kernel_ksm.unavailable(),
        "results": {},
        "failed": {},
        "skipped": {},
    }
    began = time.monotonic()
    for name in arguments.only or SCENARIOS:
        print(f"{name} ...", flush=True)
        try:
            result, why = run(SCENARIOS[name], arguments.quick, environment)
        except Skipped as reason:
            report["skipped"][name] = str(reason)
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        if result is None:
            report["failed"][name] = why
            print(f"{name} failed: {why}", file=sys.stderr)
        else:
            report["results"][name] = result
    table = rows(report["results"])
    report |= {"seconds": time.monotonic() - began, "rows": [asdict(row) for row in table]}
    arguments.to.mkdir(parents=True, exist_ok=True)
    report["no_plot"] = plot(table, arguments.to / "ratios.png")
    (arguments.to / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (arguments.to / "report.md").write_text(markdown(report, table))
    print(f"wrote {arguments.to}/report.md" + (f"; no plot: {report['no_plot']}" if report["no_plot"] else ""))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt as why:
        sys.exit(f"interrupted ({why}); kernel KSM's knobs are as they were")
