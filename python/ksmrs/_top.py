"""`ksmrs top`: what merging saves and does now, drawn again and again.

Relies on the broker's answers to `status` and `stats`, two looks for each rate, and on rich. Starts no broker, and waits
for one where none runs. Turns nothing.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

import ksmrs
from ksmrs import _ksmrs

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Look:
    """What the broker said at a moment."""

    seconds: float
    """Of a clock that never goes back."""
    status: dict[str, Any] | None
    """None where no broker was running."""
    stats: ksmrs.Stats


def look() -> Look:
    """Ask the broker, if there is one."""
    status = _ksmrs.status()
    return Look(time.monotonic(), status, ksmrs.stats() if status is not None else ksmrs.Stats())


def rate(before: Look, after: Look, count_before: float, count_after: float) -> float | None:
    """Events per second between two looks; None where it cannot be known: no broker, another one, a count that began anew."""
    if before.status is None or after.status is None or before.status["pid"] != after.status["pid"]:
        return None
    if after.seconds <= before.seconds or count_after < count_before:
        return None
    return (count_after - count_before) / (after.seconds - before.seconds)


def look_again() -> Look:
    """The same, but a broker that ends while it is asked is none."""
    try:
        return look()
    except ksmrs.KsmrsError:
        return Look(time.monotonic(), None, ksmrs.Stats())


def table(before: Look, after: Look) -> Table | str:
    """Draw what two looks say: values of the later one, rates between them."""
    status, now = after.status, after.stats
    if status is None:
        return "no broker is running; the first region starts one"
    title = f"broker {status['pid']}, release {status['release']}, up {status['uptime_seconds']:.0f} s"
    drawn = Table("", title=title, title_justify="left", box=None, pad_edge=False)
    drawn.add_column("now", justify="right")
    drawn.add_column("per second", justify="right")

    def row(name: str, value: str, events: tuple[str, ...] = ()) -> None:
        count_before, count_after = (sum(getattr(seen.stats, event) for event in events) for seen in (before, after))
        found = rate(before, after, count_before, count_after)
        drawn.add_row(name, value, "" if not events else "-" if found is None else f"{found:,.0f}")

    row("clients", f"{now.clients:,}")
    row("regions", f"{now.regions:,}")
    row("saved_bytes", f"{now.saved_bytes / MIB:,.1f} MiB")
    row("general_profit", f"{now.general_profit / MIB:,.1f} MiB")
    for name in ("pages_shared", "pages_sharing", "ksm_zero_pages", "pages_unshared", "pages_volatile"):
        row(name, f"{getattr(now, name):,}")
    for name in ("merges", "cow_ksm", "pages_scanned", "pages_skipped"):
        row(name, f"{getattr(now, name):,}", (name,))
    refused = ("pages_unmerged_by_budget", "pages_unmerged_in_huge_pages")
    row("left alone", f"{sum(getattr(now, name) for name in refused):,}", refused)
    row("full_scans", f"{now.full_scans:,}")
    cpu_before = 0.0 if before.status is None else before.status["cpu_seconds"]
    cpu = rate(before, after, cpu_before, status["cpu_seconds"])
    drawn.add_row("broker CPU", f"{status['cpu_seconds']:.1f} s", "-" if cpu is None else f"{100 * cpu:.1f} %")
    row("broker memory", f"{status['resident_bytes'] / MIB:,.1f} MiB")
    return drawn


def run(interval: float, once: bool) -> None:
    """Draw until `q`, Ctrl-C or, with `once`, after one interval; where no terminal is, one table after the other."""
    console = Console()
    before = look()
    if once:
        time.sleep(interval)
        console.print(table(before, look_again()))
        return
    # Else the terminal would keep what `_keys` made of it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with suppress(KeyboardInterrupt), _keys() as keys:
        if not console.is_terminal:
            while not _quits(keys, interval):
                after = look_again()
                console.print(table(before, after))
                before = after
            return
        with Live(table(before, before), console=console, auto_refresh=False) as live:
            while not _quits(keys, interval):
                after = look_again()
                live.update(table(before, after), refresh=True)
                before = after


@contextmanager
def _keys() -> Iterator[int | None]:
    """Have the terminal give out keys one by one; None where standard input is no terminal."""
    if not sys.stdin or not sys.stdin.isatty():
        yield None
        return
    fd = sys.stdin.fileno()
    previous = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, previous)


def _quits(keys: int | None, seconds: float) -> bool:
    """Wait, and say whether somebody wants it to end."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if keys is None:
            time.sleep(left)
        elif select.select([keys], [], [], left)[0] and os.read(keys, 1) in {b"q", b"Q", b""}:
            return True
    return False
