"""What `ksmrs survey` shows to people: tables, a bar while it works, a picture of where equal pages are.

Relies on `_survey.py` for every figure and on rich; the picture needs NumPy and Pillow (`ksmrs[picture]`). Counts nothing
itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ksmrs import _page_map, _survey

MIB = 1 << 20
CLASSES: dict[int, tuple[str, tuple[int, int, int]]] = {
    0: ("UNIQUE", (190, 190, 190)),
    1: ("ZERO", (31, 119, 180)),
    2: ("EQUAL WITHIN", (152, 223, 138)),
    3: ("EQUAL BETWEEN", (44, 160, 44)),
    4: ("MERGED ALREADY", (23, 190, 207)),
    5: ("OUT OF PHASE", (255, 127, 14)),
    6: ("WRITTEN MEANWHILE", (197, 60, 60)),
}
"""By the number that the survey gives a page: greens could merge, orange could if it lay at the same offset."""
STAGES = {
    "look": "reading pages",
    "look again": "reading equal pages again",
    "compare": "comparing shifted data",
    "done": "counted",
}


def picture(found: _survey.Survey, path: str | os.PathLike[str]) -> None:
    """Write a PNG in which each pixel is a page that was kept, processes in the survey's order, each from a line of its own.

    Raises `ImportError` without Pillow.
    """
    import numpy as np  # noqa: PLC0415 (see the first paragraph)

    maps = [np.frombuffer(classes, np.uint8) for classes in found.page_classes]
    _page_map.draw(maps, CLASSES).save(os.fspath(path), format="PNG")


@contextmanager
def bar() -> Iterator[_survey.Progress | None]:
    """Show how far it is on standard error, where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True) as drawn:
        task = drawn.add_task("reading pages", total=None)

        def show(stage: str, done: int, pages: int) -> None:
            drawn.update(task, description=STAGES[stage], completed=done, total=pages or None)

        yield show


def _mib(pages: int) -> str:
    return f"{pages * _survey.PAGE_SIZE / MIB:,.1f}"


def show(found: _survey.Survey, console: Console) -> None:
    """Print the tables."""
    console.print(_engines(found))
    console.print(_processes(found))
    for process in found.processes:
        if process.refusal:
            console.print(Text(process.refusal, "red"))
        if process.ended:
            console.print(Text(f"process {process.pid} ended while it was looked at: nothing of it counts", "red"))
    console.print(_kinds(found))
    if found.shifts:
        console.print(_shifts(found))
    steps = list(found.limits)
    if found.pages_out_of_phase:
        steps.append(
            f"{_mib(found.pages_out_of_phase)} MiB are equal but at other offsets within a page, where nobody can merge them: "
            "ksmrs.array(x) puts data at offset 0"
        )
    for step in steps:
        console.print(Text(f"  {step}"))


def _engines(found: _survey.Survey) -> Table:
    table = Table(
        "", title=f"what merging would save, of {_mib(found.pages_read)} MiB read", title_justify="left", box=None
    )
    table.pad_edge = False
    for name in ("ksmrs", "kernel KSM"):
        table.add_column(name, justify="right")
    engines = (found.ksmrs, found.kernel_ksm)

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    row("could take, MiB", *(_mib(engine.pages) for engine in engines))
    saved = [f"{engine.saved_bytes / MIB:,.1f}" for engine in engines]
    if found.fraction < 1:
        saved = [f"{text} ± {engine.error_bytes / MIB:,.1f}" for text, engine in zip(saved, engines, strict=True)]
    row("saved, MiB", *saved)
    row("less its own memory, MiB", *(f"{engine.profit_bytes / MIB:,.1f}" for engine in engines))
    for name in ("pages_shared", "pages_sharing", "ksm_zero_pages", "pages_volatile"):
        row(name, *(f"{getattr(engine, name):,}" for engine in engines))
    row("CPU for one scan, s", *(f"{engine.scan_cpu_seconds:.2f}" for engine in engines))
    return table


def _processes(found: _survey.Survey) -> Table:
    table = Table("pid", title="\nprocesses, MiB", title_justify="left", box=None, pad_edge=False)
    names = ("read", "shared already", "zeros", "equal within", "equal between", "out of phase", "would merge")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("command", no_wrap=True)

    def row(pid: str, share: _survey.ProcessSurvey | _survey.Survey, merging: str, command: str) -> None:
        counts = (
            share.pages_read,
            share.pages_shared_already + share.pages_merged_already,
            share.pages_zero,
            share.duplicates_within,
            share.duplicates_between,
            share.pages_out_of_phase,
        )
        table.add_row(pid, *(_mib(count) for count in counts), merging, Text(command))

    looked = [process for process in found.processes if not (process.refusal or process.ended)]
    for process in looked:
        row(str(process.pid), process, _mib(process.ksm_merging_pages), process.command)
    row("all", found, _mib(sum(process.ksm_merging_pages for process in looked)), "")
    return table


def _kinds(found: _survey.Survey) -> Table:
    table = Table("mappings", title="\nkinds of memory, MiB", title_justify="left", box=None, pad_edge=False)
    fields = {
        "in RAM": "pages_present",
        "swapped": "pages_swapped",
        "shared already": "pages_shared_already",
        "read": "pages_read",
        "for ksmrs": "pages_fit",
        "for kernel KSM": "pages_fit_for_kernel",
    }
    for name in fields:
        table.add_column(name, justify="right")
    sums: dict[str, list[int]] = {}
    for process in found.processes:
        for kind in process.kinds:
            counts = sums.setdefault(kind.kind, [0] * len(fields))
            sums[kind.kind] = [count + getattr(kind, name) for count, name in zip(counts, fields.values(), strict=True)]
    for name, counts in sorted(sums.items(), key=lambda item: -item[1][0]):
        table.add_row(name, *(_mib(count) for count in counts))
    return table


def _shifts(found: _survey.Survey) -> Table:
    table = Table("MiB", "where", "is also", "out of phase by", title="\nequal at other offsets", title_justify="left")
    table.box, table.pad_edge = None, False
    for shift in found.shifts[:10]:
        table.add_row(
            _mib(shift.pages),
            f"{shift.pid}: {shift.address:#x}",
            f"{shift.other_pid}: {shift.other_address:#x}",
            f"{shift.phase} bytes",
        )
    return table
