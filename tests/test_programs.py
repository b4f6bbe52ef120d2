"""Real programs as users have them: the same answers with ksmrs, and less memory. Small sizes, ksmrs alone; nothing is timed.

The programs are the benches' own (benches/programs/), which end with status 1 where an answer, or the memory of a worker,
differs by a byte. A program whose packages are not installed is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kernel_ksm

PROGRAMS = Path(__file__).resolve().parent.parent / "benches" / "programs"
SKIPPED = 77
pytestmark = pytest.mark.skipif(not PROGRAMS.is_dir(), reason="the benches are not beside these tests")


def quick(name: str, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, PROGRAMS / f"{name}.py", "--quick", "--json", *words],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, kernel_ksm.WITHOUT: "1"},
    )
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("name", "gross", "net"),
    [
        # MiB that four workers save at least: by the counters, and all told, of what they took without.
        ("model_server", 250, 150),
        ("data_frames", 60, 0),
        ("prefork_server", 40, 15),
        ("joblib_workers", 60, 5),
    ],
)
def test_answers_are_the_same_and_memory_is_saved(name: str, gross: int, net: int) -> None:
    result = quick(name)
    assert result["answers_identical"] > 20
    without, with_ksmrs = result["figures"]["without"], result["figures"]["ksmrs"]
    assert with_ksmrs["saved, gross, MiB"]["median"] >= gross, with_ksmrs
    memory = "memory when merged, MiB"
    assert without[memory]["median"] - with_ksmrs[memory]["median"] >= net, (without, with_ksmrs)


def test_a_program_whose_answers_differ_says_which_and_fails(tmp_path: Path) -> None:
    program = tmp_path / "liar.py"
    program.write_text(
        f"""
import sys
sys.path.insert(0, {str(PROGRAMS)!r})
import measure
def run(side):
    side.take("when merged", [])
    side.answer("what is right", "the same")
    side.answer("what is not", side.how)
measure.main(run, None, [])
"""
    )
    environment = {**os.environ, kernel_ksm.WITHOUT: "1"}
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 1 and "ksmrs: 1 answers are not those without: ['what is not']" in done.stderr, (
        done.stderr
    )
    program.write_text(program.read_text().replace("None, [])", "None, ['no_such_package'])"))
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == SKIPPED and "not installed: no_such_package" in done.stderr, done.stderr
