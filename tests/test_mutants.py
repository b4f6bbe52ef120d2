"""Every mutant, a deliberate error in the merge protocol, must be caught by wrong contents; one that survives fails the build.

Relies on `make mutants`, which builds an extension module with the mutants in it; the wheel has none. The unmutated protocol
in that build must pass the same with the same delays. `no-generation` and `no-freezing` are caught below Python, in
rust/sys/tests/real_mutants.rs: no honest broker gives the orders that they need.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import children

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "target" / "mutants"
SECONDS = 40.0
DELAYS = "merge-freezing=delay:200;merge-frozen=delay:200;merge-committing=delay:50"
"""Widens the windows that the mutants leave open."""
ORACLE = ["no-freeze", "compare-before-freeze", "punch-before-map"]
SCENES = {
    "frame-freed-early": ("children-show-frames", ""),
    "no-epoch": ("children-show-frames", ""),
    "born-uncounted": ("born-children-show-frames", ""),
    "unregistered-forgotten": ("unregistered-siblings-show-frames", ""),
    "moved-frame-freed": ("frames-move", ""),
    "held-covers": ("held-at-the-limit", ""),
    "proposal-freed-on-timeout": ("late-answer", ""),
    "leaving-covers": ("left-while-merging", "merge-mapped=delay:200000;leave-claimed=delay:1000000"),
    "handler-without-claim": ("writer-in-the-freeze", "merge-frozen=delay:3000;merge-committing=delay:3000"),
}

pytestmark = [
    pytest.mark.skipif(not (BUILD / "ksmrs").is_dir(), reason="no build with mutants: run make mutants"),
    pytest.mark.timeout(SECONDS + 240),
]


def run(script: str, argument: str, mutant: str | None, failpoints: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="ksmrs-mutant-") as directory:
        environment = {
            **os.environ,
            "PYTHONPATH": str(BUILD),
            "KSMRS_FAILPOINTS": failpoints,
            "KSMRS_RUNTIME_DIR": directory,
        }
        if mutant is not None:
            environment["KSMRS_MUTANT"] = mutant
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / script, argument],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        children.kill_brokers(Path(directory))
        return done


@pytest.mark.parametrize("mutant", ORACLE)
def test_the_oracle_catches(mutant: str) -> None:
    done = run("oracle.py", str(SECONDS), mutant, DELAYS)
    # It must be a byte, a crash or a hang, not a build that doesn't start.
    assert done.returncode != 0, f"{mutant} survived: {done.stdout}"
    assert "Wrong" in done.stderr, done.stderr


@pytest.mark.parametrize("mutant", SCENES)
def test_a_directed_scene_catches(mutant: str) -> None:
    scene, failpoints = SCENES[mutant]
    done = run("scenes.py", scene, mutant, failpoints)
    # Wrong bytes, or, where a page is left read-only for good, a write that crashes.
    assert done.returncode == -11 or (done.returncode != 0 and "Wrong" in done.stderr), (
        f"{mutant} survived, {done.returncode}: {done.stderr}"
    )


def test_the_same_build_without_a_mutant_passes_the_oracle() -> None:
    done = run("oracle.py", "15", None, DELAYS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("scene", "failpoints"), sorted(set(SCENES.values())))
def test_the_same_build_without_a_mutant_passes(scene: str, failpoints: str) -> None:
    done = run("scenes.py", scene, None, failpoints)
    assert done.returncode == 0, done.stderr


def test_an_unknown_mutant_is_refused() -> None:
    done = run("oracle.py", "5", "no-such-mutant", "")
    assert "unknown mutant" in done.stderr
