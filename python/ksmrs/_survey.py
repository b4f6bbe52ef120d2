"""`ksmrs.survey`: what merging would save in processes as they are, before any of them uses ksmrs.

The reading and counting is the extension module's, in steps that a thread of low priority does without the interpreter's lock,
resting in between. Relies on /proc of the processes, which must be the same user's and open to being traced; where one is
not, says what forbids it (`_survey_refusal.py`). Changes nothing in them, starts no broker, and adopts nothing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ksmrs import _ksmrs, _survey_refusal
from ksmrs._errors import ArgumentError, KsmrsError, SystemCallError

PAGE_SIZE: int = _ksmrs.PAGE_SIZE
MEMORY = 256 << 20
"""Bytes for the survey's lists: 9.5 million pages, 36 GiB, before contents are sampled."""
LEAST_MEMORY = 1 << 20
STEP_SECONDS = 0.02
LOWEST_PRIORITY = 19
KERNEL_BYTES_PER_PAGE = 64
"""What `general_profit` of the kernel takes off for each page that it knows: an rmap_item."""
KERNEL_KSM = Path("/sys/kernel/mm/ksm")
DEFAULT_KNOBS = {"max_page_sharing": 256, "use_zero_pages": 1, "split_huge_pages": 1, "merge_across_nodes": 1, "run": 1}

Progress = Callable[[str, int, int], None]
"""Called with the stage, and pages of it done and in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingKind:
    """The mappings of one kind in a process, in pages."""

    kind: str
    mappings: int
    pages: int
    """Addresses."""
    pages_present: int
    """In RAM."""
    pages_swapped: int
    """Anonymous memory in swap, which was not read and is not in any estimate."""
    pages_shared_already: int
    """Several page tables show their frame (after a fork, by kernel KSM, the page of zeros): merging them gains nothing."""
    pages_read: int
    pages_merged_already: int
    """They show frames of ksmrs."""
    pages_fit: int
    """Read, and could be opted in."""
    pages_fit_for_kernel: int
    """Read, and kernel KSM could take them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSurvey:
    """One process. Counts are of pages with a frame of their own; where contents were sampled, estimates."""

    pid: int
    command: str
    refusal: str = ""
    """Why it could not be looked at, and the next step; empty for one that was."""
    ended: bool = False
    """It ended while it was looked at: nothing of it counts."""
    kinds: tuple[MappingKind, ...] = ()
    pages_read: int = 0
    pages_shared_already: int = 0
    pages_merged_already: int = 0
    pages_zero: int = 0
    duplicates_within: int = 0
    """Pages beyond the first with their content in this process; without pages of zeros."""
    duplicates_between: int = 0
    """Contents that another process of the survey has as well; without zeros."""
    pages_volatile: int = 0
    """Seemed equal to another, and was written before the second look."""
    pages_out_of_phase: int = 0
    """Bytes that were found at another offset within a page: `ksmrs.array(x)` puts both at offset 0."""
    ksm_merging_pages: int = 0
    """Would show a frame, or no memory as a page of zeros."""
    pages_unmerged_by_budget: int = 0
    """Would merge, if `vm.max_map_count` were higher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSurvey:
    """What one engine would save, under the names of `/sys/kernel/mm/ksm`."""

    pages: int
    """Pages that it could take."""
    pages_shared: int
    """Frames that it would make."""
    pages_sharing: int
    """Pages saved with them."""
    ksm_zero_pages: int
    """Pages of zeros that would have no memory."""
    pages_volatile: int
    saved_bytes: int
    error_bytes: int
    """Standard error of `saved_bytes`; 0 where nothing was sampled."""
    profit_bytes: int
    """`saved_bytes` less what the engine needs for each page that it knows."""
    scan_cpu_seconds: float
    """CPU time to read and checksum its pages once, by what the survey itself took for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """Equal data at different offsets within a page."""

    pid: int
    address: int
    pages: int
    """Whole pages from `address` on whose bytes the other place has; not always in a row."""
    other_pid: int
    other_address: int

    @property
    def phase(self) -> int:
        """How far the other place is out of phase, in bytes: 16 for NumPy's own arrays against `ksmrs.array`."""
        return (self.other_address - self.address) % PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All processes together."""

    processes: tuple[ProcessSurvey, ...]
    pages_read: int
    pages_zero: int
    duplicates_within: int
    """Sum of all processes'."""
    duplicates_between: int
    """For each content, the processes that have it, but one."""
    pages_shared_already: int
    pages_merged_already: int
    pages_out_of_phase: int
    ksmrs: EngineSurvey
    kernel_ksm: EngineSurvey
    shifts: tuple[Shift, ...]
    """The longest ones."""
    fraction: float
    """Of all contents, those that were kept; below 1 all counts but those of pages read, shared and zero are estimates."""
    memory_bytes: int
    """Of the survey's own lists."""
    seconds: float
    cpu_seconds: float
    limits: tuple[str, ...]
    """What the figures do not say."""
    page_classes: tuple[bytes, ...] = field(repr=False)
    """For pictures: a class for each page that was kept, by address, for each process that was looked at."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as what `ksmrs survey --json` prints: dictionaries, lists and numbers, without the page classes."""
        found = dataclasses.asdict(dataclasses.replace(self, page_classes=()))
        del found["page_classes"]
        for shift, made in zip(found["shifts"], self.shifts, strict=True):
            shift["phase"] = made.phase
        found["page_size"] = PAGE_SIZE
        return found


