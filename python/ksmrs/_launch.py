"""How this process starts a broker when it needs one.

The broker is a Python process only in name: it loads the extension module by its path, never the package, so that it
imports neither NumPy nor the command line and stays at about 10 MB. `-I -S` keeps the user's environment and
site-packages out of it.
"""

from __future__ import annotations

import os
import sys

from ksmrs import _ksmrs

_LOAD_AND_RUN = (
    "import sys\n"
    "from importlib.machinery import ExtensionFileLoader, ModuleSpec\n"
    "loader = ExtensionFileLoader('ksmrs._ksmrs', sys.argv[1])\n"
    "module = loader.create_module(ModuleSpec('ksmrs._ksmrs', loader, origin=sys.argv[1]))\n"
    "loader.exec_module(module)\n"
    "try:\n"
    "    sys.exit(module.run_broker(sys.argv[2] if sys.argv[2:] else None, True))\n"
    "except RuntimeError as refused:\n"
    "    sys.exit(f'ksmrs: {refused}')\n"
)


def broker_command(runtime_dir: str | None = None) -> list[str]:
    """Return the argv that daemonizes a broker, empty where this interpreter cannot be started again."""
    if not sys.executable or getattr(sys, "frozen", False):
        return []
    return [sys.executable, "-I", "-S", "-c", _LOAD_AND_RUN, _ksmrs.__file__, *([runtime_dir] if runtime_dir else [])]


def dirty_tracking_wanted() -> bool:
    """Say whether the environment lets the kernel keep track of which pages are written."""
    return os.environ.get("KSMRS_DIRTY_TRACKING", "1").strip().lower() not in {"0", "no", "off", "false"}


def configure_default() -> None:
    """Set what the first use connects to, unless `ksmrs.connect` says otherwise before it."""
    command = broker_command()
    _ksmrs.configure(None, not command, "default", command, dirty_tracking_wanted())
