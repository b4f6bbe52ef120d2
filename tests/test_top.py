"""`ksmrs top`: one table, many tables, a terminal, and the ways to end it."""

from __future__ import annotations

import dataclasses
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO

import pytest

import ksmrs
from children import brokers_in, equal_regions, kill_brokers, wait_for, wait_merged
from ksmrs import _top
from test_cli import command

LINE = [sys.executable, "-m", "ksmrs", "top", "--interval", "0.05"]


def cells(text: str) -> dict[str, list[str]]:
    """The columns of each row, by its name."""
    rows = [[part.strip() for part in line.split("  ") if part.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_once_without_a_broker_says_so_and_starts_none(runtime_dir: Path) -> None:
    assert "no broker is running" in command("top", "--once", "--interval", "0.05")
    assert brokers_in(runtime_dir) == []


def test_once_shows_what_stats_says() -> None:
    regions, _ = equal_regions(256)
    wait_merged(512, *regions)
    ksmrs.tunables.run = 0
    stats = ksmrs.stats()
    rows = cells(command("top", "--once", "--interval", "0.05"))
    assert rows["saved_bytes"] == ["1.0 MiB"]
    assert rows["pages_sharing"] == [f"{stats.pages_sharing:,}"] == ["256"]
    # One column more: nothing merges while run is 0.
    assert rows["merges"] == [f"{stats.merges:,}", "0"]
    assert rows["broker CPU"][1].endswith("%")


STATUS = {
    "pid": 7,
    "release": "0.1.0",
    "uptime_seconds": 3.0,
    "cpu_seconds": 1.5,
    "resident_bytes": 1 << 20,
    "clients": 1,
}


def test_rates_are_those_between_two_looks() -> None:
    before = _top.Look(10.0, STATUS, ksmrs.Stats(merges=100))
    after = _top.Look(12.0, STATUS, ksmrs.Stats(merges=500))
    assert _top.rate(before, after, 100, 500) == 200
    assert _top.rate(before, before, 100, 500) is None, "no time between them"
    assert _top.rate(before, after, 500, 100) is None, "counted anew"
    another = dataclasses.replace(after, status=STATUS | {"pid": 8})
    assert _top.rate(before, another, 100, 500) is None, "another broker"
    gone = dataclasses.replace(before, status=None)
    assert _top.rate(gone, after, 0, 500) is None, "there was none"


def tables(output: IO[str], count: int) -> None:
    """Read until so many tables came."""
    while count:
        line = output.readline()
        assert line, "it ended by itself"
        count -= line.startswith("broker memory")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_a_terminal_tables_follow_until_a_signal(number: signal.Signals) -> None:
    ksmrs.connect()
    with subprocess.Popen(
        LINE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as top:
        assert top.stdout is not None and top.stderr is not None
        tables(top.stdout, 3)
        top.send_signal(number)
        assert top.wait(30) == (0 if number == signal.SIGINT else 128 + signal.SIGTERM)
        assert top.stderr.read() == ""


def test_it_outlives_the_broker(runtime_dir: Path) -> None:
    ksmrs.connect()
    with subprocess.Popen(LINE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as top:
        assert top.stdout is not None
        tables(top.stdout, 2)
        ksmrs.disconnect()
        kill_brokers(runtime_dir)
        while "no broker is running" not in (line := top.stdout.readline()):
            assert line, "it ended by itself"
        ksmrs.connect()
        tables(top.stdout, 2)
        top.send_signal(signal.SIGINT)
        assert top.wait(30) == 0


def test_q_ends_it_and_the_terminal_is_as_before() -> None:
    ksmrs.connect()
    ours, theirs = pty.openpty()
    try:
        before = termios.tcgetattr(theirs)
        environment = {**os.environ, "TERM": "xterm"}
        with subprocess.Popen(LINE, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as top:
            seen = b""
            deadline = time.monotonic() + 60
            while seen.count(b"pages_sharing") < 3:
                assert time.monotonic() < deadline, seen
                if select.select([ours], [], [], 1)[0]:
                    seen += os.read(ours, 1 << 16)
            assert not termios.tcgetattr(theirs)[3] & termios.ICANON, "keys come one by one"
            os.write(ours, b"xq")

            def ended() -> bool:
                # What nobody reads would keep it from ending.
                if select.select([ours], [], [], 0)[0]:
                    os.read(ours, 1 << 16)
                return top.poll() is not None

            wait_for(ended, "the end of top")
            assert top.returncode == 0
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def test_an_interval_is_some_time() -> None:
    assert "Error" in command("top", "--once", "--interval", "0", returncode=2)
