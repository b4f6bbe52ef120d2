"""The knobs of `/sys/kernel/mm/ksm`, as attributes.

Names, ranges and meaning are those of the kernel's admin-guide/mm/ksm; values are checked by the broker, and a refused
one changes nothing.
"""

from __future__ import annotations

from typing import Generic, TypeVar, overload

from ksmrs import _ksmrs

Value = TypeVar("Value", int, str)


class _Knob(Generic[Value]):
    def __init__(self, kind: type[Value], doc: str) -> None:
        self._kind: type[Value] = kind
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> _Knob[Value]: ...
    @overload
    def __get__(self, owner: Tunables, kind: type) -> Value: ...
    def __get__(self, owner: Tunables | None, kind: type) -> _Knob[Value] | Value:
        if owner is None:
            return self
        return self._kind(_ksmrs.get(self._name))

    def __set__(self, owner: Tunables, value: Value) -> None:
        _ksmrs.set(self._name, str(int(value)) if isinstance(value, bool) else str(value))


class Tunables:
    """One attribute per knob.

    An invalid value is a ValueError, an unknown knob an AttributeError; neither changes anything.
    """

    __slots__ = ()

    run = _Knob(
        int, "0 stops, 1 runs, 2 stops and unmerges everything: setting it returns when that is done, or after 10 s."
    )
    pages_to_scan = _Knob(int, "Pages per batch, over all clients; refused while the advisor sets it.")
    sleep_millisecs = _Knob(int, "Sleep between two batches, in milliseconds.")
    merge_across_nodes = _Knob(int, "Whether pages of different NUMA nodes merge.")
    use_zero_pages = _Knob(int, "Whether pages of zeros need no memory at all.")
    max_page_sharing = _Knob(int, "How many pages one frame serves before a second one is made.")
    stable_node_chains_prune_millisecs = _Knob(
        int, "Kept for scripts that set it; no effect, for a chain loses a frame with the last reference to it."
    )
    split_huge_pages = _Knob(
        int, "Whether less than 2 MiB merges where that splits a huge page; not among the kernel's knobs."
    )
    join_runs = _Knob(
        int, "Whether frames move where that saves kernel mappings; not among the kernel's knobs, which spends none."
    )
    smart_scan = _Knob(int, "Whether pages that never merged are looked at less often.")
    advisor_mode = _Knob(str, "Who sets pages_to_scan: 'none' or 'scan-time'.")
    advisor_max_cpu = _Knob(int, "Percent of one CPU at most, over the broker and all clients.")
    client_max_cpu = _Knob(
        int,
        "Percent of one CPU at most that merging may take in each process in the background; not among the kernel's knobs.",
    )
    advisor_target_scan_time = _Knob(int, "Seconds that one pass should take.")
    advisor_min_pages_to_scan = _Knob(int, "Where the advisor starts.")
    advisor_max_pages_to_scan = _Knob(int, "The advisor's upper limit.")

    def __repr__(self) -> str:
        return f"<ksmrs.tunables: {', '.join(KNOBS)}>"


KNOBS: tuple[str, ...] = tuple(name for name, value in vars(Tunables).items() if isinstance(value, _Knob))

tunables = Tunables()
"""The knobs of the broker that this process is connected to."""
