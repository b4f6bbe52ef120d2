"""The package: what importing costs, what is in the wheel, and that it needs no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import ksmrs
from children import run
from ksmrs import _ksmrs

WHEELS = sorted((Path(__file__).resolve().parent.parent / "dist").glob("ksmrs-*.whl"))


def test_importing_starts_and_imports_nothing(runtime_dir: Path) -> None:
    run(
        """
        import sys, threading, os
        import ksmrs
        assert not {"numpy", "click", "rich", "psutil"} & set(sys.modules), sys.modules
        assert threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1
        """,
        prelude=False,
    )
    assert list(runtime_dir.iterdir()) == []


def test_all_names_exist_and_have_docstrings() -> None:
    for name in ksmrs.__all__:
        value = getattr(ksmrs, name)
        if callable(value):
            assert value.__doc__, name
    assert set(ksmrs.__all__) <= set(dir(ksmrs))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ksmrs.no_such_name


def test_every_error_is_a_ksmrs_error_and_a_built_in_one() -> None:
    errors = [getattr(ksmrs, name) for name in ksmrs.__all__ if name.endswith("Error") and name != "KsmrsError"]
    assert len(errors) == 10
    for error in errors:
        assert issubclass(error, ksmrs.KsmrsError)
        assert any(
            base.__module__ == "builtins" and base not in {Exception, BaseException} for base in error.__mro__[2:-3]
        )


def test_subinterpreters_are_refused() -> None:
    run(
        """
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        import ksmrs
        code = "try:\\n import ksmrs\\nexcept ImportError: pass\\nelse: raise SystemError('imported')"
        number = interpreters.create()
        failed = interpreters.run_string(number, code)
        assert failed is None, failed
        """,
        prelude=False,
    )


def test_the_built_extension_has_no_mutants() -> None:
    assert not any("mutant" in name for name in dir(_ksmrs))
    assert _ksmrs.__file__ is not None
    found = Path(_ksmrs.__file__).read_bytes()
    assert b"handler-without-claim" not in found
    assert b"KSMRS_FAKE_NODES" not in found


@pytest.mark.skipif(not WHEELS, reason="no wheel in dist: run make wheel")
def test_the_wheel_runs_in_an_empty_environment_without_a_compiler(tmp_path: Path) -> None:
    (wheel,) = WHEELS
    names = zipfile.ZipFile(wheel).namelist()
    assert "ksmrs/_ksmrs.pyi" in names
    assert "ksmrs/py.typed" in names
    assert "-abi3-" in wheel.name
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    environment = {**os.environ, "PATH": "", "PYTHONPATH": ""}
    zipfile.ZipFile(wheel).extractall(packages)
    done = subprocess.run(
        [
            tmp_path / "venv/bin/python",
            "-c",
            "import ksmrs; r = ksmrs.Region(8192); memoryview(r)[5] = 1; print(ksmrs.merge(5), r.page_states())",
        ],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sys.prefix not in done.stderr
