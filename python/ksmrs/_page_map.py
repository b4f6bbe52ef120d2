"""The states of a region's pages as an array, and as a picture.

Relies on `Region.page_states()`, so on this process's own page table: of other processes nothing can be drawn. The array needs
NumPy, the picture Pillow, which the extra `ksmrs[picture]` brings along; both are imported when they are used. Changes no page.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from ksmrs._region import PageState, Region

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from PIL import Image

    Map = np.ndarray[Any, np.dtype[np.uint8]]
    Colour = tuple[int, int, int]

COLOURS: dict[PageState, tuple[int, int, int]] = {
    PageState.PRIVATE: (190, 190, 190),
    PageState.FREEZING: (255, 200, 87),
    PageState.FROZEN: (255, 165, 0),
    PageState.COMMITTING: (255, 127, 14),
    PageState.MERGED: (44, 160, 44),
    PageState.ZERO: (31, 119, 180),
    PageState.BREAKING: (255, 80, 80),
    PageState.HOMED: (255, 152, 150),
    PageState.BROKEN: (197, 60, 60),
    PageState.DETACHED: (140, 86, 75),
    PageState.HELD: (70, 70, 70),
    PageState.LEAVING: (148, 103, 189),
}
"""A colour for each state: green saves a frame's page, blue a page of zeros, reds were written, orange is on its way."""
PAPER = (255, 255, 255)
INK = (0, 0, 0)
LEAST_WIDTH = 256
"""Pixels: room for a line of the legend, and one row for a MiB."""
MOST_WIDTH = 4096
LINE = 14
"""Pixels from one line of the legend to the next."""


def states(region: Region) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the states as `Region.page_map()` does."""
    import numpy as np  # noqa: PLC0415 (see the first paragraph)

    return np.frombuffer(region.page_states(), np.uint8).copy()


def page_map(path: str | os.PathLike[str], regions: Region | Iterable[Region]) -> None:
    """Write a PNG in which each pixel is a page of these regions, coloured by its state, above a legend with counts.

    Pages go from left to right and from top to bottom; each region begins on a line of its own. `Region.page_map()` is the
    same as numbers. Raises `ClosedRegionError` for a closed region, and `ImportError` without Pillow.
    """
    _draw([regions] if isinstance(regions, Region) else list(regions)).save(os.fspath(path), format="PNG")


def _draw(regions: list[Region]) -> Image.Image:
    colours = {state.value: (state.name, colour) for state, colour in COLOURS.items()}
    return draw([states(region) for region in regions], colours)


def draw(maps: list[Map], colours: dict[int, tuple[str, Colour]]) -> Image.Image:
    """Draw maps below one another, a pixel for each number in them, above a legend; `colours` names the numbers, from 0 on."""
    import numpy as np  # noqa: PLC0415

    try:
        from PIL import Image, ImageDraw  # noqa: PLC0415
    except ImportError as missing:
        text = "pictures of pages need Pillow: pip install 'ksmrs[picture]'"
        raise ImportError(text, name=missing.name) from missing

    pages = sum(found.size for found in maps)
    width = min(MOST_WIDTH, max(LEAST_WIDTH, 1 << math.ceil(math.log2(math.isqrt(pages) + 1))))
    # What lies past a map's last page is paper, a number that no page has.
    none = max(colours) + 1
    palette = np.array([*(colours[number][1] for number in range(none)), PAPER], np.uint8)
    lines = [np.pad(found, (0, -found.size % width), constant_values=none).reshape(-1, width) for found in maps]
    drawn = np.vstack(lines) if lines else np.empty((0, width), np.uint8)
    counts = np.bincount(np.concatenate([*maps, np.empty(0, np.uint8)]), minlength=none)

    legend = [(*colours[number], int(counts[number])) for number in range(none) if counts[number]]
    image = Image.new("RGB", (width, drawn.shape[0] + LINE * (len(legend) + 1)), PAPER)
    image.paste(Image.fromarray(palette[drawn]), (0, 0))
    pen = ImageDraw.Draw(image)
    for number, (name, colour, count) in enumerate(legend):
        top = drawn.shape[0] + LINE // 2 + number * LINE
        pen.rectangle((4, top + 2, 12, top + 10), fill=colour)
        pen.text((18, top), f"{name} {count:,}", fill=INK)
    return image
