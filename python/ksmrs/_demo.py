"""`ksmrs demo`: several processes hold the same real files, and merging gives the memory back.

Starts the workers (`_demo_worker`) and a broker of its own in a temporary runtime directory, conducts them through load,
merge, overwrite, verify and unmerge, and shows what the kernel says about memory before and after. Every figure is read
from /proc or from ksmrs while it runs; none is estimated.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import posix_ipc
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import ksmrs
from ksmrs import _ksmrs
from ksmrs._demo_worker import KINDS, OWN_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
SUFFIXES = (".so", ".py", ".pyc")
MERGE_SECONDS = 60.0
"""How long the demo waits for merging at most."""


def pick_files(nbytes: int) -> list[tuple[str, int]]:
    """Return shared libraries and modules of this Python installation, the largest first, up to `nbytes`."""
    roots = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {sysconfig.get_config_var("LIBDIR") or "", str(Path(sys.executable).resolve().parent)}
    found: dict[tuple[int, int], tuple[str, int]] = {}
    for root in sorted(filter(None, roots)):
        for folder, _, names in os.walk(root):
            for name in names:
                if not (name.endswith(SUFFIXES) or ".so." in name or name.startswith("python")):
                    continue
                path = Path(folder, name)
                try:
                    info = path.stat()
                    readable = path.is_file() and os.access(path, os.R_OK)
                except OSError:
                    continue
                if readable and info.st_size:
                    found.setdefault((info.st_dev, info.st_ino), (str(path), info.st_size))
    chosen: list[tuple[str, int]] = []
    room = nbytes
    for path_and_size in sorted(found.values(), key=lambda item: (-item[1], item[0])):
        if path_and_size[1] <= room:
            chosen.append(path_and_size)
            room -= path_and_size[1]
    return chosen


class WorkerProcess:
    """A worker, as the demo sees it: commands out, answers in."""

    def __init__(self, number: int, kind: str, files: list[tuple[str, int]], name: str) -> None:
        self.number = number
        self.kind = kind
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ksmrs._demo_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self._send({"number": number, "kind": kind, "files": files, "name": name})

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def ask(self, command: str) -> None:
        """Send a command; `answer` waits for it."""
        self._send(command)

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the last command."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self.number} (pid {self.pid}) ended with {self._process.wait()}")
        return dict(json.loads(line))

    def end(self) -> None:
        """Close its input, which ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def ask_all(workers: list[WorkerProcess], command: str) -> list[dict[str, Any]]:
    """Have all workers do something at the same time."""
    for worker in workers:
        worker.ask(command)
    return [worker.answer() for worker in workers]


def system_bytes() -> int:
    """Anonymous and shared memory in use, of the whole machine."""
    values = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(values[name].split()[0]) * 1024 for name in ("AnonPages", "Shmem"))


