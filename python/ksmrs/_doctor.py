"""`ksmrs doctor`: what this kernel, its limits and the container allow, and what that means for merging.

Whether memory merges is tried, not guessed: a child process with a broker of its own merges a few pages (`_trial.py`). All else
is read from /proc and /sys. Changes nothing, starts no broker that outlives it, and asks nothing of other processes but what
/proc shows of them.
"""

from __future__ import annotations

import faulthandler
import importlib.metadata
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ksmrs import _ksmrs, _process
from ksmrs._errors import KsmrsError

State = Literal["ok", "limited", "missing"]

OLDEST_KERNEL = (5, 14)
TRACKING_KERNEL = (6, 7)
DEFAULT_MAPPINGS = 65_530
"""The kernel's own `vm.max_map_count`."""
FEW_DESCRIPTORS = 1024
RECALL_SECONDS = 3
"""A client that does not answer for so long is taken for stopped; a lease must not break before."""
TRIAL_SECONDS = 120
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What it is, in the kernel's words where it has some."""
    state: State
    """`missing`: memory cannot merge as it is; `limited`: it does, but not as well or not all of it; else `ok`."""
    meaning: str
    """What was found, and what it means."""
    next_step: str = ""
    """What to do about it, empty where there is nothing to do."""


def doctor(pid: int | None = None) -> tuple[Finding, ...]:
    """Look at what merging rests on, here and in one process: this one, or `pid`, which must be the same user's.

    Takes a second or so, for merging is tried in a child process. Raises `ProcessLookupError` or `PermissionError` where that
    process cannot be looked at. Merging works if no finding is `missing`.
    """
    process = os.getpid() if pid is None else pid
    os.kill(process, 0)
    trial = _try_merging()
    return (
        _kernel(),
        _page_size(),
        _memfd(),
        *_trial_findings(trial),
        _broker(),
        _mappings(process),
        *_limits(process),
        _overcommit(),
        _seccomp(process),
        _shared_memory(),
        _memory_cgroup(process),
        _leases(),
        _ptrace(),
        _handler(process),
        _blocked(process),
        *_numpy(process),
        _kernel_ksm(),
    )


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _number(path: str) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.isdecimal() else None


