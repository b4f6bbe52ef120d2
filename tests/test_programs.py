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
