"""The `ksmrs` command: looks at the broker, turns its knobs, shows what merging does.

Relies on the public functions of the package and on click; the demo and rich are imported only for `demo` and tables. The
only part of ksmrs that talks to people.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import click

import ksmrs
from ksmrs import _ksmrs, _process
from ksmrs._tunables import KNOBS


class _Friendly(click.Group):
    """Says what went wrong in one line, where the caller can do something about it."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except ksmrs.KsmrsError as refused:
            raise click.ClickException(str(refused)) from refused


@click.group(cls=_Friendly)
@click.option(
    "--runtime-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the broker's socket; default as in ksmrs.connect().",
)
@click.version_option(package_name="ksmrs")
def main(runtime_dir: Path | None) -> None:
    """Kernel Samepage Merging in user space."""
    if runtime_dir is not None:
        # What the engine reads too; connecting here would start a broker for `status`.
        os.environ["KSMRS_RUNTIME_DIR"] = str(runtime_dir.absolute())


@main.command()
def status() -> None:
    """Say whether a broker runs, and which; exits with 1 where none does."""
    found = _ksmrs.status()
    if found is None:
        click.echo("no broker is running; the first region starts one")
        sys.exit(1)
    for name, value in found.items():
        click.echo(f"{name:<20} {value}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--prometheus", is_flag=True, help="Print them as Prometheus reads them (text format 0.0.4).")
def stat(as_json: bool, prometheus: bool) -> None:
    """Print the counters, under the names of /sys/kernel/mm/ksm."""
    if as_json and prometheus:
        raise click.UsageError("--json and --prometheus are two formats: choose one")
    if prometheus:
        from ksmrs import _prometheus  # noqa: PLC0415 (for this option only)

        click.echo(_prometheus.exposition(_ksmrs.status(), ksmrs.stats()), nl=False)
        return
    counters = dataclasses.asdict(ksmrs.stats())
    if as_json:
        click.echo(json.dumps(counters))
        return
    for name, value in counters.items():
        click.echo(f"{name:<20} {value}")


