"""Pages as an array and as a picture: every pixel is compared with the page that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ksmrs
from children import equal_regions, run, wait_merged
from ksmrs import PageState, _page_map


@pytest.fixture
def regions(runtime_dir: object) -> Iterator[list[ksmrs.Region]]:
    """Two of 300 pages: mostly merged, five held, one written; nothing changes any more."""
    made, _ = equal_regions(300)
    wait_merged(600, *made)
    ksmrs.tunables.run = 0
    ksmrs.madvise(made[0], ksmrs.MADV_UNMERGEABLE, 0, 5 * 4096)
    yield list(made)
    for region in made:
        region.close()
    made.clear()


def test_the_array_is_what_page_states_says(regions: list[ksmrs.Region]) -> None:
    found = regions[0].page_map()
    assert found.dtype == np.dtype(np.uint8) and found.shape == (300,)
    assert found.tobytes() == regions[0].page_states()
    assert np.flatnonzero(found == PageState.HELD).tolist() == [0, 1, 2, 3, 4]
    found[:] = 0  # a copy: the caller's to change
    assert regions[0].page_map()[0] == PageState.HELD
    regions[0].close()
    with pytest.raises(ksmrs.ClosedRegionError):
        regions[0].page_map()


def test_every_pixel_is_its_page(regions: list[ksmrs.Region], tmp_path: Path) -> None:
    path = tmp_path / "pages.png"
    ksmrs.page_map(path, regions)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    width = pixels.shape[1]
    assert width == 256
    # 300 pages are a line and a bit; the other region begins on the third line.
    for first, region in ((0, regions[0]), (2, regions[1])):
        for page, state in enumerate(region.page_states()):
            colour = tuple(pixels[first + page // width, page % width].tolist())
            assert colour == _page_map.COLOURS[PageState(state)], (page, state)
        assert (pixels[first + 1, 300 - width :] == _page_map.PAPER).all()
    legend = pixels[4:]
    for state in (PageState.MERGED, PageState.HELD):
        assert (legend == _page_map.COLOURS[state]).all(axis=2).any(), f"no {state.name} in the legend"
    assert not (legend == _page_map.COLOURS[PageState.LEAVING]).all(axis=2).any(), "a state that no page has"
    assert (legend[:, 18:].max(axis=2) < 100).any(), "no text"


def test_one_region_draws_itself(regions: list[ksmrs.Region], tmp_path: Path) -> None:
    regions[1].page_map_image(tmp_path / "one.png")
    ksmrs.page_map(tmp_path / "same.png", regions[1])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "same.png").read_bytes()


def test_each_state_has_a_colour_of_its_own() -> None:
    assert set(_page_map.COLOURS) == set(PageState)
    assert len({*_page_map.COLOURS.values(), _page_map.PAPER, _page_map.INK}) == len(PageState) + 2


def test_a_large_region_fits_in_a_square() -> None:
    region = ksmrs.Region(1 << 20 << 10)  # 262,144 pages
    image = _page_map._draw([region])
    assert image.width == 1024
    assert 256 <= image.height < 400


def test_no_region_is_an_empty_picture() -> None:
    assert _page_map._draw([]).height == _page_map.LINE


def test_without_pillow_the_error_says_what_to_install() -> None:
    run(
        """
        sys.modules["PIL"] = None
        region = ksmrs.Region(4096)
        assert region.page_map().size == 1
        try:
            region.page_map_image("/nowhere/pages.png")
        except ImportError as error:
            assert "pip install 'ksmrs[picture]'" in str(error), error
        else:
            raise SystemExit("drawn")
        """
    )
