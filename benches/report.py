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
from report_rows import PROGRAMS, Row, pair, rows

HERE = Path(__file__).resolve().parent
LIMIT_SECONDS = 1800
"""A bench that takes longer is stuck."""
PATIENCE_SECONDS = 30
"""How long an interrupted bench may take to put the knobs back itself."""
SKIPPED = 77
"""The status of a program whose packages are not installed."""


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
    "beside_a_newcomer": Scenario("time_to_savings.py", ("--newcomer", "2048"), ("--mb", "8", "--newcomer", "64")),
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
    kinds = {"private": "o", "shared": "s"}
    compared = [row for row in table if any(getattr(row, f"ratio_{kind}") is not None for kind in kinds)]
    if not compared:
        return "nothing was compared with kernel KSM"
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError:
        return "matplotlib is missing; pip install -r benches/requirements.txt"
    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    chart, axes = pyplot.subplots(figsize=(10, 1 + 0.25 * len(compared)), layout="constrained")
    for number, (kind, marker) in enumerate(kinds.items()):
        for at, row in enumerate(compared):
            ratio, target = getattr(row, f"ratio_{kind}"), getattr(row, f"target_{kind}")
            place, colour = at + 0.3 * number - 0.15, f"C{number}"
            if ratio is not None:
                # From 1, as good as the kernel: what is better goes to the left.
                axes.plot([1, ratio], [place, place], color=colour)
                axes.plot(ratio, place, marker, color=colour, markersize=5)
            if target is not None:
                axes.plot(target, place, "|", color="black", markersize=9)
        axes.plot([], [], marker, color=f"C{number}", label=f"ksmrs, {kind}")
    axes.plot([], [], "|", color="black", label="target")
    axes.set_xscale("log")
    axes.margins(y=0.01)
    axes.set_yticks(range(len(compared)), [row.work for row in compared])
    axes.axvline(1, color="grey", linestyle="dotted")
    axes.set_xlabel("part of kernel KSM's figure at its maximum, same run: left of 1 is better")
    axes.legend()
    axes.invert_yaxis()
    chart.savefig(to, dpi=100)
    pyplot.close(chart)
    return None


def write(report: dict[str, Any], to: Path, seconds: float) -> None:
    """What was found so far: whoever interrupts keeps it."""
    table = rows(report["results"])
    report |= {"seconds": seconds, "rows": [asdict(row) for row in table]}
    to.mkdir(parents=True, exist_ok=True)
    (to / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (to / "report.md").write_text(markdown(report, table))


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
        "no_plot": "the run did not come to its end",
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
        write(report, arguments.to, time.monotonic() - began)
    report["no_plot"] = plot(rows(report["results"]), arguments.to / "ratios.png")
    write(report, arguments.to, time.monotonic() - began)
    print(f"wrote {arguments.to}/report.md" + (f"; no plot: {report['no_plot']}" if report["no_plot"] else ""))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt as why:
        sys.exit(f"interrupted ({why}); kernel KSM's knobs are as they were")