def _status(process: int, task: int | None = None) -> dict[str, str]:
    """The lines of a process's status, or of one of its threads'."""
    folder = Path(f"/proc/{process}") if task is None else Path(f"/proc/{process}/task/{task}")
    lines = (folder / "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def kernel_version(release: str) -> tuple[int, int]:
    """The first two numbers of a release such as "6.18.5-1-generic"."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _kernel() -> Finding:
    release, machine = platform.release(), platform.machine()
    found = f"Linux {release}, {machine}"
    version = kernel_version(release)
    if version < OLDEST_KERNEL:
        return Finding(
            name="kernel",
            state="missing",
            meaning=f"{found}: ksmrs needs 5.14",
            next_step="boot a kernel of 6.7 or later",
        )
    if machine not in {"x86_64", "aarch64"}:
        return Finding(name="kernel", state="limited", meaning=f"{found}: ksmrs is made for x86_64 and aarch64")
    if version < TRACKING_KERNEL:
        meaning = f"{found}: scans read every page, since writes can be tracked from 6.7 on"
        return Finding(name="kernel", state="limited", meaning=meaning, next_step="boot a kernel of 6.7 or later")
    return Finding(name="kernel", state="ok", meaning=found)


def _page_size() -> Finding:
    size = os.sysconf("SC_PAGE_SIZE")
    if size == _ksmrs.PAGE_SIZE:
        return Finding(name="page size", state="ok", meaning=f"{size} bytes")
    meaning = f"{size} bytes: merging is off, for ksmrs merges pages of {_ksmrs.PAGE_SIZE}"
    return Finding(name="page size", state="missing", meaning=meaning, next_step="boot a kernel with pages of 4 KiB")


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("ksmrs-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as refused:
        meaning = f"memfd_create: {refused.strerror}: frames and page tables are made of it"
        return Finding(
            name="memfd", state="missing", meaning=meaning, next_step="allow memfd_create in the seccomp filter"
        )
    return Finding(name="memfd", state="ok", meaning="can be made and sealed")


def _try_merging() -> dict[str, Any]:
    if not sys.executable or getattr(sys, "frozen", False):
        return {"untried": "this interpreter cannot be started again, so merging was not tried"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ksmrs._trial"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TRIAL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as refused:
        return {"error": f"the process that tries it: {refused}"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"the process that tries it ended with {done.returncode}: {last}"}
    return dict(json.loads(done.stdout))


def _trial_findings(trial: dict[str, Any]) -> list[Finding]:
    """What came of the trial; `trial` is what `_trial.py` printed."""
    if "untried" in trial:
        return [Finding(name="merging", state="limited", meaning=trial["untried"], next_step="run `ksmrs doctor`")]
    if "error" in trial:
        step = "the findings below may say why; the error names the call that was refused"
        return [
            Finding(name="merging", state="missing", meaning=f"tried, and refused: {trial['error']}", next_step=step)
        ]
    pages = trial["pages"]
    found = f"tried: of {pages} pages {trial['private']} merged in private memory, {trial['shared']} in shared"
    merging = Finding(name="merging", state="ok", meaning=f"{found}; a write gave a page its own copy back")
    if not trial["apart"]:
        meaning = f"{found}, but a write to one page was seen in another"
        merging = Finding(
            name="merging", state="missing", meaning=meaning, next_step="use no ksmrs here, and report it"
        )
    elif trial["private"] == trial["shared"] == 0:
        step = "look at the broker's CPU time and its log"
        merging = Finding(
            name="merging", state="missing", meaning=f"{found} within {trial['seconds']} s", next_step=step
        )
    elif min(trial["private"], trial["shared"]) < pages:
        meaning = f"{found} within {trial['seconds']} s"
        merging = Finding(
            name="merging", state="limited", meaning=meaning, next_step="try again when the machine is idle"
        )
    return [merging, _dirty_tracking(trial["dirty_tracking"]), _huge_pages(trial["collapse"])]


def _dirty_tracking(state: str) -> Finding:
    if state == "on":
        meaning = "on: pages that nobody writes are not read again (userfaultfd WP_ASYNC, PAGEMAP_SCAN)"
        return Finding(name="dirty tracking", state="ok", meaning=meaning)
    meaning = f"{state}; every page is read in every pass"
    step = "Linux 6.7 or later, and a seccomp filter that allows userfaultfd"
    if "switched off" in state:
        step = "leave KSMRS_DIRTY_TRACKING out of the environment"
    return Finding(name="dirty tracking", state="limited", meaning=meaning, next_step=step)


def _huge_pages(collapse: str) -> Finding:
    folder = "/sys/kernel/mm/transparent_hugepage/"
    chosen = {}
    for knob in ("enabled", "shmem_enabled"):
        found = re.search(r"\[(\w+)\]", _read(folder + knob) or "")
        chosen[knob] = found[1] if found else "absent"
    knobs = ", ".join(f"{knob} {value}" for knob, value in chosen.items())
    if collapse == "ok":
        return Finding(name="huge pages", state="ok", meaning=f"MADV_COLLAPSE works on shared memory; {knobs}")
    meaning = f"MADV_COLLAPSE on shared memory: {collapse}; {knobs}: frames are small pages, whatever they serve"
    step = "Linux 6.1 or later with transparent huge pages, and shmem_enabled other than deny"
    return Finding(name="huge pages", state="limited", meaning=meaning, next_step=step)


def _broker() -> Finding:
    try:
        status = _ksmrs.status()
    except (KsmrsError, OSError) as refused:
        step = "do what the error says, or set KSMRS_RUNTIME_DIR to another directory"
        return Finding(name="broker", state="missing", meaning=str(refused), next_step=step)
    if status is None:
        return Finding(name="broker", state="ok", meaning="none is running; the first region starts one")
    ours = importlib.metadata.version("ksmrs")
    found = f"pid {status['pid']}, release {status['release']}, {status['clients']} clients"
    if status["release"] != ours:
        meaning = f"{found}; this package is {ours}, which speaks the same protocol"
        return Finding(name="broker", state="ok", meaning=meaning)
    return Finding(name="broker", state="ok", meaning=found)


def _mappings(process: int) -> Finding:
    limit = _number("/proc/sys/vm/max_map_count") or DEFAULT_MAPPINGS
    with Path(f"/proc/{process}/maps").open("rb") as maps:
        used = sum(1 for _ in maps)
    found = f"process {process} has {used:,} of {limit:,} mappings"
    step = f"sysctl vm.max_map_count={max(4 * DEFAULT_MAPPINGS, 2 * limit)}"
    if used > limit * 3 // 4:
        meaning = f"{found}: above three quarters nothing merges that needs a mapping more"
        return Finding(name="vm.max_map_count", state="limited", meaning=meaning, next_step=step)
    if limit < DEFAULT_MAPPINGS:
        meaning = f"{found}: merging spends a third of them at most, and scattered pages take two each"
        return Finding(name="vm.max_map_count", state="limited", meaning=meaning, next_step=step)
    return Finding(name="vm.max_map_count", state="ok", meaning=found)


def _limits(process: int) -> list[Finding]:
    def said(limit: int, unit: int, name: str) -> str:
        return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // unit:,}{name}"

    def below(limit: int, least: int) -> bool:
        return limit != resource.RLIM_INFINITY and limit < least

    twice = 2 * _machine_bytes()
    findings = []
    soft, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
    found = f"{said(soft, 1, '')} descriptors, {said(hard, 1, '')} if asked for"
    few = below(hard, FEW_DESCRIPTORS)
    findings.append(
        Finding(
            name="RLIMIT_NOFILE",
            state="limited" if few else "ok",
            meaning=f"{found}: a broker needs several for each client" if few else found,
            next_step=f"ulimit -Hn {FEW_DESCRIPTORS} or more" if few else "",
        )
    )
    for name, what, step in (
        (
            "RLIMIT_AS",
            "page tables and second views of shared regions take addresses too, though no memory",
            "ulimit -v unlimited",
        ),
        (
            "RLIMIT_FSIZE",
            "the frame store is no larger than that, and a page table may be refused",
            "ulimit -f unlimited",
        ),
    ):
        soft, _ = resource.prlimit(process, getattr(resource, name))
        found = said(soft, MIB, " MiB")
        low = below(soft, twice)
        findings.append(
            Finding(
                name=name,
                state="limited" if low else "ok",
                meaning=f"{found}: {what}" if low else found,
                next_step=step if low else "",
            )
        )
    soft, _ = resource.prlimit(process, resource.RLIMIT_MEMLOCK)
    meaning = f"{said(soft, 1024, ' KiB')}; ksmrs locks no memory, and memory that is locked cannot be opted in"
    findings.append(Finding(name="RLIMIT_MEMLOCK", state="ok", meaning=meaning))
    return findings


def _overcommit() -> Finding:
    mode = _number("/proc/sys/vm/overcommit_memory")
    if mode != 2:
        return Finding(name="vm.overcommit_memory", state="ok", meaning=f"{mode}")
    meaning = "2: merged private pages count as if each had memory of its own, so mappings may be refused though there is room"
    return Finding(
        name="vm.overcommit_memory", state="limited", meaning=meaning, next_step="sysctl vm.overcommit_memory=0"
    )


def _seccomp(process: int) -> Finding:
    mode = _status(process).get("Seccomp", "0")
    if mode == "0":
        return Finding(name="seccomp", state="ok", meaning="no filter")
    meaning = "a filter is on; `merging` and `dirty tracking` above say what it allows in this process"
    step = "where a call is refused that an error above names, allow it in the container's profile"
    return Finding(name="seccomp", state="limited", meaning=meaning, next_step=step)


def _shared_memory() -> Finding:
    try:
        info = os.statvfs("/dev/shm")
    except OSError as refused:
        meaning = f"/dev/shm: {refused.strerror}: no named objects; other shared memory does not need it"
        return Finding(name="/dev/shm", state="limited", meaning=meaning, next_step="mount a tmpfs there")
    free, size = info.f_bavail * info.f_frsize, info.f_blocks * info.f_frsize
    found = f"{free // MIB:,} of {size // MIB:,} MiB free"
    if size <= 64 * MIB or free * 10 < size:
        meaning = f"{found}: named objects merge only while all of them would fit there unmerged; other memory does not need it"
        step = "docker run --shm-size=..., or remount it larger"
        return Finding(name="/dev/shm", state="limited", meaning=meaning, next_step=step)
    return Finding(name="/dev/shm", state="ok", meaning=f"{found}, for named objects alone")


def memory_limit(groups: str, root: Path) -> int | None:
    """The smallest memory limit of a process's group and those above it; `groups` is its /proc/PID/cgroup."""
    limits = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            limit = _number(str(folder / name))
            # Version 1 says "none" with the largest number of whole pages.
            if limit is not None and limit < 1 << 62:
                limits.append(limit)
            if folder == top:
                break
    return min(limits, default=None)


def _memory_cgroup(process: int) -> Finding:
    limit = memory_limit(_read(f"/proc/{process}/cgroup") or "", Path("/sys/fs/cgroup"))
    if limit is None:
        return Finding(name="memory cgroup", state="ok", meaning="no limit")
    meaning = f"{limit // MIB:,} MiB: frames are charged to the broker's group, which is that of whoever started it"
    step = "start `ksmrs broker` by a service manager, in a group that has room for what all clients share"
    return Finding(name="memory cgroup", state="limited", meaning=meaning, next_step=step)


def _leases() -> Finding:
    enabled, seconds = _number("/proc/sys/fs/leases-enable"), _number("/proc/sys/fs/lease-break-time")
    found = f"fs.leases-enable {enabled}, fs.lease-break-time {seconds} s"
    if enabled == 0:
        meaning = f"{found}: named objects do not merge"
        return Finding(name="file leases", state="limited", meaning=meaning, next_step="sysctl fs.leases-enable=1")
    if seconds is not None and seconds <= RECALL_SECONDS:
        meaning = f"{found}: who opens a named object may come before its pages are home, and read zeros"
        return Finding(name="file leases", state="limited", meaning=meaning, next_step="sysctl fs.lease-break-time=45")
    return Finding(name="file leases", state="ok", meaning=found)


def _ptrace() -> Finding:
    scope = _number("/proc/sys/kernel/yama/ptrace_scope")
    meaning = f"{'no yama' if scope is None else scope}; ksmrs attaches to no process"
    return Finding(name="kernel.yama.ptrace_scope", state="ok", meaning=meaning)


def _has(mask: str, number: signal.Signals) -> bool:
    """Whether a signal is in a mask of /proc/PID/status."""
    return bool(int(mask, 16) >> (number - 1) & 1)


def _handler(process: int) -> Finding:
    caught = _has(_status(process).get("SigCgt", "0"), signal.SIGSEGV)
    found = f"process {process} {'has one' if caught else 'has none'}"
    if process == os.getpid() and faulthandler.is_enabled():
        found += ", and faulthandler is on, which gets along with that of ksmrs"
    meaning = f"{found}; ksmrs puts its own in front with the first region, and hands on what is not its own"
    return Finding(name="SIGSEGV handler", state="ok", meaning=meaning)


def _numpy(process: int) -> list[Finding]:
    """How far `merge_process` reaches; of this process only, and only where it is on."""
    reaches = _process.reaches()
    if process != os.getpid() or reaches == "off":
        return []
    whole = reaches == _process.EVERY_THREAD
    return [
        Finding(
            name="NumPy's allocator",
            state="ok" if whole else "limited",
            meaning=f"merge_process reaches {reaches}",
            next_step="" if whole else "call merge_process before threads are started, and in each context of your own",
        )
    ]


def blocked_threads(process: int) -> list[str]:
    """The threads of a process that block SIGSEGV, by number and name; not those of ksmrs, which write no merged memory so."""
    found = []
    for task in sorted(int(entry.name) for entry in Path(f"/proc/{process}/task").iterdir()):
        try:
            status = _status(process, task)
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has just ended
        name = status.get("Name", "?")
        if _has(status.get("SigBlk", "0"), signal.SIGSEGV) and not name.startswith("ksmrs-"):
            found.append(f"{task} ({name})")
    return found


def _blocked(process: int) -> Finding:
    threads = blocked_threads(process)
    if not threads:
        return Finding(name="SIGSEGV blocked", state="ok", meaning=f"in no thread of process {process}")
    meaning = (
        f"in thread {', '.join(threads)}: the kernel kills the process when such a thread writes merged shared memory"
    )
    step = "unblock it (signal.pthread_sigmask), or pin what these threads write (ksmrs.pinned)"
    return Finding(name="SIGSEGV blocked", state="limited", meaning=meaning, next_step=step)


def _kernel_ksm() -> Finding:
    run = _number("/sys/kernel/mm/ksm/run")
    said = {None: "absent", 0: "run 0: off", 1: "run 1: on", 2: "run 2: off, and all unmerged"}.get(run, f"run {run}")
    return Finding(
        name="kernel KSM", state="ok", meaning=f"{said}; ksmrs does not need it, and neither disturbs the other"
    )
