"""Why a process may not be surveyed, in words, with the next step.

The kernel says only EACCES or EPERM; what of all it asks about was wrong is found by looking at the same things: the users,
dumpable or not, capabilities, Yama, seccomp. Relies on /proc, and tries nothing that the refused call did not.
"""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path

YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


def reason(pid: int, refused: OSError) -> str:
    """One sentence for a process that could not be opened."""
    if refused.errno in {errno.ESRCH, errno.ENOENT}:
        return f"process {pid}: there is none with this number, or it has no memory of its own"
    if refused.errno == errno.EEXIST:
        return f"process {pid} has the memory of another one that is named (it is a thread of it, or about to run a program)"
    if refused.errno in {errno.EMFILE, errno.ENFILE}:
        return f"process {pid}: no descriptor is free ({refused.strerror}); each process takes two: raise ulimit -n"
    if refused.errno not in {errno.EACCES, errno.EPERM}:
        return f"process {pid}: {refused.strerror}"
    return f"process {pid} may not be looked at: {_forbidden(pid)}"


def _forbidden(pid: int) -> str:
    try:
        status = _status(pid)
        # The folder itself always has the process's user; of one that is not dumpable the files are root's.
        owner = Path(f"/proc/{pid}/mem").stat().st_uid
    except OSError:
        return "/proc hides it (hidepid): run the survey as root, or start the program by `ksmrs survey -- COMMAND`"
    users = {int(user) for user in status["Uid"].split()[:3]}
    user = os.geteuid()
    if users != {user}:
        theirs = ", ".join(_name(other) for other in sorted(users))
        return f"it is of user {theirs}, and this is {_name(user)}: run the survey as that user, or as root"
    if owner != user:
        return (
            "it is not dumpable (it changed its user, its program file is not readable, or it called prctl(PR_SET_DUMPABLE)): "
            "run the survey as root"
        )
    missing = int(status.get("CapPrm", "0"), 16) & ~int(_status("self").get("CapPrm", "0"), 16)
    if missing:
        return f"it has capabilities that this process has not ({missing:#x}): run the survey as root"
    scope = _scope()
    if scope == 1:
        return (
            "kernel.yama.ptrace_scope is 1, which allows this for descendants only: start it by `ksmrs survey -- COMMAND`, or, "
            "as root, sysctl kernel.yama.ptrace_scope=0"
        )
    if scope == 2:
        return "kernel.yama.ptrace_scope is 2, which allows this to root only: run the survey as root"
    if scope is not None and scope > 2:
        return (
            f"kernel.yama.ptrace_scope is {scope}, which allows this to nobody until the next boot with another value"
        )
    if _status("self").get("Seccomp", "0") != "0":
        return (
            "a seccomp filter is on here, as containers have: allow this process /proc/PID/mem (--cap-add SYS_PTRACE), or run "
            "the survey outside"
        )
    return (
        "the kernel does not say why (another user namespace, or a security module): run the survey as root where the process "
        "was started"
    )


def _status(pid: int | str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _scope() -> int | None:
    try:
        return int(YAMA.read_text())
    except (OSError, ValueError):
        return None


def _name(user: int) -> str:
    try:
        return f"{user} ({pwd.getpwuid(user).pw_name})"
    except KeyError:
        return str(user)
