"""The `ksmrs` command, as people and scripts call it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ksmrs
from children import brokers_in


def command(*arguments: str, returncode: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ksmrs", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == returncode, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout if returncode == 0 else done.stdout + done.stderr


def test_status_and_stat_start_no_broker(runtime_dir: Path) -> None:
    assert "no broker" in command("status", returncode=1)
    assert json.loads(command("stat", "--json"))["pages_shared"] == 0
    assert brokers_in(runtime_dir) == []


def test_status_names_the_broker(runtime_dir: Path) -> None:
    ksmrs.connect()
    (pid,) = brokers_in(runtime_dir)
    assert str(pid) in command("status")


def test_stat_has_every_counter() -> None:
    names = [field.name for field in dataclasses.fields(ksmrs.Stats)]
    assert list(json.loads(command("stat", "--json"))) == names
    assert [line.split()[0] for line in command("stat").splitlines()] == names


def test_set_turns_a_knob_for_everyone() -> None:
    ksmrs.connect()
    assert command("set", "sleep_millisecs=7").strip() == "sleep_millisecs=7"
    assert ksmrs.tunables.sleep_millisecs == 7


@pytest.mark.parametrize("assignment", ["run", "run=9", "walk=1", "=1", "sleep_millisecs=soon"])
def test_set_refuses_with_a_reason(assignment: str) -> None:
    returncode = 1 if assignment in {"run=9", "sleep_millisecs=soon"} else 2
    assert "Error" in command("set", assignment, returncode=returncode)


@pytest.mark.timeout(300)
def test_the_demo_saves_memory_and_every_byte_is_right() -> None:
    report = json.loads(command("demo", "--workers", "4", "--mb", "24", "--json"))
    kinds = ["private region", "shared region", "named object", "ndarray"]
    assert [row["kind"] for row in report["workers"]] == kinds
    assert report["bytes_wrong_merged"] == report["bytes_wrong_unmerged"] == 0
    assert report["pages_merged_after_unmerge"] == 0
    # Four copies of 24 MiB; three of them are saved. The largest files that fit may fill a little less.
    assert report["saved_bytes_by_pss"] > 50 << 20
    merged = [row["merged_pages"] for row in report["workers"]]
    assert min(merged) > 4000
    assert max(merged) - min(merged) < 16, "the same files save the same in each kind"