def survey(
    pids: int | Iterable[int],
    *,
    sample: float = 1.0,
    cpu: float = 0.5,
    memory: int = MEMORY,
    settle: float = 1.0,
    min_bytes: int = 0,
    progress: Progress | None = None,
) -> Survey:
    """Read the memory of processes of the same user, and count what merging would save.

    Every page in RAM is read once, and once more, `settle` seconds later, what seems equal. `sample` keeps so many of all
    *contents*, and fewer where the lists would take more than `memory` bytes: that bounds memory, not time, which `cpu` does:
    the share of one CPU that is used at most. Mappings smaller than `min_bytes` are passed over. `progress` is called now and
    then in the calling thread.

    A process that may not be looked at is in the result with its `refusal`. Raises `SystemCallError` where none may,
    `ArgumentError` for a share or size that is none.
    """
    wanted = [pids] if isinstance(pids, int) else list(dict.fromkeys(pids))
    _check(wanted, sample, cpu, memory, settle, min_bytes)
    looked = _ksmrs.Survey(memory, sample, -(-min_bytes // PAGE_SIZE))
    read: list[int] = []
    refused: dict[int, str] = {}
    errno = 0
    commands = {pid: command_of(pid) for pid in wanted}
    for pid in wanted:
        try:
            looked.add(pid)
            read.append(pid)
        except OSError as error:
            errno = error.errno or 0
            refused[pid] = _survey_refusal.reason(pid, error)
    if not read:
        raise SystemCallError(errno, "; ".join(refused.values()))
    work = _Work(looked, cpu, settle)
    begun = time.monotonic()
    work.run(progress)
    knobs, limits = _knobs()
    return _result(
        looked,
        work,
        seconds=time.monotonic() - begun,
        wanted=wanted,
        commands=commands,
        refused=refused,
        knobs=knobs,
        limits=limits,
    )


def _check(pids: list[int], sample: float, cpu: float, memory: int, settle: float, min_bytes: int) -> None:  # noqa: PLR0917
    if not pids:
        raise ArgumentError("no process was named: survey(pid) or survey([pid, pid])")
    if len(pids) > _ksmrs.Survey.MOST_PROCESSES:
        raise ArgumentError(f"{len(pids):,} processes: one survey takes {_ksmrs.Survey.MOST_PROCESSES:,} at most")
    for pid in pids:
        if not 0 < pid < 1 << 31:
            raise ArgumentError(f"{pid} is no process number")
    for name, share in (("sample", sample), ("cpu", cpu)):
        if not 0 < share <= 1:
            raise ArgumentError(f"{name}={share} is no share: above 0, and 1 at most")
    if memory < LEAST_MEMORY:
        raise ArgumentError(f"memory={memory} bytes is too little: {LEAST_MEMORY} or more")
    if not 0 <= settle < 3600:
        raise ArgumentError(f"settle={settle}: seconds from 0 to an hour")
    if min_bytes < 0:
        raise ArgumentError(f"min_bytes={min_bytes} is negative")


def command_of(pid: int) -> str:
    """What a process runs, shortened; empty for one that is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return words[:200] or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


class _Work:
    """The steps of a survey, in a thread of low priority."""

    def __init__(self, survey: _ksmrs.Survey, cpu: float, settle: float) -> None:
        self._survey = survey
        self._rest = 1 / cpu - 1
        self._settle = settle
        self._ends = threading.Event()
        self._at: tuple[str, int, int] = ("look", 0, 0)
        self._failure: BaseException | None = None
        self.look_seconds = 0.0
        self.cpu_seconds = 0.0

    def run(self, progress: Progress | None) -> None:
        """Do it all, and report from the calling thread; Ctrl-C ends it within a step."""
        thread = threading.Thread(target=self._work, name="ksmrs-survey", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
                if progress is not None:
                    progress(*self._at)
        finally:
            self._ends.set()
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            # Of this thread alone; nobody but root could take it back.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
            while self._at[0] != "done" and not self._ends.is_set():
                before, stage = time.thread_time(), self._at[0]
                self._at = self._survey.step(STEP_SECONDS)
                spent = time.thread_time() - before
                self.cpu_seconds += spent
                if stage == "look":
                    self.look_seconds += spent
                pause = spent * self._rest
                if stage == "look" != self._at[0]:
                    pause = max(pause, self._settle)
                self._ends.wait(pause)
        except BaseException as failure:
            self._failure = failure


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _knobs() -> tuple[dict[str, int], list[str]]:
    """The knobs of the broker that runs, or those of the next one, and what they keep from merging."""
    knobs, limits = dict(DEFAULT_KNOBS), []
    try:
        if _ksmrs.status() is not None:
            knobs = {name: int(_ksmrs.get(name)) for name in knobs}
    except KsmrsError as refused:
        limits.append(f"the broker does not say how it is configured ({refused}); the defaults were taken")
    if knobs["run"] != 1:
        limits.append(f"run={knobs['run']}: the broker merges nothing until it is 1")
    if not knobs["split_huge_pages"]:
        limits.append("split_huge_pages=0: less than 2 MiB in a huge page stays, which is not taken off here")
    if not knobs["merge_across_nodes"] and len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) > 1:
        limits.append("merge_across_nodes=0: pages of different nodes stay apart, which is not taken off here")
    return knobs, limits


def _result(
    looked: _ksmrs.Survey,
    work: _Work,
    *,
    seconds: float,
    wanted: list[int],
    commands: dict[int, str],
    refused: dict[int, str],
    knobs: dict[str, int],
    limits: list[str],
) -> Survey:
    ksmrs_knobs = (knobs["max_page_sharing"], bool(knobs["use_zero_pages"]))
    kernel_knobs = (
        _number(KERNEL_KSM / "max_page_sharing") or DEFAULT_KNOBS["max_page_sharing"],
        bool(_number(KERNEL_KSM / "use_zero_pages")),
    )
    mappings = (_number(Path("/proc/sys/vm/max_map_count")) or 65_530) // 3
    counted = looked.tally(ksmrs_knobs, kernel_knobs, mappings)
    fraction, windows, kept = looked.kept()
    scale = _Scale(fraction, windows)
    by_pid = {found["pid"]: _process(found, commands, scale) for found in counted["processes"]}
    processes = tuple(
        by_pid.get(pid) or ProcessSurvey(pid=pid, command=commands[pid], refusal=refused.get(pid, "")) for pid in wanted
    )

    def total(name: str) -> int:
        return sum(getattr(process, name) for process in processes)

    alive = [found for found in counted["processes"] if not found["ended"]]
    read = sum(process.pages_read for process in processes)
    engines = []
    for name, fit, zeros, per_page, engine_knobs in (
        ("ksmrs", "pages_fit", 1, _ksmrs.METADATA_PER_PAGE, ksmrs_knobs),
        ("kernel", "pages_fit_for_kernel", 2, KERNEL_BYTES_PER_PAGE, kernel_knobs),
    ):
        pages = sum(getattr(kind, fit) for process in processes for kind in process.kinds)
        engines.append(
            scale.engine(
                counted[name],
                pages=pages,
                zeros=sum(found["zeros"][zeros] for found in alive),
                knobs=engine_knobs,
                per_page=per_page,
                scan_cpu_seconds=work.look_seconds * pages / max(read, 1),
            )
        )
    if fraction < 1:
        limits.append(
            f"{fraction:.3g} of all contents were kept: duplicates are estimates, with a standard error, and the budget of "
            "mappings is not looked at; a larger --memory keeps more"
        )
    swapped = sum(kind.pages_swapped for process in processes for kind in process.kinds)
    if swapped:
        limits.append(f"{swapped:,} pages are in swap and were not read: they would have to be brought back for it")
    over = total("pages_unmerged_by_budget")
    if over:
        limits.append(
            f"{over:,} equal pages lie too scattered for the mappings that merging may use (a third of vm.max_map_count in "
            "each process): raise it to merge them"
        )
    return Survey(
        processes=processes,
        pages_read=read,
        pages_zero=total("pages_zero"),
        duplicates_within=total("duplicates_within"),
        duplicates_between=scale(counted["duplicates_between"]),
        pages_shared_already=total("pages_shared_already"),
        pages_merged_already=total("pages_merged_already"),
        pages_out_of_phase=total("pages_out_of_phase"),
        ksmrs=engines[0],
        kernel_ksm=engines[1],
        shifts=tuple(
            Shift(pid=pid, address=address, pages=pages, other_pid=other, other_address=other_address)
            for pid, address, pages, other, other_address in counted["shifts"]
        ),
        fraction=fraction,
        memory_bytes=kept * _ksmrs.Survey.BYTES_PER_PAGE,
        seconds=seconds,
        cpu_seconds=work.cpu_seconds,
        limits=tuple(limits),
        page_classes=tuple(looked.classes(index) for index in range(len(counted["processes"]))),
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """From what was kept to all there is."""

    fraction: float
    """Of contents."""
    windows: float
    """Of the windows by which shifted data is found; below 1 fewer stretches are found, so those are a lower bound."""

    def __call__(self, count: int) -> int:
        return round(count / self.fraction)

    def engine(
        self,
        found: dict[str, Any],
        *,
        pages: int,
        zeros: int,
        knobs: tuple[int, bool],
        per_page: int,
        scan_cpu_seconds: float,
    ) -> EngineSurvey:
        sharing, shared, zero_pages = found["pages_sharing"], found["pages_shared"], found["ksm_zero_pages"]
        volatile, squares = found["pages_volatile"], found["squares"]
        error = 0.0
        if self.fraction < 1:
            sharing, shared, volatile = self(sharing), self(shared), self(volatile)
            error = math.sqrt((1 - self.fraction) * squares) / self.fraction
            # Zeros were counted whole.
            zero_pages = zeros if knobs[1] else 0
            if not knobs[1]:
                frames = zeros // knobs[0] + (zeros % knobs[0] > 1)
                shared += frames
                sharing += zeros - (zeros % knobs[0] == 1) - frames
        saved = (sharing + zero_pages) * PAGE_SIZE
        return EngineSurvey(
            pages=pages,
            pages_shared=shared,
            pages_sharing=sharing,
            ksm_zero_pages=zero_pages,
            pages_volatile=volatile,
            saved_bytes=saved,
            error_bytes=round(error * PAGE_SIZE),
            profit_bytes=saved - pages * per_page,
            scan_cpu_seconds=scan_cpu_seconds,
        )


def _process(found: dict[str, Any], commands: dict[int, str], scale: _Scale) -> ProcessSurvey:
    pid = found["pid"]
    if found["ended"]:
        return ProcessSurvey(pid=pid, command=commands[pid], ended=True)
    kinds = tuple(MappingKind(kind=name, **figures) for name, figures in found["kinds"].items())
    share = found["share"]
    whole = scale.fraction == 1
    return ProcessSurvey(
        pid=pid,
        command=commands[pid],
        kinds=kinds,
        pages_read=sum(kind.pages_read for kind in kinds),
        pages_shared_already=sum(kind.pages_shared_already for kind in kinds),
        pages_merged_already=sum(kind.pages_merged_already for kind in kinds),
        pages_zero=share["pages_zero"] if whole else found["zeros"][0],
        duplicates_within=scale(share["duplicates_within"]),
        duplicates_between=scale(share["duplicates_between"]),
        pages_volatile=scale(share["pages_volatile"]),
        pages_out_of_phase=scale(share["pages_out_of_phase"]),
        ksm_merging_pages=scale(share["ksm_merging_pages"]) + (0 if whole else found["zeros"][1]),
        pages_unmerged_by_budget=share["pages_unmerged_by_budget"],
    )