@main.command()
@click.argument("pid", type=click.IntRange(min=1), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def doctor(pid: int | None, as_json: bool) -> None:
    """Say what the kernel, its limits and the container allow, here or in process PID; exits with 1 if memory cannot merge."""
    from ksmrs import _doctor, _tables  # noqa: PLC0415 (rich, for this command only)

    try:
        findings = _doctor.doctor(pid)
    except OSError as refused:
        raise click.ClickException(f"process {pid}: {refused.strerror}") from refused
    merging = all(finding.state != "missing" for finding in findings)
    if as_json:
        click.echo(json.dumps({"merging": merging, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        _tables.show_findings(findings)
    sys.exit(not merging)


@main.command()
@click.option(
    "--interval", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True, help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Print one table, after one interval.")
def top(interval: float, once: bool) -> None:
    """Show what merging saves and does now, until q or Ctrl-C."""
    from ksmrs import _top  # noqa: PLC0415 (rich, for this command only)

    _top.run(interval, once)


class _BeforeCommand(click.Command):
    """Takes what follows `--` for a command, whatever it looks like."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            context.obj = args[args.index("--") + 1 :]
            args = args[: args.index("--")]
        return super().parse_args(context, args)

    def collect_usage_pieces(self, context: click.Context) -> list[str]:
        return ["[OPTIONS] {PID... | -- COMMAND...}"]


@main.command(cls=_BeforeCommand)
@click.argument("pids", metavar="PID...", nargs=-1, type=click.IntRange(1, (1 << 31) - 1))
@click.option("--children", is_flag=True, help="Descendants of each PID as well; those of a COMMAND always are.")
@click.option("--after", type=click.FloatRange(0), help="Look at the COMMAND after so many seconds.")
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of contents kept.",
)
@click.option(
    "--cpu", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True, help="Share of one CPU used."
)
@click.option("--memory", type=click.IntRange(1, 1 << 20), default=256, show_default=True, help="MiB for its lists.")
@click.option(
    "--settle", type=click.FloatRange(0, 3599), default=1.0, show_default=True, help="Seconds to the second look."
)
@click.option("--min-bytes", type=click.IntRange(0), default=0, help="Pass over mappings smaller than this.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture: a pixel for each page.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report there.")
@click.pass_obj
def survey(  # noqa: PLR0917 (an argument for each option)
    words: list[str] | None,
    pids: tuple[int, ...],
    children: bool,
    after: float | None,
    sample: float,
    cpu: float,
    memory: int,
    settle: float,
    min_bytes: int,
    as_json: bool,
    png: Path | None,
    output: Path | None,
) -> None:
    """Say what merging would save in processes of yours, or in a COMMAND that it starts.

    Nothing changes in them. A COMMAND is looked at when its memory has stopped growing for two seconds, --after SECONDS,
    or when this process gets SIGUSR1; its exit status is passed on, and the report goes to standard error.
    """
    from ksmrs import _survey_main  # noqa: PLC0415 (rich, for this command only)

    wishes = _survey_main.Wishes(sample, cpu, memory << 20, settle, min_bytes, as_json, png, output)
    if bool(words) == bool(pids):
        raise click.UsageError("name processes by their numbers, or a command after --: ksmrs survey -- python app.py")
    if words:
        if children:
            raise click.UsageError("--children is for processes that run; those of a command are looked at anyway")
        sys.exit(_survey_main.command(words, after, wishes))
    if after is not None:
        raise click.UsageError("--after is for a command: ksmrs survey --after 5 -- python app.py")
    _survey_main.processes(list(pids), children, wishes)


@main.command("map")
@click.argument("png", type=click.Path(dir_okay=False, path_type=Path))
def draw_map(png: Path) -> None:
    """Write a picture of all regions of all clients to the file PNG: a pixel for each page, coloured by what it counts as."""
    from ksmrs import _page_map  # noqa: PLC0415 (NumPy and Pillow, for this command only)

    found = _page_map.domain_map()
    if not found:
        click.echo("no region to draw: no broker is running, or nobody opted memory in", err=True)
        sys.exit(1)
    try:
        _page_map.draw_regions(found).save(png, format="PNG")
    except ImportError as missing:
        raise click.ClickException(str(missing)) from missing
    except OSError as refused:
        raise click.ClickException(f"{png}: {refused.strerror}") from refused
    clients = len({region.client for region in found})
    pages = sum(len(region.classes) for region in found)
    click.echo(f"{png}: {pages:,} pages of {len(found)} regions of {clients} clients")


@main.command("set")
@click.argument("assignment", metavar="KNOB=VALUE")
def set_knob(assignment: str) -> None:
    """Turn one knob of the broker."""
    knob, equals, value = assignment.partition("=")
    if not equals:
        raise click.BadParameter(f"{assignment!r} is not KNOB=VALUE, as in run=1")
    if knob not in KNOBS:
        raise click.BadParameter(f"no knob {knob!r}; there are {', '.join(KNOBS)}")
    _ksmrs.set(knob, value)
    click.echo(f"{knob}={_ksmrs.get(knob)}")


@main.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--min-size",
    type=click.IntRange(min=ksmrs.PAGE_SIZE),
    metavar="N",
    help="Bytes of the smallest array that takes part; default 65536.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(min_size: int | None, command: tuple[str, ...]) -> None:
    """Run a program whose NumPy arrays merge, and all Python programs that it starts: `ksmrs run -- python app.py`."""
    os.environ[_process.VARIABLE] = "1"
    if min_size is not None:
        os.environ[_process.SIZE_VARIABLE] = str(min_size)
    try:
        os.execvp(command[0], command)
    except OSError as refused:
        # As a shell has it.
        click.echo(f"ksmrs: {command[0]}: {refused.strerror}", err=True)
        sys.exit(127 if isinstance(refused, FileNotFoundError) else 126)


@main.command()
@click.option("--workers", type=click.IntRange(2, 64), default=4, show_default=True, help="Processes.")
@click.option("--mb", type=click.IntRange(1, 65536), default=96, show_default=True, help="MiB of files in each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def demo(workers: int, mb: int, as_json: bool) -> None:
    """Merge the files of the Python installation in several processes, and show what it saves."""
    from ksmrs import _demo  # noqa: PLC0415 (rich, for this command only)

    sys.exit(_demo.run(workers, mb, as_json))


@main.command()
@click.pass_context
def broker(context: click.Context) -> None:
    """Run a broker in the foreground, as a service manager wants it, until it was idle for a minute."""
    # Python would only note the signal, and look at it when the broker returns.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    assert context.parent is not None
    try:
        _ksmrs.run_broker(context.parent.params["runtime_dir"])
    except RuntimeError as refused:
        raise click.ClickException(str(refused)) from refused
