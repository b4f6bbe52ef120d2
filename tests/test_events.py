"""`ksmrs.events`: what it tells adds up to what the counters say, whenever somebody looks."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

import ksmrs
from children import equal_regions, kill_brokers, run, wait_for, wait_merged
from ksmrs import _events


def total(events: list[ksmrs.Event]) -> Counter[tuple[str, str]]:
    counted: Counter[tuple[str, str]] = Counter()
    for event in events:
        assert event.count > 0
        assert event.seconds >= 0
        counted[event.whose, event.counter] += event.count
    return counted


def test_a_block_is_summed_up(shared: bool) -> None:
    before = ksmrs.process_stats()
    with ksmrs.events() as seen:
        regions, _ = equal_regions(64, shared)
        wait_merged(128, *regions)
        ksmrs.tunables.run = 0
    found = list(seen)
    assert list(seen) == [], "told once"
    assert {event.kind for event in found if event.counter == "merges"} == {"merged"}
    counted = total(found)
    # Statics of this process: other tests merged before.
    assert counted["process", "merges"] == ksmrs.process_stats().merges - before.merges >= 128
    assert counted["domain", "merges"] == ksmrs.stats().merges >= 128


def test_writes_are_told(shared: bool) -> None:
    regions, _ = equal_regions(64, shared)
    wait_merged(128, *regions)
    before, breaks = ksmrs.stats().cow_ksm, ksmrs.process_stats().breaks
    with ksmrs.events() as seen:
        memoryview(regions[0])[63 * 4096] ^= 0xFF
        wait_for(
            lambda: bool(ksmrs.merge(5)) and ksmrs.stats().cow_ksm > before and ksmrs.process_stats().breaks > breaks,
            "the write to be seen",
        )
        ksmrs.tunables.run = 0
    found = list(seen)
    assert {event.kind for event in found if event.counter in {"cow_ksm", "breaks"}} == {"broken"}
    counted = total(found)
    assert counted["domain", "cow_ksm"] == ksmrs.stats().cow_ksm - before >= 1
    assert counted["process", "breaks"] == ksmrs.process_stats().breaks - breaks >= 1


def test_who_waits_is_told_as_it_happens_until_the_end() -> None:
    seen = ksmrs.events(interval=0.01)
    before = ksmrs.process_stats().merges
    found: list[ksmrs.Event] = []
    waits = threading.Thread(target=lambda: found.extend(seen))
    waits.start()
    regions, _ = equal_regions(64)
    wait_merged(128, *regions)
    wait_for(lambda: total(list(found))["process", "merges"] >= 128, "events while it waits")
    more, _ = equal_regions(64, seed=2)
    wait_merged(128, *more)
    ksmrs.tunables.run = 0
    seen.close()
    seen.close()
    waits.join(30)
    assert not waits.is_alive()
    assert total(found)["process", "merges"] == ksmrs.process_stats().merges - before
    assert len({id(event) for event in found if (event.whose, event.counter) == ("process", "merges")}) >= 2


def test_a_new_broker_counts_anew(runtime_dir: Path) -> None:
    regions, _ = equal_regions(64)
    wait_merged(128, *regions)
    before = ksmrs.process_stats().merges
    with ksmrs.events() as seen:
        kill_brokers(runtime_dir)
        for region in regions:
            region.close()
        regions, _ = equal_regions(16)
        wait_merged(32, *regions)
        ksmrs.tunables.run = 0
    counted = total(list(seen))
    assert counted["process", "merges"] == ksmrs.process_stats().merges - before >= 32
    assert counted["domain", "merges"] == ksmrs.stats().merges >= 32


def test_rises() -> None:
    assert _events.rises({"a": 1, "b": 5}, {"a": 3, "b": 5}) == {"a": 2}
    assert _events.rises({"a": 1, "b": 5}, {"a": 3, "b": 0}) == {"a": 3}, "another broker"
    assert _events.rises({"a": 1, "b": 5}, {"a": 0, "b": 0}) == {}, "none"


def test_memory_that_does_not_merge_is_told_once() -> None:
    run(
        """
        region = ksmrs.Region(16 * 4096, name=f"/ksmrs-events-{os.getpid()}")
        import posix_ipc
        try:
            with ksmrs.events(interval=0.01) as seen:
                other = posix_ipc.SharedMemory(region.name)  # who has it open keeps it from merging
                wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().not_merging, "the reason")
            (told,) = (event for event in seen if event.counter == "not_merging")
            assert (told.kind, told.whose, told.count) == ("refused", "process", 1), told
            assert told.reason in ksmrs.process_stats().not_merging
            other.close_fd()
        finally:
            posix_ipc.unlink_shared_memory(region.name)
        """
    )


def test_nothing_is_started(runtime_dir: Path) -> None:
    with ksmrs.events() as seen:
        pass
    assert list(seen) == []
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf")])
def test_an_interval_is_some_time(interval: float) -> None:
    with pytest.raises(ksmrs.ArgumentError, match="interval"):
        ksmrs.events(interval)
