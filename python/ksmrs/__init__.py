"""Kernel Samepage Merging in user space: the Python face.

Relies on the extension module `_ksmrs` for everything that touches memory or the broker. Importing it starts nothing: no
broker, no thread, no NumPy; those come with the first region, array or knob that needs them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ksmrs import _ksmrs, _launch, _process
from ksmrs._advice import MADV_MERGEABLE, MADV_UNMERGEABLE, madvise, pinned
from ksmrs._engine import MergeReport, ProcessStats, Stats, connect, disconnect, merge, process_stats, stats
from ksmrs._errors import (
    ArgumentError,
    BrokerError,
    ClosedRegionError,
    DtypeError,
    ForeignMemoryError,
    KsmrsError,
    NameExistsError,
    PinnedError,
    SystemCallError,
    UnknownKnobError,
    UnsupportedError,
)
from ksmrs._events import Event, events
from ksmrs._process import merge_process, worker_init
from ksmrs._region import PAGE_SIZE, PageState, Region, RegionStats
from ksmrs._tunables import tunables

if TYPE_CHECKING:
    from ksmrs._arrays import array, empty, full, zeros
    from ksmrs._doctor import Finding, doctor
    from ksmrs._page_map import page_map
    from ksmrs._survey import Survey, survey

_launch.configure_default()
# A child of os.fork(), multiprocessing's among them, goes on merging with what it inherited.
os.register_at_fork(after_in_child=_ksmrs.born)
_process.from_environment()

__all__ = [
    "MADV_MERGEABLE",
    "MADV_UNMERGEABLE",
    "PAGE_SIZE",
    "ArgumentError",
    "BrokerError",
    "ClosedRegionError",
    "DtypeError",
    "Event",
    "Finding",
    "ForeignMemoryError",
    "KsmrsError",
    "MergeReport",
    "NameExistsError",
    "PageState",
    "PinnedError",
    "ProcessStats",
    "Region",
    "RegionStats",
    "Stats",
    "Survey",
    "SystemCallError",
    "UnknownKnobError",
    "UnsupportedError",
    "array",
    "connect",
    "disconnect",
    "doctor",
    "empty",
    "events",
    "full",
    "madvise",
    "merge",
    "merge_process",
    "page_map",
    "pinned",
    "process_stats",
    "stats",
    "survey",
    "tunables",
    "worker_init",
    "zeros",
]


def __getattr__(name: str) -> Any:
    # The array constructors need NumPy, which takes 100 ms and 20 MiB to import: only for those who use them.
    if name in {"empty", "zeros", "full", "array"}:
        from ksmrs import _arrays

        return getattr(_arrays, name)
    # Asked for rarely, and the interpreter has to load what they read with.
    if name in {"Finding", "doctor"}:
        from ksmrs import _doctor

        return getattr(_doctor, name)
    if name in {"Survey", "survey"}:
        from ksmrs import _survey

        return getattr(_survey, name)
    if name == "page_map":
        from ksmrs import _page_map

        return _page_map.page_map
    raise AttributeError(f"module 'ksmrs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
