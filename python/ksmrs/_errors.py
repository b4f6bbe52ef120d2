"""The errors of ksmrs, each also the built-in error that a caller of the same kind of function would already catch.

The extension module raises these by name; their arguments are made there, where the numbers are known.
"""

from __future__ import annotations


class KsmrsError(Exception):
    """Whatever ksmrs could not do; the base of all its errors."""


class ArgumentError(KsmrsError, ValueError):
    """An argument is out of range: a size, an offset, a timeout, a knob's value. Nothing was changed."""


class DtypeError(KsmrsError, TypeError):
    """An array of this dtype cannot live in a region, since it holds pointers to Python objects."""


class ClosedRegionError(KsmrsError, ValueError):
    """The region was closed before."""


class ForeignMemoryError(KsmrsError, BufferError):
    """The buffer does not lie in memory that ksmrs made, or no buffer can be had of the object."""


class PinnedError(KsmrsError, BufferError):
    """Memory was to be closed, or given to somebody else, while it is pinned: whoever it is pinned for may have its pages."""


class SystemCallError(KsmrsError, OSError):
    """The operating system said no; `errno` says how, as with every OSError."""


class NameExistsError(SystemCallError, FileExistsError):
    """A region was to be made under a name that an object has already."""


class BrokerError(KsmrsError, ConnectionError):
    """The broker cannot be started or reached, or it refused; memory and its contents are not affected."""


class UnknownKnobError(KsmrsError, AttributeError):
    """There is no such knob."""


class UnsupportedError(KsmrsError, NotImplementedError):
    """This kernel or process lacks what merging rests on."""
