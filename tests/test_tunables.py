"""The knobs: names and ranges of the kernel; nothing changes on an error."""

from __future__ import annotations

from pathlib import Path

import pytest

import ksmrs
from children import brokers_in, run
from ksmrs._tunables import KNOBS


def test_every_knob_can_be_read_and_set_to_what_it_is() -> None:
    ksmrs.tunables.advisor_mode = "none"
    for name in KNOBS:
        value = getattr(ksmrs.tunables, name)
        setattr(ksmrs.tunables, name, value)
        assert getattr(ksmrs.tunables, name) == value


def test_a_knob_keeps_its_value() -> None:
    ksmrs.tunables.sleep_millisecs = 5
    ksmrs.tunables.advisor_mode = "none"
    ksmrs.tunables.pages_to_scan = 2000
    assert (ksmrs.tunables.sleep_millisecs, ksmrs.tunables.pages_to_scan) == (5, 2000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run", 3),
        ("run", -1),
        ("run", "yes"),
        ("pages_to_scan", -5),
        ("pages_to_scan", 2**70),
        ("sleep_millisecs", 1.5),
        ("sleep_millisecs", ""),
        ("max_page_sharing", 1),
        ("use_zero_pages", 2),
        ("advisor_mode", "quick"),
        ("stable_node_chains_prune_millisecs", -1),
        ("stable_node_chains_prune_millisecs", 2**32),
        ("advisor_mode", "[none] scan-time"),
        ("advisor_target_scan_time", 0),
        ("run", None),
    ],
)
def test_an_invalid_value_is_a_value_error_and_changes_nothing(name: str, value: object) -> None:
    ksmrs.tunables.advisor_mode = "none"  # otherwise pages_to_scan is refused whatever it is
    before = {knob: getattr(ksmrs.tunables, knob) for knob in KNOBS}
    with pytest.raises(ValueError, match=name) as raised:
        setattr(ksmrs.tunables, name, value)
    assert isinstance(raised.value, ksmrs.KsmrsError)
    assert {knob: getattr(ksmrs.tunables, knob) for knob in KNOBS} == before


def test_pages_to_scan_is_the_advisors_while_it_is_on() -> None:
    tunables = ksmrs.tunables
    assert (tunables.advisor_mode, tunables.pages_to_scan) == ("scan-time", tunables.advisor_min_pages_to_scan)
    with pytest.raises(ValueError, match=r"pages_to_scan cannot be set .* set advisor_mode=none first"):
        tunables.pages_to_scan = 2000
    assert ksmrs.stats().pages_to_scan == tunables.pages_to_scan == 500
    tunables.advisor_mode = "none"
    assert tunables.pages_to_scan == 1024
    tunables.pages_to_scan = 2000
    assert ksmrs.stats().pages_to_scan == 2000
    tunables.advisor_min_pages_to_scan = 700
    tunables.advisor_mode = "scan-time"
    assert (tunables.pages_to_scan, ksmrs.stats().pages_to_scan) == (700, 700)


def test_the_advisor_follows_what_passes_take() -> None:
    run(
        """
        regions, contents = equal_regions(4096)
        wait_merged(8192, *regions)
        wait_for(lambda: ksmrs.stats().pages_to_scan != 500, "the first advice")
        ksmrs.tunables.advisor_max_pages_to_scan = 123
        wait_for(lambda: ksmrs.stats().pages_to_scan <= 123, "advice within its bound")
        assert ksmrs.stats().pages_to_scan >= 1
        # Merged pages cost next to nothing, and the advisor spends 10 % of a CPU at least.
        ksmrs.tunables.advisor_max_pages_to_scan = 2_000_000
        wait_for(lambda: ksmrs.stats().pages_to_scan > 123, "advice beyond it")
        assert all(bytes(region) == contents.tobytes() for region in regions)
        """
    )


def test_a_merge_on_request_asks_no_advisor() -> None:
    run(
        """
        ksmrs.tunables.advisor_mode = "none"
        ksmrs.tunables.advisor_min_pages_to_scan = 1
        ksmrs.tunables.advisor_max_pages_to_scan = 1
        ksmrs.tunables.advisor_mode = "scan-time"
        # In the background two passes over 8 windows of 512 pages, each 512 batches of 60 s: days.
        ksmrs.tunables.sleep_millisecs = 60_000
        regions, contents = equal_regions(2048)
        report = ksmrs.merge(60)
        assert report.finished and report.pages_merged == 4096, report
        assert (ksmrs.stats().pages_to_scan, ksmrs.tunables.pages_to_scan) == (1, 1)
        """
    )


def test_an_unknown_knob_is_an_attribute_error(runtime_dir: Path) -> None:
    with pytest.raises(AttributeError):
        ksmrs.tunables.pages_to_scam = 1  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = ksmrs.tunables.pages_to_scam  # type: ignore[attr-defined]
    assert brokers_in(runtime_dir) == []


def test_run_2_unmerges_everything_and_1_merges_again(shared: bool) -> None:
    run(
        f"""
        regions, contents = equal_regions(128, {shared})
        wait_merged(256, *regions)
        ksmrs.tunables.run = 2
        wait_for(lambda: merged(*regions) == 0, "unmerging")
        wait_for(lambda: ksmrs.stats().pages_shared == 0, "the release of all frames")
        assert all(bytes(region) == contents.tobytes() for region in regions)
        ksmrs.tunables.run = 1
        wait_merged(256, *regions)
        assert all(bytes(region) == contents.tobytes() for region in regions)
        """
    )
