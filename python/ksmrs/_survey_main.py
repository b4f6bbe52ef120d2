"""What `ksmrs survey` does with its options: surveys, and puts the report where it belongs.

Relies on `_survey.py` for the figures, `_survey_command.py` for a command's life, `_survey_report.py` for the looks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from ksmrs import _survey, _survey_command, _survey_report
from ksmrs._errors import KsmrsError


@dataclass(frozen=True, slots=True)
class Wishes:
    """The options that both ways of calling it have."""

    sample: float
    cpu: float
    memory: int
    settle: float
    min_bytes: int
    as_json: bool
    png: Path | None
    output: Path | None


def processes(pids: list[int], children: bool, wishes: Wishes) -> None:
    """Survey processes that run already."""
    if children:
        pids = [member for pid in pids for member in (_survey_command.family(pid) or [pid])]
    _report(_look(pids, wishes), wishes, to_people_aside=False)


def command(words: Sequence[str], after: float | None, wishes: Wishes) -> int:
    """Survey a command; the exit status to pass on."""

    def look(pids: list[int]) -> None:
        # Whatever became of the survey, the command goes on and its exit status counts.
        try:
            _report(_look(pids, wishes), wishes, to_people_aside=True)
        except (KsmrsError, ImportError, OSError) as refused:
            missed(str(refused))

    def missed(reason: str) -> None:
        click.echo(f"ksmrs survey: {reason}", err=True)

    return _survey_command.run(words, after, look, missed)


def _look(pids: list[int], wishes: Wishes) -> _survey.Survey:
    with _survey_report.bar() as progress:
        return _survey.survey(
            pids,
            sample=wishes.sample,
            cpu=wishes.cpu,
            memory=wishes.memory,
            settle=wishes.settle,
            min_bytes=wishes.min_bytes,
            progress=progress,
        )


def _report(found: _survey.Survey, wishes: Wishes, *, to_people_aside: bool) -> None:
    stream = wishes.output.open("w") if wishes.output is not None else sys.stderr if to_people_aside else sys.stdout
    try:
        if wishes.as_json:
            click.echo(json.dumps(found.as_dict()), file=stream)
        else:
            _survey_report.show(found, Console(file=stream))
    finally:
        if wishes.output is not None:
            stream.close()
    if wishes.png is not None:
        try:
            _survey_report.picture(found, wishes.png)
        except ImportError as missing:
            raise click.ClickException(str(missing)) from missing
