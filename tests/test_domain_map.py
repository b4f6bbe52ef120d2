"""`ksmrs map` and `ksmrs.page_map(path)`: what the broker counts each page as, compared with what the pages are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ksmrs
from children import Child, brokers_in, equal_regions, wait_for, wait_merged
from ksmrs import _page_map
from test_cli import command

UNCOUNTED, VOLATILE, UNSHARED, MERGED, ZERO = range(5)


def passes(count: int) -> None:
    """Wait for whole passes."""
    end = ksmrs.stats().full_scans + count
    wait_for(lambda: ksmrs.stats().full_scans >= end, f"pass {end}")


def by_size() -> dict[int, np.ndarray]:
    """The classes of each region that this process has, by its pages."""
    mine = [found for found in _page_map.domain_map() if found.pid == os.getpid()]
    return {len(found.classes): np.frombuffer(found.classes, np.uint8) for found in mine}


def test_each_page_has_the_class_of_what_it_is(runtime_dir: Path) -> None:
    assert _page_map.domain_map() == []
    ksmrs.tunables.use_zero_pages = 1
    rng = np.random.default_rng(1)
    mixed = ksmrs.Region(500 * 4096)
    pages = mixed.array(np.uint8, (500, 4096))
    pages[:100] = rng.integers(1, 256, (100, 1), np.uint8)  # those of one number are equal
    pages[100:200] = rng.integers(0, 256, (100, 4096), np.uint8)
    pages[200:300] = 1
    pages[200:300] = 0
    pages[300:400] = 7
    ksmrs.madvise(mixed, ksmrs.MADV_UNMERGEABLE, 350 * 4096, 50 * 4096)
    shared = ksmrs.Region(40 * 4096, shared=True)
    shared.array(np.uint8, (40, 4096))[:] = 7
    passes(4)
    ksmrs.tunables.run = 0
    found = by_size()
    numbers, counts = np.unique(pages[:100, 0], return_counts=True)
    alone = np.isin(pages[:100, 0], numbers[counts == 1]) & (pages[:100, 0] != 7)
    assert (found[500][:100] == np.where(alone, UNSHARED, MERGED)).all()
    for first, end, expected in ((100, 200, UNSHARED), (200, 300, ZERO), (300, 350, MERGED), (350, 500, UNCOUNTED)):
        assert (found[500][first:end] == expected).all(), (first, found[500][first:end])
    assert (found[40] == MERGED).all()
    assert {len(region.classes): region.shared for region in _page_map.domain_map()} == {500: False, 40: True}

    every = np.concatenate(list(found.values()))
    stats = ksmrs.stats()
    assert np.bincount(every, minlength=5)[VOLATILE:].tolist() == [
        stats.pages_volatile,
        stats.pages_unshared,
        stats.pages_shared + stats.pages_sharing,
        stats.ksm_zero_pages,
    ]


def test_scattered_pages_take_many_answers() -> None:
    """Every other page is equal: far more stretches than one answer holds."""
    regions, contents = equal_regions(6000)
    for region, seed in zip(regions, (5, 6), strict=True):
        own = np.random.default_rng(seed).integers(0, 256, (3000, 4096), np.uint8)
        region.array(np.uint8, (6000, 4096))[::2] = own
    wait_merged(6000, *regions)
    passes(2)
    ksmrs.tunables.run = 0
    first, second = (np.frombuffer(found.classes, np.uint8) for found in _page_map.domain_map())
    for classes in (first, second):
        assert (classes[1::2] == MERGED).all() and (classes[::2] == UNSHARED).all()
    assert (regions[0].array(np.uint8, (6000, 4096))[1::2] == contents.reshape(6000, 4096)[1::2]).all()


def test_the_command_draws_other_processes(tmp_path: Path) -> None:
    """One client is a child; the picture's lines are its pages and ours, in the broker's order."""
    regions, _ = equal_regions(300, count=1)
    program = """
        regions, _ = equal_regions(300, count=1)
        print("here")
        sys.stdin.readline()
        """
    with Child(program) as child:
        assert child.line() == "here"
        wait_merged(300, *regions)
        wait_for(lambda: ksmrs.stats().pages_sharing == 300)
        ksmrs.tunables.run = 0
        path = tmp_path / "map.png"
        assert command("map", str(path)) == f"{path}: 600 pages of 2 regions of 2 clients\n"
        assert {found.pid for found in _page_map.domain_map()} == {os.getpid(), child.pid}
        child.tell()
        child.end()
    pixels = np.asarray(Image.open(path).convert("RGB"))
    green = (pixels == _page_map.CLASSES[MERGED][1]).all(axis=2)
    assert green[0].all() and green[1, :44].all() and not green[1, 44:].any()
    assert green[2].all() and green[3, :44].all() and not green[3, 44:].any()


def test_page_map_without_regions_is_the_whole_domain(tmp_path: Path) -> None:
    regions, _ = equal_regions(300)
    wait_merged(600, *regions)
    ksmrs.tunables.run = 0
    ksmrs.page_map(tmp_path / "one.png")
    command("map", str(tmp_path / "two.png"))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_of_too_many_pages_a_pixel_stands_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_page_map, "MOST_PIXELS", 256)
    classes = np.zeros(999, np.uint8)
    classes[:499] = MERGED
    classes[998] = UNSHARED
    image = np.asarray(_page_map.draw([classes], _page_map.CLASSES))
    colours = {number: colour for number, (_, colour) in _page_map.CLASSES.items()}
    row = [tuple(pixel) for pixel in image[0].tolist()]
    # 4 pages each: 124 whole pixels, one of three merged pages and another, then the rest, whose last has three pages.
    assert row[:125] == [colours[MERGED]] * 125
    assert row[125:250] == [colours[UNCOUNTED]] * 125
    assert set(row[250:]) == {_page_map.PAPER}


def test_without_a_broker_there_is_nothing_to_draw(runtime_dir: Path, tmp_path: Path) -> None:
    assert "no region to draw" in command("map", str(tmp_path / "no.png"), returncode=1)
    assert not (tmp_path / "no.png").exists()
    assert brokers_in(runtime_dir) == []


def test_a_place_that_cannot_be_written_is_named() -> None:
    _regions, _ = equal_regions(10)
    assert "/nowhere/map.png: No such file or directory" in command("map", "/nowhere/map.png", returncode=1)
