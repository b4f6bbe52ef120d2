"""The tables that the command draws for people.

Relies on rich; only the command imports it. Counts and reads nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksmrs._doctor import Finding

COLOURS = {"ok": "green", "limited": "yellow", "missing": "red"}


def show_findings(findings: Iterable[Finding]) -> None:
    """Print what `doctor` found, and after the table what to do about it."""
    table = Table("", "state", "what it means", box=None, pad_edge=False)
    steps = []
    for finding in findings:
        table.add_row(Text(finding.name), Text(finding.state, COLOURS[finding.state]), Text(finding.meaning))
        if finding.next_step:
            steps.append(f"{finding.name}: {finding.next_step}")
    console = Console()
    console.print(table)
    if steps:
        console.print("\nNext steps", style="bold")
        for step in steps:
            console.print(Text(f"  {step}"))
