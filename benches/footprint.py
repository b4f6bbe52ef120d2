"""What memory a merge gives back, all told: gross, and net of everything that merging itself takes.

Gross is pages_sharing, in bytes: the kernel's own figure for the saving. Net is the data that processes hold less what
holding it takes once all is merged: what each process grew by since before it had any (PSS; frames and page tables of ksmrs
count where they are mapped), what its page tables grew by while merging, a vm_area_struct for each mapping more, the whole of
the broker, frames of the store that no process maps; in kernel KSM a ksm_rmap_item per page and a stable node per frame, 64
bytes each. All of it belongs to the processes at hand, so that what else the machine does is not in it. Slab and MemAvailable,
in which it is, are given beside it. Relies on /proc; the size of a vm_area_struct is read as root, and is the usual 192 bytes
otherwise. Changes nothing.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
MIB = 1 << 20
ITEM = 64
"""Bytes of a ksm_rmap_item, and of a ksm_stable_node."""
MAPPING = 192
HUGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")


def fields(path: str) -> dict[str, int]:
    """The figures of a file of /proc that has one a line, with a colon, in bytes."""
    found = {}
    for line in Path(path).read_text().splitlines():
        name, colon, value = line.partition(":")
        words = value.split()
        if colon and words and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


@dataclass(frozen=True)
class Footprint:
    """What one process takes, or several do, in bytes, but for `mappings`."""

    pss: int
    page_tables: int
    mappings: int
    huge: int
    rmap_items: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __sub__(self, other: Footprint) -> Footprint:
        return Footprint(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))


def together(footprints: Iterable[Footprint]) -> Footprint:
    return sum(footprints, Footprint(0, 0, 0, 0))


def of(pid: int | str = "self") -> Footprint:
    """What a process takes now. Of this one, after what it freed went back to the kernel."""
    if pid == "self":
        ctypes.CDLL(None).malloc_trim(0)
    rollup = fields(f"/proc/{pid}/smaps_rollup")
    ksm = Path(f"/proc/{pid}/ksm_stat")
    items = dict(line.split(maxsplit=1) for line in ksm.read_text().splitlines()) if ksm.exists() else {}
    return Footprint(
        rollup["Pss"],
        fields(f"/proc/{pid}/status")["VmPTE"],
        len(Path(f"/proc/{pid}/maps").read_text().splitlines()),
        sum(rollup.get(name, 0) for name in HUGE),
        int(items.get("ksm_rmap_items", 0)) * ITEM,
    )


def store(broker: int) -> int:
    """Bytes of memory that the frame stores of a broker hold."""
    held = 0
    for link in Path(f"/proc/{broker}/fd").iterdir():
        # What it opens only for a moment may be closed by now.
        with suppress(FileNotFoundError):
            if os.readlink(link).startswith("/memfd:ksmrs-store"):
                held += link.stat().st_blocks * 512
    return held


def vm_area_struct() -> int:
    """Bytes of one."""
    try:
        lines = Path("/proc/slabinfo").read_text().splitlines()
    except PermissionError:
        return MAPPING
    return next((int(line.split()[3]) for line in lines if line.startswith("vm_area_struct ")), MAPPING)


def machine() -> dict[str, int]:
    """What the whole machine has, as far as merging could show there."""
    memory = fields("/proc/meminfo")
    return {name: memory[name] for name in ("MemAvailable", "Slab", "PageTables")}


@dataclass(frozen=True)
class Footprints:
    """What all processes take together at three times."""

    empty: Footprint
    filled: Footprint
    merged: Footprint


def net(data: int, of_all: Footprints, sharing: int, shared: int, broker: int | None) -> dict[str, float]:
    """What merging so many bytes saved, in MiB; `sharing` and `shared` are the counters, in pages."""
    start, before, after = of_all.empty, of_all.filled, of_all.merged
    engine, unmapped = together(()), 0
    if broker is not None:
        engine, unmapped = of(broker), max(0, store(broker) - shared * PAGE)
    grown = after - before
    taken = {
        "processes": after.pss - start.pss,
        "page_tables": grown.page_tables,
        "mappings": grown.mappings * vm_area_struct(),
        "broker": engine.pss + engine.page_tables,
        "unmapped_frames": unmapped,
        "rmap_items": after.rmap_items + (shared * ITEM if broker is None else 0),
    }
    return {
        "gross_saved_mib": sharing * PAGE / MIB,
        "net_saved_mib": (data - sum(taken.values())) / MIB,
        "page_tables_mib": taken["page_tables"] / MIB,
        "mappings_mib": taken["mappings"] / MIB,
        "mappings_added": grown.mappings,
        "broker_mib": taken["broker"] / MIB,
        "unmapped_frames_mib": unmapped / MIB,
        "rmap_items_mib": taken["rmap_items"] / MIB,
        "huge_before_mib": before.huge / MIB,
        "huge_after_mib": after.huge / MIB,
    }
