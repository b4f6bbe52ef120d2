"""`empty`, `zeros`, `full` and `array`: NumPy's constructors, in mergeable memory.

Each array has a region of its own, freed when the last reference to its data goes; a private one that `merge_process` has
NumPy make in mergeable memory anyway is NumPy's, and takes part at once. Its first byte is page-aligned, so that equal arrays
have equal pages.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np

from ksmrs import _ksmrs, _process
from ksmrs._errors import ArgumentError, DtypeError
from ksmrs._region import Region

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

Shape = SupportsIndex | Sequence[SupportsIndex]
Order = Literal["C", "F"]


def empty(shape: Shape, dtype: DTypeLike = float, order: Order = "C", *, shared: bool = False) -> np.ndarray[Any, Any]:
    """Return an array in memory that takes part at once; its contents are zeros."""
    element = np.dtype(dtype)
    if element.hasobject:
        raise DtypeError(f"dtype {element} holds Python objects, whose addresses mean nothing to another process")
    if element.itemsize == 0 and element.kind in "SU":
        element = np.dtype(f"{element.kind}1")  # as np.empty does
    if order not in ("C", "F"):
        raise ArgumentError(f"order {order!r}: must be 'C' or 'F'")
    axes = tuple(map(operator.index, shape)) if isinstance(shape, Sequence) else (operator.index(shape),)
    if min(axes, default=0) < 0:
        raise ArgumentError(f"shape {axes}: no axis can be negative")
    count = math.prod(axes)
    if count * element.itemsize == 0:
        return np.empty(axes, element, order)
    if not shared and _process.reaches() != "off":
        lent = np.zeros(axes, element, order)
        address = lent.__array_interface__["data"][0]
        if _ksmrs.is_lent(address):
            _ksmrs.advise(address, lent.nbytes, True)
            return lent
    flat = Region(count * element.itemsize, shared).array(element, (count,))
    return flat.reshape(axes, order=order)


def zeros(shape: Shape, dtype: DTypeLike = float, order: Order = "C", *, shared: bool = False) -> np.ndarray[Any, Any]:
    """Return an array of zeros in a region of its own. Arguments as `numpy.zeros`."""
    return empty(shape, dtype, order, shared=shared)


def full(
    shape: Shape, fill_value: Any, dtype: DTypeLike | None = None, order: Order = "C", *, shared: bool = False
) -> np.ndarray[Any, Any]:
    """Return an array of `fill_value` in a region of its own. Arguments as `numpy.full`."""
    element = np.asarray(fill_value).dtype if dtype is None else np.dtype(dtype)
    filled = empty(shape, element, order, shared=shared)
    np.copyto(filled, fill_value, casting="unsafe")
    return filled


def array(data: ArrayLike, dtype: DTypeLike | None = None, *, shared: bool = False) -> np.ndarray[Any, Any]:
    """Return a copy of `data` in a region of its own, in the memory order (C or Fortran) that it has."""
    source = np.asarray(data, dtype)
    order: Order = "F" if source.flags.f_contiguous and not source.flags.c_contiguous else "C"
    copied = empty(source.shape, source.dtype, order, shared=shared)
    np.copyto(copied, source)
    return copied
