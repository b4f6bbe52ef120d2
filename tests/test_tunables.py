"""The knobs: names and ranges of the kernel; nothing changes on an error."""

from __future__ import annotations

from pathlib import Path

import pytest

import ksmrs
from children import brokers_in, run
from ksmrs._tunables import KNOBS


def test_every_knob_can_be_read_and_set_to_what_it_is() -> None:
    for name in KNOBS:
        value = getattr(ksmrs.tunables, name)
        setattr(ksmrs.tunables, name, value)
        assert getattr(ksmrs.tunables, name) == value


def test_a_knob_keeps_its_value() -> None:
    ksmrs.tunables.sleep_millisecs = 5
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
        ("run", None),
    ],
)
def test_an_invalid_value_is_a_value_error_and_changes_nothing(name: str, value: object) -> None:
    before = {knob: getattr(ksmrs.tunables, knob) for knob in KNOBS}
    with pytest.raises(ValueError, match=name) as raised:
        setattr(ksmrs.tunables, name, value)
    assert isinstance(raised.value, ksmrs.KsmrsError)
    assert {knob: getattr(ksmrs.tunables, knob) for knob in KNOBS} == before


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
