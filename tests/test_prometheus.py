"""`ksmrs stat --prometheus`, as Prometheus's own parser reads it."""

from __future__ import annotations

import dataclasses

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

import ksmrs
from children import equal_regions, wait_for, wait_merged
from ksmrs import _prometheus
from test_cli import command


def families(text: str) -> dict[str, Metric]:
    found = {family.name: family for family in text_string_to_metric_families(text)}
    for family in found.values():
        assert family.name.startswith("ksmrs_")
        assert family.documentation.endswith(".")
        assert len(family.samples) == 1, family
    return found


def value(text: str, name: str) -> float:
    return float(families(text)[name].samples[0].value)


def test_every_counter_has_a_kind_and_a_meaning() -> None:
    names = {field.name for field in dataclasses.fields(ksmrs.Stats)}
    meanings = _prometheus.meanings()
    assert set(meanings) == names and names > _prometheus.COUNTERS
    assert all(len(meaning) > 10 and meaning[0].isupper() for meaning in meanings.values()), meanings


def test_without_a_broker_all_is_zero() -> None:
    found = families(command("stat", "--prometheus"))
    assert found["ksmrs_broker_up"].samples[0].value == 0
    assert "ksmrs_broker_cpu_seconds" not in found
    assert {family.samples[0].value for family in found.values()} == {0}


def test_the_parser_reads_what_stats_says(runtime_dir: object) -> None:
    regions, _ = equal_regions(64)
    wait_merged(128, *regions)
    ksmrs.tunables.run = 0
    stats = ksmrs.stats()
    text = command("stat", "--prometheus")
    found = families(text)
    assert {family.type for family in found.values()} == {"counter", "gauge"}
    for name in ("pages_shared", "pages_sharing", "saved_bytes", "frames", "regions", "general_profit"):
        assert found[f"ksmrs_{name}"].type == "gauge"
        assert value(text, f"ksmrs_{name}") == getattr(stats, name) > 0
    for name in _prometheus.COUNTERS:
        # The parser knows counters by their names without the ending.
        assert found[f"ksmrs_{name}"].type == "counter"
        assert found[f"ksmrs_{name}"].samples[0].name == f"ksmrs_{name}_total"
    assert value(text, "ksmrs_merges") == stats.merges >= 128
    assert value(text, "ksmrs_broker_up") == 1
    assert found["ksmrs_broker_cpu_seconds"].type == "counter"
    assert value(text, "ksmrs_broker_resident_bytes") > 1 << 20


def test_only_gauges_fall_when_memory_goes(runtime_dir: object) -> None:
    regions, _ = equal_regions(32)
    wait_merged(64, *regions)
    before = dataclasses.asdict(ksmrs.stats())
    for region in regions:
        region.close()
    wait_for(lambda: ksmrs.stats().frames == 0, "the end of all frames")
    after = dataclasses.asdict(ksmrs.stats())
    fell = {name for name in before if after[name] < before[name]}
    assert fell >= {"pages_shared", "pages_sharing", "regions"}
    assert not fell & _prometheus.COUNTERS


def test_one_format_at_a_time() -> None:
    assert "choose one" in command("stat", "--prometheus", "--json", returncode=2)
