"""`ksmrs survey` on the command line, and what it says where it may not look."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ksmrs
from children import ended, forked
from ksmrs import _survey, _survey_command, _survey_refusal, _survey_report
from surveyed import HOLDS, KNOWN, LEAST, PAGE, ROOT, holding


@pytest.mark.parametrize(
    ("pids", "refused"), [([1 << 22], "there is none"), ([], "no process"), ([0], "is no process")]
)
def test_no_process_to_look_at_is_an_error(pids: list[int], refused: str) -> None:
    with pytest.raises(ksmrs.KsmrsError, match=refused) as raised:
        ksmrs.survey(pids)
    assert isinstance(raised.value, OSError if pids == [1 << 22] else ValueError)


@pytest.mark.parametrize(
    ("option", "value"),
    [("sample", 0), ("sample", 1.5), ("cpu", 0), ("memory", 1000), ("settle", -1), ("min_bytes", -1)],
)
def test_what_is_out_of_range_is_named(option: str, value: float) -> None:
    with pytest.raises(ksmrs.ArgumentError, match=f"{option}={value}"):
        ksmrs.survey(os.getpid(), **{option: value})  # type: ignore[arg-type]


def test_one_that_may_be_looked_at_is_enough() -> None:
    with holding("room = Room(); room.put(noise(1, 7))") as (child,):
        found = ksmrs.survey([1 << 22, child.pid], settle=0, min_bytes=LEAST)
    none, one = found.processes
    assert "there is none" in none.refusal and none.pages_read == 0
    assert one.refusal == "" and one.pages_read == 7


UNDUMPABLE = "assert libc.prctl(4, 0, 0, 0, 0) == 0"


def test_refusals_say_what_forbids_it_and_the_next_step() -> None:
    """As an ordinary user, for root is refused nothing."""
    with holding("room = Room()", UNDUMPABLE) as (child, undumpable):
        said = as_nobody([child.pid, undumpable.pid, 1])
    if ROOT:
        assert all("it is of user 0 (root), and this is 65534" in line and "as root" in line for line in said), said
    else:
        assert said[0] == "looked at"
        assert "it is not dumpable" in said[1] and "as root" in said[1]
        assert "it is of user 0 (root)" in said[2]


@pytest.mark.skipif(not ROOT, reason="only root can make a process of somebody else's")
def test_an_ordinary_user_looks_at_its_own_and_at_none_that_is_not_dumpable() -> None:
    drops = "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
    # Whoever changes its user is not dumpable until it says so.
    with holding(drops, drops + "libc.prctl(4, 1, 0, 0, 0)") as (undumpable, child):
        said = as_nobody([undumpable.pid, child.pid])
    assert "it is not dumpable" in said[0] and "as root" in said[0]
    assert said[1] == "looked at"


def as_nobody(pids: list[int]) -> list[str]:
    """What an ordinary user hears of these processes."""
    ours, theirs = os.pipe()

    def ask() -> None:
        if ROOT:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        for pid in pids:
            try:
                ksmrs.survey(pid, settle=0)
                os.write(theirs, b"looked at\n")
            except ksmrs.SystemCallError as refused:
                assert isinstance(refused, OSError)
                os.write(theirs, f"{refused}\n".encode())

    ended(forked(ask))
    os.close(theirs)
    with os.fdopen(ours) as said:
        return said.read().splitlines()


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        (1, "ksmrs survey -- COMMAND"),
        (2, "root only"),
        (3, "nobody until the next boot"),
        (None, "security module|seccomp"),
    ],
)
def test_yama_is_named(scope: int | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "ptrace_scope"
    if scope is not None:
        file.write_text(f"{scope}\n")
    monkeypatch.setattr(_survey_refusal, "YAMA", file)
    assert re.search(said, _survey_refusal.reason(os.getpid(), PermissionError(errno.EACCES, "refused")))


def command(*arguments: str | int | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ksmrs", "survey", *map(str, arguments)]
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
        **options,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_json_has_every_field_and_a_picture_every_page(tmp_path: Path) -> None:
    with holding(*(KNOWN.format(flags="PRIVATE", seed=seed) for seed in (3, 4))) as children:
        pids = [str(child.pid) for child in children]
        done = command("--json", "--settle", "0", "--min-bytes", LEAST, "--png", tmp_path / "pages.png", *pids)
        people = command("--settle", "0", "--min-bytes", str(LEAST), *pids)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said) == {field for field in ksmrs.Survey.__dataclass_fields__ if field != "page_classes"} | {
        "page_size"
    }
    assert set(said["ksmrs"]) == set(said["kernel_ksm"]) == set(_survey.EngineSurvey.__dataclass_fields__)
    for process in said["processes"]:
        assert set(process) == set(_survey.ProcessSurvey.__dataclass_fields__)
        assert all(set(kind) == set(_survey.MappingKind.__dataclass_fields__) for kind in process["kinds"])
    assert (said["ksmrs"]["pages_sharing"], said["pages_read"], said["page_size"]) == (199, 600, PAGE)
    assert people.returncode == 0 and people.stderr == "", "no bar where there is no terminal"
    assert "what merging would save, of 2.3 MiB read" in people.stdout
    for child in children:
        assert str(child.pid) in people.stdout

    pixels = np.asarray(Image.open(tmp_path / "pages.png").convert("RGB"))
    expected = [3] * 100 + [3] * 50 + [1] * 40 + [0] * 110
    for first in (0, 2):  # 300 pages are a line and a bit
        for page, number in enumerate(expected):
            colour = tuple(pixels[first + page // 256, page % 256].tolist())
            assert colour == _survey_report.CLASSES[number][1], (first, page)


def test_classes_have_colours_of_their_own() -> None:
    colours = [colour for _, colour in _survey_report.CLASSES.values()]
    assert len(set(colours)) == len(colours) and list(_survey_report.CLASSES) == list(range(len(colours)))


def program_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "program.py"
    path.write_text(HOLDS + text)
    return path


def test_a_command_is_surveyed_with_its_children_and_passes_its_status_on(tmp_path: Path) -> None:
    """It ends when the report is there, so the survey looked while it lived."""
    report = tmp_path / "report.json"
    program = program_file(
        tmp_path,
        f"""
