"""The counters of the domain and of its broker in Prometheus's text exposition format, version 0.0.4.

Names are those of `ksmrs.Stats` behind `ksmrs_`; what only rises is a counter and ends in `_total`. Relies on counters that
were read already, and never reads or serves any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ksmrs._engine import Stats

COUNTERS: dict[str, str] = {
    "pages_skipped": "Pages that smart_scan passed over.",
    "pages_scanned": "Pages looked at.",
    "full_scans": "Passes over all regions; run=2 resets it.",
    "cow_ksm": "Merged pages that were written.",
    "merges": "Pages merged.",
    "pages_migrated": "Pages that followed their frame to another slot.",
    "pages_unmerged_by_budget": "Pages left alone since their client has no kernel mappings to spare.",
    "pages_unmerged_in_huge_pages": "Pages left alone since merging them would have split a huge page.",
    "pages_disbelieved": "Page table words that cannot be true.",
}
"""What a broker counts from its start on, with the HELP line of each."""

GAUGES: dict[str, str] = {
    "pages_shared": "Frames that pages show.",
    "pages_sharing": "Further pages on them: the saving itself.",
    "pages_unshared": "Pages whose content nobody else had.",
    "pages_volatile": "Pages that changed too fast to be candidates.",
    "pages_to_scan": "Pages per batch now.",
    "stable_node_chains": "Contents with more than one frame.",
    "stable_node_dups": "Frames in those chains.",
    "ksm_zero_pages": "Pages of zeros that need no memory.",
    "general_profit": "Bytes saved less bytes of metadata.",
    "saved_bytes": "Bytes of memory that merging saves now.",
    "frames": "Frames in use.",
    "frames_huge": "Extents of frames that were filled whole.",
    "regions": "Regions opted in, over all clients.",
    "clients": "Processes with a connection, the one that asks among them.",
    "clients_unplanned": "Clients that owe an answer for too long and are left out for now.",
    "pages_proposed": "Pages that were offered a frame and have not answered yet.",
    "references_in_limbo": "References to frames that a forked child may still show.",
    "store_bytes": "Memory in the frame store.",
    "metadata_bytes": "Memory of the broker's tables.",
}
"""What it is now, with the HELP line of each."""


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
    for name, value in dataclasses.asdict(stats).items():
        if name in COUNTERS:
            yield _sample(f"{name}_total", "counter", COUNTERS[name], value)
        else:
            yield _sample(name, "gauge", GAUGES[name], value)


def _sample(name: str, kind: Literal["counter", "gauge"], meaning: str, value: float) -> str:
    return f"# HELP ksmrs_{name} {meaning}\n# TYPE ksmrs_{name} {kind}\nksmrs_{name} {value}\n"
