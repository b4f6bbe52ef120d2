"""Connecting, merging on request, and the counters.

Relies on `_ksmrs` for the conversation with the broker. Counters have the names and the arithmetic of
`/sys/kernel/mm/ksm`; the dataclasses say what each counts.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ksmrs import _adopt, _ksmrs, _launch, _process
from ksmrs._errors import ArgumentError

Counters = TypeVar("Counters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What the broker counts in this process's domain; all zeros where no broker runs."""

    pages_shared: int = 0
    """Frames that pages show."""
    pages_sharing: int = 0
    """Further pages on them: the saving itself."""
    pages_unshared: int = 0
    """Candidates: pages whose content nobody else had."""
    pages_volatile: int = 0
    """Pages that changed too fast to be candidates."""
    pages_skipped: int = 0
    """Pages that smart_scan passed over."""
    pages_scanned: int = 0
    """Pages looked at, ever."""
    pages_scanned_again: int = 0
    """Pages looked at once more before their pass was over, ever; pages_scanned has them too."""
    full_scans: int = 0
    """Passes over all regions."""
    pages_to_scan: int = 0
    """Pages per batch now, as the advisor or whoever set the knob has it."""
    stable_node_chains: int = 0
    """Contents with more than one frame, since max_page_sharing was hit."""
    stable_node_dups: int = 0
    """Frames in those chains."""
    ksm_zero_pages: int = 0
    """Pages of zeros that need no memory."""
    general_profit: int = 0
    """Bytes saved less bytes of metadata, as the kernel counts it."""
    cow_ksm: int = 0
    """Merged pages that were written."""
    saved_bytes: int = 0
    """Bytes of memory that merging saves now."""
    frames: int = 0
    """Frames in use."""
    frames_huge: int = 0
    """Extents of frames that were filled whole, as huge pages, and still are."""
    frames_huge_declined: int = 0
    """Extents of frames that were filled whole and that the kernel did not make huge pages, ever; `ksmrs status` says why."""
    regions: int = 0
    """Regions opted in, over all clients."""
    clients: int = 0
    """Processes with a connection."""
    clients_at_max_cpu: int = 0
    """Clients of which nothing is asked for a moment, since they took their share of CPU time (`client_max_cpu`)."""
    clients_unplanned: int = 0
    """Clients that owe an answer for too long and are left out for now."""
    pages_proposed: int = 0
    """Pages that were offered a frame and have not answered yet."""
    merges: int = 0
    """Pages merged, ever."""
    pages_migrated: int = 0
    """Pages that followed their frame to another slot, so that runs join, ever."""
    pages_unmerged_by_budget: int = 0
    """Pages left alone since their client has no kernel mappings to spare, ever."""
    pages_unmerged_in_huge_pages: int = 0
    """Pages left alone since merging them would have split a huge page (`split_huge_pages` is 0), counted at each try."""
    regions_rested: int = 0
    """Times that nothing more of a region was merged for 0.25 to 16 s, since what merged was written again at once, ever."""
    pages_disbelieved: int = 0
    """Page table words that cannot be true, ever: a damaged or lying client."""
    references_in_limbo: int = 0
    """References to frames that a forked child may still show."""
    store_bytes: int = 0
    """Memory in the frame store, by st_blocks."""
    metadata_bytes: int = 0
    """Memory of the broker's tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStats:
    """What the broker and this process count for this process."""

    ksm_rmap_items: int = 0
    """Pages that the broker keeps track of."""
    ksm_merging_pages: int = 0
    """Pages that show a frame."""
    ksm_zero_pages: int = 0
    """Pages of zeros that need no memory."""
    ksm_process_profit: int = 0
    """Bytes saved less bytes of metadata, as the kernel counts it."""
    cpu_milliseconds: int = 0
    """CPU time that scanning and merging took in this process since it connected."""
    times_at_max_cpu: int = 0
    """Times that it was asked nothing for a while, for it had taken `client_max_cpu` percent of one CPU."""
    merges: int = 0
    """Pages of this process that were merged, ever."""
    breaks: int = 0
    """Merged pages of this process that were written and have memory of their own again, ever. In private regions the kernel
    copies and tells nobody: such a page counts when a scan finds it."""
    adopted_bytes: int = 0
    """Memory that this program made and opted in."""
    out_of_phase_bytes: int = 0
    """How much of it belongs to buffers that begin within a page; it merges only with buffers that begin likewise."""
    not_merging: tuple[str, ...] = ()
    """Shared memory that does not merge now, and why: one sentence for each."""
    dirty_tracking: str = "off: no region yet"
    """`on` where pages that nobody writes are not read again and again, else `off:` and why."""
    numpy_allocator: str = "off"
    """Whose new arrays live in mergeable memory, since `merge_process`: `every thread`, or what it reaches; else `off`."""
    numpy_bytes: int = 0
    """Bytes of those arrays."""
    numpy_mergeable_bytes: int = 0
    """How much of their memory takes part; the rest has not outlived a pass yet."""
    numpy_kept_bytes: int = 0
    """Memory of arrays that are gone, kept for the next ones: twice the largest, 64 MiB at most, until nothing comes for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What one `merge()` did."""

    pages_merged: int = 0
    """Pages merged while it ran."""
    rounds: int = 0
    """Rounds over all clients; the last one merged nothing."""
    finished: bool = False
    """False where the timeout ended it."""
    seconds: float = 0.0
    """How long it took."""


def connect(
    runtime_dir: str | os.PathLike[str] | None = None,
    embedded: bool = False,
    domain: str = "default",
    dirty_tracking: bool | None = None,
) -> None:
    """Connect to the user's broker, starting one where none runs. Not needed: the first region does it.

    `runtime_dir` is the directory of the broker's socket (default: $KSMRS_RUNTIME_DIR, else $XDG_RUNTIME_DIR/ksmrs, else
    $TMPDIR/ksmrs-UID); it must be ours alone. `embedded` runs the broker inside this process. Pages merge only within one
    `domain`. `dirty_tracking` lets the kernel keep track of which pages are written, so that others are not read again
    (default: yes, unless $KSMRS_DIRTY_TRACKING is 0); `process_stats().dirty_tracking` says whether it does. Raises
    `BrokerError` where it cannot be reached or this process is connected differently already.
    """
    if not domain:
        raise ArgumentError("domain is empty: name a trust zone, or leave it out")
    directory = None if runtime_dir is None else str(Path(runtime_dir).absolute())
    tracks = _launch.dirty_tracking_wanted() if dirty_tracking is None else bool(dirty_tracking)
    _ksmrs.configure(directory, bool(embedded), domain, _launch.broker_command(directory), tracks)
    _ksmrs.connect()


def disconnect() -> None:
    """Say goodbye to the broker. Merged pages stay merged and keep their contents; merging ends until `connect`."""
    _ksmrs.disconnect()


def merge(timeout: float | None = None) -> MergeReport:
    """Scan and merge now, over all clients of the domain, until a round merges nothing or `timeout` seconds are over.

    Other threads run meanwhile, and Ctrl-C is obeyed; what was merged by then stays merged.
    """
    if timeout is not None and not (math.isfinite(timeout) and timeout >= 0):
        raise ArgumentError(f"timeout {timeout}: must be a number of seconds, 0 or more, or None")
    return _counters(MergeReport, _ksmrs.merge(timeout))


def stats() -> Stats:
    """Return the counters of the domain; never starts a broker."""
    return _counters(Stats, _ksmrs.stats())


def process_stats() -> ProcessStats:
    """Return the counters of this process; never starts a broker."""
    adopted, out_of_phase = _adopt.bytes_now()
    _, numpy_bytes, mergeable, kept = _ksmrs.heap_bytes()
    own = {
        "adopted_bytes": adopted,
        "out_of_phase_bytes": out_of_phase,
        "not_merging": tuple(_ksmrs.not_merging()),
        "dirty_tracking": _ksmrs.dirty_tracking(),
        "numpy_allocator": _process.reaches(),
        "numpy_bytes": numpy_bytes,
        "numpy_mergeable_bytes": mergeable,
        "numpy_kept_bytes": kept,
    }
    return _counters(ProcessStats, _ksmrs.process_stats() | own)


def _counters(kind: type[Counters], values: dict[str, Any]) -> Counters:
    # A broker of the same protocol may count more than this package knows of, and less.
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in known})
