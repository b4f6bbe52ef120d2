"""Runs the oracle for KSMRS_ORACLE_SECONDS (60): four processes, two writers each, brokers killed, objects opened."""

from __future__ import annotations

import os

import pytest

import oracle

SECONDS = float(os.environ.get("KSMRS_ORACLE_SECONDS", "60"))


@pytest.mark.oracle
@pytest.mark.timeout(SECONDS + 240)
def test_no_byte_is_ever_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    report = oracle.conduct(SECONDS)
    with capsys.disabled():
        print(f"\noracle: {report}")
    assert report["verified"] > 1000 * SECONDS
    # An oracle in which nothing merges proves nothing.
    assert report["merged_most"] > oracle.PAGES
    assert report["opened_by_outsiders"] > SECONDS / 10
    assert report["brokers_killed"] >= (2 if SECONDS >= 20 else 0)


def test_the_oracle_sees_one_wrong_byte() -> None:
    field = oracle.Field(oracle.REGIONS[0], oracle.make_contents())
    field.write(7, 1, 9, 0, oracle.HALF)
    memoryview(field.region)[7 * oracle.PAGE + oracle.HALF + 100] ^= 1
    with pytest.raises(oracle.Wrong, match="page 7, half 1, byte 100"):
        field.check(7, 1)
    with pytest.raises(oracle.Wrong):
        field.write(7, 1, 10, 0, oracle.HALF)
