"""`ksmrs doctor`: it says that merging works where it does, and names what is in the way where it does not.

What takes something away (limits, a directory's mode, a blocked signal) does so in a child, and is found there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ksmrs
from children import Child, brokers_in, run
from ksmrs import _doctor


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ksmrs", "doctor", *arguments]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "COLUMNS": "400"}
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def named(findings: list[dict[str, str]] | tuple[ksmrs.Finding, ...], name: str) -> Any:
    (found,) = (
        finding for finding in findings if (finding["name"] if isinstance(finding, dict) else finding.name) == name
    )
    return found


def test_here_memory_merges(runtime_dir: Path) -> None:
    done = command("--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["merging"]) == (0, True), said
    names = [finding["name"] for finding in said["findings"]]
    assert len(names) == len(set(names)) > 15
    for finding in said["findings"]:
        assert finding["state"] in {"ok", "limited"} and finding["meaning"]
    assert "64 merged in private memory, 64 in shared" in named(said["findings"], "merging")["meaning"]
    assert brokers_in(runtime_dir) == [], "looking starts no broker"


def test_people_get_a_table() -> None:
    done = command()
    assert done.returncode == 0
    assert "vm.max_map_count" in done.stdout


def test_the_broker_is_named(runtime_dir: Path) -> None:
    ksmrs.connect()
    (pid,) = brokers_in(runtime_dir)
    assert f"pid {pid}, release" in named(ksmrs.doctor(), "broker").meaning


def test_a_directory_that_is_not_ours_alone_is_missing(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o755)
    done = command()
    assert done.returncode == 1
    assert "mode 0755, not 0700" in done.stdout
    assert "broker: do what the error says" in done.stdout
    runtime_dir.chmod(0o700)


LIMITED = """
import json, resource
import ksmrs
resource.setrlimit(resource.{limit}, ({value}, {value}))
print(json.dumps([[f.name, f.state, f.meaning, f.next_step] for f in ksmrs.doctor()]))
"""


@pytest.mark.parametrize(
    ("limit", "value", "refused"),
    [("RLIMIT_NOFILE", 12, "Too many open files"), ("RLIMIT_FSIZE", 1 << 20, "File too large")],
)
def test_a_limit_that_is_too_low_is_named(limit: str, value: int, refused: str) -> None:
    found = {name: rest for name, *rest in json.loads(run(LIMITED.format(limit=limit, value=value), prelude=False))}
    state, meaning, _ = found["merging"]
    assert state == "missing"
    assert refused in meaning
    state, _, step = found[limit]
    assert state == "limited"
    assert step.startswith("ulimit")


BLOCKED = """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
started, over = threading.Event(), threading.Event()
def blocks():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})
    started.set()
    over.wait()
thread = threading.Thread(target=blocks)
thread.start()
started.wait()
region = ksmrs.Region(4096)
(found,) = (finding for finding in ksmrs.doctor() if finding.name == "SIGSEGV blocked")
assert found.state == "limited" and f"thread {thread.native_id} (" in found.meaning, found
(found,) = (finding for finding in ksmrs.doctor() if finding.name == "SIGSEGV handler")
assert "has one" in found.meaning, found
print(thread.native_id)
sys.stdin.readline()
over.set()
thread.join()
(found,) = (finding for finding in ksmrs.doctor() if finding.name == "SIGSEGV blocked")
assert found.state == "ok", found
"""


def test_a_thread_that_blocks_sigsegv_is_named_from_inside_and_outside() -> None:
    with Child(BLOCKED) as child:
        thread = child.line()
        found = named(json.loads(command("--json", str(child.pid)).stdout)["findings"], "SIGSEGV blocked")
        child.tell()
        child.end()
    assert found["state"] == "limited"
    assert f"in thread {thread} (" in found["meaning"]
    assert "pinned" in found["next_step"]


def test_a_process_that_is_none() -> None:
    done = command(str(1 << 22))
    assert done.returncode == 1
    assert "No such process" in done.stderr
    with pytest.raises(ProcessLookupError):
        ksmrs.doctor(1 << 22)


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        ({}, "ok"),
        ({"private": 63}, "limited"),
        ({"private": 0}, "limited"),
        ({"private": 0, "shared": 0}, "missing"),
        ({"apart": False}, "missing"),
    ],
)
def test_what_the_trial_means(outcome: dict[str, Any], state: str) -> None:
    trial = {
        "pages": 64,
        "seconds": 20,
        "private": 64,
        "shared": 64,
        "apart": True,
        "dirty_tracking": "on",
        "collapse": "ok",
    }
    merging, tracking, huge = _doctor._trial_findings(trial | outcome)
    assert (merging.state, tracking.state, huge.state) == (state, "ok", "ok")


def test_a_refused_extra_is_a_limit() -> None:
    trial: dict[str, Any] = {"pages": 64, "seconds": 20, "private": 64, "shared": 64, "apart": True}
    trial |= {"dirty_tracking": "off: userfaultfd: EPERM", "collapse": "EINVAL (Invalid argument)"}
    _, tracking, huge = _doctor._trial_findings(trial)
    assert tracking.state == huge.state == "limited"
    assert "userfaultfd: EPERM" in tracking.meaning and "EINVAL" in huge.meaning


def test_versions_are_numbers() -> None:
    assert _doctor.kernel_version("6.18.5-1-generic") == (6, 18)
    assert _doctor.kernel_version("5.9") < _doctor.OLDEST_KERNEL == _doctor.kernel_version("5.14.0-362.el9")


def test_the_smallest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    leaf = tmp_path / "user/app"
    leaf.mkdir(parents=True)
    (leaf / "memory.max").write_text("max\n")
    assert _doctor.memory_limit("0::/user/app", tmp_path) is None
    (tmp_path / "user/memory.max").write_text("1048576\n")
    assert _doctor.memory_limit("0::/user/app", tmp_path) == 1 << 20
    (leaf / "memory.max").write_text("4096\n")
    assert _doctor.memory_limit("0::/user/app", tmp_path) == 4096
    old = tmp_path / "memory/app"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory/memory.limit_in_bytes").write_text("8192\n")
    assert _doctor.memory_limit("5:cpu,memory:/app\n3:pids:/app", tmp_path) == 8192