def available_bytes() -> int:
    """Return MemAvailable, and the free pages on the lists of the CPUs, which it leaves out: hundreds of MiB after a merge."""
    listed = re.findall(r"^\s+count:\s+(\d+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)
    return int(psutil.virtual_memory().available) + sum(map(int, listed)) * _ksmrs.PAGE_SIZE


def run(workers: int, mb: int, as_json: bool) -> int:
    """Run the demo; returns the process's exit status, 1 if one byte was wrong."""
    console = Console(stderr=as_json)
    files = pick_files(mb * MIB)
    nbytes = sum(size for _, size in files)
    console.print(
        f"{workers} processes ({', '.join(KINDS[:workers])}), each reading the same {len(files)} files "
        f"({nbytes / MIB:.1f} MiB; the largest is {Path(files[0][0]).name}, {files[0][1] / MIB:.1f} MiB)"
    )
    with _broker_of_its_own(), ExitStack() as ends:
        started = time.monotonic()
        # Without a knob turned there is no broker yet: the workers would start it just the same.
        ksmrs.tunables.run = 0
        processes = []
        for number in range(workers):
            kind = KINDS[number % len(KINDS)]
            name = f"/ksmrs-demo-{os.getpid()}-{number}"
            if kind == "named object":
                _make_object(name, sum(map(_whole_pages, files)) + OWN_BYTES)
                ends.callback(posix_ipc.unlink_shared_memory, name)
            process = WorkerProcess(number, kind, files, name)
            ends.callback(process.end)
            processes.append(process)
        loaded = ask_all(processes, "load")
        before = _measure(processes)
        merge_seconds = _merge(console, sum(map(_whole_pages, files)) // _ksmrs.PAGE_SIZE * workers)
        after = _measure(processes)
        counters = ksmrs.stats()
        report = _report(processes, loaded, before, after)
        report["merge_seconds"] = round(merge_seconds, 3)
        report["huge_frames"] = counters.frames_huge
        processes[-1].ask("overwrite")
        report["pages_overwritten"] = processes[-1].answer()["pages_written"]
        report["bytes_wrong_merged"], report["bytes_verified"] = _verify(processes)
        unmerged = ask_all(processes, "unmerge")
        report["pages_merged_after_unmerge"] = sum(answer["pages_of_frames"] for answer in unmerged)
        report["bytes_wrong_unmerged"] = _verify(processes)[0]
        report["seconds"] = round(time.monotonic() - started, 3)
    wrong = report["bytes_wrong_merged"] + report["bytes_wrong_unmerged"]
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        _show(console, report)
    return 1 if wrong else 0


def _whole_pages(file: tuple[str, int]) -> int:
    """How many bytes a file takes when it begins at a page."""
    return -(-file[1] // _ksmrs.PAGE_SIZE) * _ksmrs.PAGE_SIZE


def _make_object(name: str, nbytes: int) -> None:
    """Make a POSIX object for a worker; nobody else keeps it open, for then it would not merge."""
    posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=nbytes).close_fd()


@contextmanager
def _broker_of_its_own() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="ksmrs-demo-") as directory:
        previous = os.environ.get("KSMRS_RUNTIME_DIR")
        os.environ["KSMRS_RUNTIME_DIR"] = directory
        try:
            ksmrs.connect(directory)
            yield
        finally:
            status = _ksmrs.status()
            ksmrs.disconnect()
            if status is not None:
                _end_broker(status["pid"])
            if previous is None:
                del os.environ["KSMRS_RUNTIME_DIR"]
            else:
                os.environ["KSMRS_RUNTIME_DIR"] = previous


def _end_broker(pid: int) -> None:
    if pid == os.getpid():
        return
    try:
        process = psutil.Process(pid)
        process.send_signal(signal.SIGTERM)
        process.wait(10)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        return


def _measure(processes: list[WorkerProcess]) -> dict[str, Any]:
    status = _ksmrs.status() or {}
    broker = {"cpu_seconds": 0.0, "resident_bytes": 0, "store_bytes": 0}
    if "pid" in status:
        broker = {name: status[name] for name in broker}
    answers = ask_all(processes, "measure")
    return {
        "workers": answers,
        "broker": broker,
        # Proportional, so that objects mapped twice and frames mapped by many are each counted once.
        "held_bytes": sum(answer["held_bytes"] for answer in answers),
        "system_bytes": system_bytes(),
        "available_bytes": available_bytes(),
    }


def _merge(console: Console, total: int) -> float:
    """Let the broker merge until a request finds nothing more, showing how far it is; returns the seconds it took."""
    failures: list[BaseException] = []

    def request() -> None:
        try:
            ksmrs.merge(MERGE_SECONDS)
        except ksmrs.KsmrsError as refused:
            failures.append(refused)

    started = time.monotonic()
    ksmrs.tunables.run = 1
    thread = threading.Thread(target=request)
    columns = (
        TextColumn("merging"),
        BarColumn(),
        TextColumn("{task.completed:,} pages"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task("merging", total=total)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            progress.update(task, completed=_merged_pages())
        progress.update(task, completed=_merged_pages())
    if failures:
        raise failures[0]
    return time.monotonic() - started


def _merged_pages() -> int:
    counters = ksmrs.stats()
    return counters.pages_shared + counters.pages_sharing + counters.ksm_zero_pages


def _verify(processes: list[WorkerProcess]) -> tuple[int, int]:
    answers = ask_all(processes, "verify")
    return sum(answer["bytes_wrong"] for answer in answers), sum(answer["bytes_verified"] for answer in answers)


def _report(
    processes: list[WorkerProcess],
    loaded: list[dict[str, Any]],
    before: dict[str, Any],
    after: dict[str, Any],
) -> dict[str, Any]:
    rows = []
    for process, sizes, first, last in zip(processes, loaded, before["workers"], after["workers"], strict=True):
        rows.append(
            {
                "worker": process.number,
                "kind": process.kind,
                "mapped_bytes": sizes["mapped_bytes"],
                "pss_before_bytes": first["pss_bytes"],
                "pss_after_bytes": last["pss_bytes"],
                "merged_pages": last["merged_pages"],
                "cpu_seconds": round(last["cpu_seconds"] - first["cpu_seconds"], 3),
            }
        )
    return {
        "workers": rows,
        "saved_bytes_by_pss": before["held_bytes"] - after["held_bytes"],
        "saved_bytes_by_meminfo": before["system_bytes"] - after["system_bytes"],
        "saved_bytes_by_available": after["available_bytes"] - before["available_bytes"],
        "broker_cpu_seconds": round(after["broker"]["cpu_seconds"] - before["broker"]["cpu_seconds"], 3),
        "broker_resident_bytes": after["broker"]["resident_bytes"],
        "store_bytes": after["broker"]["store_bytes"],
    }


def _show(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="MiB, before and after merging")
    for name in ("worker", "memory", "mapped", "PSS before", "PSS after", "merged pages", "CPU s"):
        table.add_column(name, justify="left" if name == "memory" else "right")
    names = ("mapped_bytes", "pss_before_bytes", "pss_after_bytes")
    for row in report["workers"]:
        sizes = (f"{row[name] / MIB:.1f}" for name in names)
        table.add_row(str(row["worker"]), row["kind"], *sizes, f"{row['merged_pages']:,}", f"{row['cpu_seconds']:.2f}")
    table.add_section()
    totals = {name: sum(row[name] for row in report["workers"]) for name in (*names, "merged_pages", "cpu_seconds")}
    table.add_row(
        "all",
        "",
        *(f"{totals[name] / MIB:.1f}" for name in names),
        f"{totals['merged_pages']:,}",
        f"{totals['cpu_seconds']:.2f}",
    )
    console.print(table)
    verdict = (
        "every byte as written" if not report["bytes_wrong_merged"] else f"{report['bytes_wrong_merged']} WRONG BYTES"
    )
    again = (
        "every byte as written"
        if not report["bytes_wrong_unmerged"]
        else f"{report['bytes_wrong_unmerged']} WRONG BYTES"
    )
    for line in (
        f"saved {report['saved_bytes_by_pss'] / MIB:.1f} MiB by the workers' PSS, "
        f"{report['saved_bytes_by_meminfo'] / MIB:.1f} MiB by AnonPages and Shmem, "
        f"{report['saved_bytes_by_available'] / MIB:.1f} MiB by MemAvailable and the CPUs' free lists; "
        f"the frames hold {report['store_bytes'] / MIB:.1f} MiB by st_blocks",
        f"merged in {report['merge_seconds']:.2f} s; huge frames: {report['huge_frames']} of 2 MiB; broker: "
        f"{report['broker_cpu_seconds']:.2f} s CPU, {report['broker_resident_bytes'] / MIB:.1f} MiB resident",
        f"one worker overwrote {report['pages_overwritten']:,} pages; {report['bytes_verified'] / MIB:.0f} MiB verified: "
        f"{verdict}",
        f"unmerged; {report['pages_merged_after_unmerge']} pages still merged; verified again: {again}",
    ):
        console.print(line)
