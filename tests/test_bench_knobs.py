"""Kernel KSM's knobs after a bench that was interrupted, killed or failed: as they were, also if nothing of it is left.

Needs root and a kernel with KSM that nobody else uses. Turns knobs through what the benches use, and never by itself.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import kernel_ksm
from children import Child, wait_for

REPORT = Path(__file__).resolve().parent.parent / "benches" / "report.py"
REFUSAL = kernel_ksm.unavailable()
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=f"kernel KSM: {REFUSAL}")
TURNS = """\
    import os, signal, sys
    import kernel_ksm
    # Whoever runs the tests may ignore them, and then so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with kernel_ksm.turned({"run": 1, "sleep_millisecs": 4321, "advisor_mode": "none", "pages_to_scan": 77}):
        print("turned", flush=True)
"""
THEN = {
    "waits": "sys.stdin.readline()",
    "is interrupted": "signal.raise_signal(signal.SIGINT)",
    "fails": "raise RuntimeError('as benches do')",
    "exits at once": "os._exit(7)",
    "leaves a child": "os.write(1, b'born\\n' if os.fork() == 0 else b'forked\\n'); sys.stdin.readline()",
}


def program(then: str) -> Child:
    return Child(textwrap.dedent(TURNS) + " " * 4 + THEN[then])


def is_free() -> bool:
    """Whether nobody holds kernel KSM, a guard included."""
    lock = os.open(kernel_ksm.KSM / "run", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


@contextmanager
def knobs_stay() -> Iterator[dict[str, str]]:
    """The knobs are the same when nobody holds them any more."""
    wait_for(is_free, "the end of whoever uses kernel KSM", 120)
    before = kernel_ksm.knobs()
    assert before["sleep_millisecs"] != "4321"
    yield before
    wait_for(is_free, "the end of the guard", 60)
    assert kernel_ksm.knobs() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_bench(number: signal.Signals) -> None:
    with knobs_stay(), program("waits") as child:
        assert child.line() == "turned" and kernel_ksm.knob("sleep_millisecs") == "4321"
        child.kill(number)
        child.end(-number)


@pytest.mark.parametrize(("then", "status"), [("fails", 1), ("is interrupted", -signal.SIGINT), ("exits at once", 7)])
def test_a_bench_ends_by_itself(then: str, status: int) -> None:
    with knobs_stay(), program(then) as child:
        child.end(status)


def test_a_bench_is_killed_whose_child_lives() -> None:
    with knobs_stay(), program("leaves a child") as child:
        assert child.line() == "turned" and {child.line(), child.line()} == {"born", "forked"}
        child.kill()
        # The child that was forked holds every pipe and the lock's descriptor, and reads a line too.
        wait_for(lambda: kernel_ksm.knob("sleep_millisecs") != "4321", "the guard")
        child.tell()
        child.end(-signal.SIGKILL)


def test_a_second_bench_takes_no_turned_knob_for_the_machines() -> None:
    with knobs_stay() as before, program("waits") as first:
        assert first.line() == "turned"
        with program("waits") as second:
            first.kill()
            assert second.line() == "turned"
            second.tell()
            second.end()
        first.end(-signal.SIGKILL)
        assert kernel_ksm.knobs() == before


@pytest.mark.skipif(not REPORT.exists(), reason="the benches are not beside these tests")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("whom", ["the report", "the bench"])
def test_a_report_is_ended_in_the_midst_of_a_bench(number: signal.Signals, whom: str, tmp_path: Path) -> None:
    words = ["--only", "time_to_savings", "--quick", "--to", str(tmp_path)]
    with knobs_stay() as before:
        report = subprocess.Popen([sys.executable, REPORT, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: kernel_ksm.knobs() != before, "a turned knob", 120)
            (bench,) = children_of(report.pid)
            os.kill(report.pid if whom == "the report" else bench, number)
            said, _ = report.communicate(timeout=120)
        finally:
            report.kill()
            report.wait()
        if whom == "the bench":
            assert report.returncode == 1 and f"status {-number}" in said.decode()
            assert kernel_ksm.knobs() == before, "the report did not wait for the guard"
        elif number == signal.SIGTERM:
            assert report.returncode == 1 and b"interrupted (SIGTERM)" in said
            assert kernel_ksm.knobs() == before, "the report did not wait for the bench"
        # A bench whose report was killed goes on to its end.
        wait_for(lambda: not Path(f"/proc/{bench}").exists(), "the end of the bench", 120)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
