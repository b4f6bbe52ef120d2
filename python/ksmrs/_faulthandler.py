"""Keeps Python's `faulthandler` and the write-fault handler of ksmrs out of each other's way.

Both want SIGSEGV. `faulthandler.enable()` puts itself in front of ours, so that every write to a merged page would print a
crash; `disable()`, and the end of the interpreter, put back what was there when it was enabled, which removes ours. So both
functions are wrapped, ours goes in front again after each, and at exit faulthandler is disabled while there is still time
to do so. Never touches a signal itself.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
from collections.abc import Callable
from typing import Any

from ksmrs import _ksmrs

_originals: dict[str, Callable[..., Any]] = {}


def install() -> None:
    """Wrap `faulthandler.enable` and `disable`, once, before the first region exists."""
    if _originals:
        return
    for name in ("enable", "disable"):
        original = getattr(faulthandler, name)
        _originals[name] = original
        setattr(faulthandler, name, _followed_by_ours(original))
    atexit.register(_at_exit)


def _followed_by_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        try:
            return original(*arguments, **named)
        finally:
            _ksmrs.reassert_handler()

    return wrapper


def _at_exit() -> None:
    # Py_FinalizeEx would do this later, when nothing can put our handler back: other threads may still be writing.
    if faulthandler.is_enabled():
        _originals["disable"]()
    _ksmrs.reassert_handler()
