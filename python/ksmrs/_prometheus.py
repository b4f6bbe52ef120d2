"""The counters of the domain and of its broker in Prometheus's text exposition format, version 0.0.4.

Names are those of `ksmrs.Stats` behind `ksmrs_`; what only rises is a counter and ends in `_total`. Relies on counters that
were read already, and never reads or serves any.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ksmrs._engine import Stats

COUNTERS = {
    "pages_skipped",
    "pages_scanned",
    "pages_scanned_again",
    "full_scans",
    "cow_ksm",
    "merges",
    "pages_migrated",
    "pages_unmerged_by_budget",
    "pages_unmerged_in_huge_pages",
    "regions_rested",
    "pages_disbelieved",
}
"""What a broker counts from its start on; all else is what it is now."""


def meanings() -> dict[str, str]:
    """Return what is written under each field of `Stats`: its HELP line."""
    (declared,) = ast.parse(inspect.getsource(Stats)).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(declared.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                found[name] = " ".join(said.split())
    return found


def exposition(status: Mapping[str, Any] | None, stats: Stats) -> str:
    """Return the text: `status` as the broker answered, or None where there is none."""
    return "".join(_samples(status, stats))


def _samples(status: Mapping[str, Any] | None, stats: Stats) -> Iterator[str]:
    yield _sample("broker_up", "gauge", "Whether a broker is running.", int(status is not None))
    if status is not None:
        yield _sample("broker_cpu_seconds_total", "counter", "CPU time of the broker.", status["cpu_seconds"])
        yield _sample("broker_resident_bytes", "gauge", "Resident memory of the broker.", status["resident_bytes"])
        yield _sample(
            "broker_uptime_seconds", "gauge", "How long the broker has been running.", status["uptime_seconds"]
        )
    explained = meanings()
    for name, value in dataclasses.asdict(stats).items():
        if name in COUNTERS:
            yield _sample(f"{name}_total", "counter", explained[name], value)
        else:
            yield _sample(name, "gauge", explained[name], value)


def _sample(name: str, kind: Literal["counter", "gauge"], meaning: str, value: float) -> str:
    return f"# HELP ksmrs_{name} {meaning}\n# TYPE ksmrs_{name} {kind}\nksmrs_{name} {value}\n"