import pathlib, time
for seed in (3, 4):
    if os.fork() == 0: break
else:
    seed = None
if seed is not None:
    room = Room(); room.put(noise(1, 500)); room.put(noise(seed, 20))
report = pathlib.Path({str(report)!r})
os.write(1, b"its own output\\n")
while not (report.exists() and report.read_text().endswith("}}\\n")): time.sleep(0.05)
if seed is None:
    os.wait(); os.wait()
sys.exit(7)
""",
    )
    done = command("--json", "--output", report, "--settle", "0", "--min-bytes", LEAST, "--", sys.executable, program)
    assert done.returncode == 7, done.stderr
    assert done.stdout == "its own output\n" * 3 and done.stderr == ""
    said = json.loads(report.read_text())
    assert [process["pages_read"] for process in said["processes"]] == [0, 520, 520]
    assert said["ksmrs"]["pages_sharing"] == 500


def test_a_command_that_ends_too_early_says_so() -> None:
    done = command("--", sys.executable, "-c", "print('done'); raise SystemExit(3)")
    assert (done.returncode, done.stdout) == (3, "done\n")
    assert "before it was looked at" in done.stderr and "--after" in done.stderr
    killed = command("--", sys.executable, "-c", "import os; os.kill(os.getpid(), 15)")
    assert killed.returncode == 128 + 15
    assert command("--", "no-such-command-anywhere").returncode == 1


def test_a_signal_asks_for_the_look(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    program = program_file(
        tmp_path,
        f"""
import pathlib, time
room = Room(); room.put(noise(1, 30) * 2)
report = pathlib.Path({str(report)!r})
os.kill(os.getppid(), signal.SIGUSR1)
while not (report.exists() and report.read_text().endswith("}}\\n")): time.sleep(0.05)
""",
    )
    options: list[str | int | Path] = [
        "--json",
        "--output",
        report,
        "--after",
        "3600",
        "--settle",
        "0",
        "--min-bytes",
        LEAST,
    ]
    done = command(*options, "--", sys.executable, program)
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["ksmrs"]["pages_sharing"] == 30


def test_memory_has_stopped_growing_after_two_seconds_of_the_same() -> None:
    growth = _survey_command.Growth()
    assert not growth.has_stopped(0, 0.0), "nothing there is not worth a look"
    assert not growth.has_stopped(1000, 1.0)
    assert not growth.has_stopped(1005, 2.9)
    assert growth.has_stopped(1009, 3.0)
    assert not growth.has_stopped(1011, 3.1), "more than a hundredth"
    assert not growth.has_stopped(1011, 5.0)
    assert growth.has_stopped(1011, 5.2)


def test_options_that_mean_nothing_are_refused() -> None:
    assert "--after is for a command" in command("--after", "1", "1").stderr
    assert "--children is for processes" in command("--children", "--", "true").stderr
    assert "name processes by their numbers" in command("1", "--", "true").stderr
    assert "is not a valid integer" in command("true").stderr, "without -- it is no command"
    assert command().returncode == 2
