"""The states of a region's pages as an array, and pictures: of this process's regions, and of all that the broker knows.

Relies on `Region.page_states()` for the former, so on this process's own page table, which nobody else may read; for the
latter on what the broker's counters are made of. The array needs NumPy, the pictures Pillow, which the extra
`ksmrs[picture]` brings along; both are imported when they are used. Changes no page.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ksmrs import _ksmrs
from ksmrs._region import PageState, Region

Colour = tuple[int, int, int]

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from PIL import Image

    Map = np.ndarray[Any, np.dtype[np.uint8]]

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
CLASSES: dict[int, tuple[str, Colour]] = {
    0: ("UNCOUNTED", (225, 225, 225)),
    1: ("VOLATILE", (255, 127, 14)),
    2: ("UNSHARED", (150, 150, 150)),
    3: ("MERGED", (44, 160, 44)),
    4: ("ZERO", (31, 119, 180)),
}
"""By the broker's number: the counter that a page is in. Uncounted has no memory, was not looked at, or is opted out."""
PAPER = (255, 255, 255)
INK = (0, 0, 0)
LEAST_WIDTH = 256
"""Pixels: room for a line of the legend, and one row for a MiB."""
MOST_WIDTH = 4096
MOST_PIXELS = 1 << 24
"""64 GiB, a pixel for each page; of more, a pixel stands for several."""
LINE = 14
"""Pixels from one line of the legend to the next."""


def states(region: Region) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the states as `Region.page_map()` does."""
    import numpy as np  # noqa: PLC0415 (see the first paragraph)

    return np.frombuffer(region.page_states(), np.uint8).copy()


def page_map(path: str | os.PathLike[str], regions: Region | Iterable[Region] | None = None) -> None:
    """Write a PNG in which each pixel is a page of these regions, coloured by its state, above a legend with counts.

    Pages go from left to right and from top to bottom; each region begins on a line of its own. `Region.page_map()` is the
    same as numbers. Without `regions` it is all regions of all clients of this domain, as the broker counts their pages:
    `domain_map()`. Where that is more than 16 million pages a pixel stands for several, and has the colour of most of
    them. Raises `ClosedRegionError` for a closed region, and `ImportError` without Pillow.
    """
    if regions is None:
        image = draw_regions(domain_map())
    else:
        image = _draw([regions] if isinstance(regions, Region) else list(regions))
    image.save(os.fspath(path), format="PNG")


@dataclass(frozen=True, slots=True)
class RegionMap:
    """The pages of one region of any client of the domain, as the broker counts them."""

    pid: int
    """The client's process as the broker sees it; 0 where it cannot."""
    client: int
    """The client's number in the domain."""
    region: int
    """The region's number in the domain, never used twice."""
    shared: bool
    """Whether it is shared memory."""
    classes: bytes
    """A number for each page, which `CLASSES` names."""


def domain_map() -> list[RegionMap]:
    """Return what the pages of all regions of this domain count as, by client; nothing where no broker runs.

    The pages of a class add up to a counter of `stats()`. The broker is asked for some thousand stretches at a time, so what
    comes and goes meanwhile is seen as it is met.
    """
    return [RegionMap(*found) for found in _ksmrs.page_map()]


def draw_regions(regions: list[RegionMap]) -> Image.Image:
    """Draw what `domain_map` returned; raises `ImportError` without Pillow."""
    import numpy as np  # noqa: PLC0415

    return draw([np.frombuffer(region.classes, np.uint8) for region in regions], CLASSES)


def _draw(regions: list[Region]) -> Image.Image:
    colours = {state.value: (state.name, colour) for state, colour in COLOURS.items()}
    return draw([states(region) for region in regions], colours)


def _most_frequent(numbers: Map, pages: int, kinds: int) -> Map:
    """Return for each so many numbers the one that most of them are."""
    import numpy as np  # noqa: PLC0415

    # What fills the last pixel up is no number, and never wins.
    rows = np.pad(numbers, (0, -numbers.size % pages), constant_values=kinds).reshape(-1, pages)
    counts = np.stack([np.count_nonzero(rows == kind, axis=1) for kind in range(kinds)])
    found: Map = counts.argmax(axis=0).astype(np.uint8)
    return found


def draw(maps: list[Map], colours: dict[int, tuple[str, Colour]]) -> Image.Image:
    """Draw maps below one another, a pixel for each number in them, above a legend; `colours` names the numbers, from 0 on."""
    import numpy as np  # noqa: PLC0415

    try:
        from PIL import Image, ImageDraw  # noqa: PLC0415
    except ImportError as missing:
        text = "pictures of pages need Pillow: pip install 'ksmrs[picture]'"
        raise ImportError(text, name=missing.name) from missing

    # What lies past a map's last page is paper, a number that no page has.
    none = max(colours) + 1
    counts = sum((np.bincount(found, minlength=none) for found in maps), np.zeros(none, np.int64))
    legend = [(*colours[number], f" {counts[number]:,}") for number in range(none) if counts[number]]
    pages = sum(found.size for found in maps)
    if pages > MOST_PIXELS:
        each = 1 << math.ceil(math.log2(pages / MOST_PIXELS))
        maps = [_most_frequent(found, each, none) for found in maps]
        legend.append((f"a pixel is {each} pages", PAPER, ""))

    pixels = sum(found.size for found in maps)
    width = min(MOST_WIDTH, max(LEAST_WIDTH, 1 << math.ceil(math.log2(math.isqrt(pixels) + 1))))
    palette = np.array([*(colours[number][1] for number in range(none)), PAPER], np.uint8)
    lines = [np.pad(found, (0, -found.size % width), constant_values=none).reshape(-1, width) for found in maps]
    drawn = np.vstack(lines) if lines else np.empty((0, width), np.uint8)

    image = Image.new("RGB", (width, drawn.shape[0] + LINE * (len(legend) + 1)), PAPER)
    image.paste(Image.fromarray(palette[drawn]), (0, 0))
    pen = ImageDraw.Draw(image)
    for number, (name, colour, count) in enumerate(legend):
        top = drawn.shape[0] + LINE // 2 + number * LINE
        pen.rectangle((4, top + 2, 12, top + 10), fill=colour)
        pen.text((18, top), name + count, fill=INK)
    return image
