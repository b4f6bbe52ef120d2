"""Runs pytest once more as an ordinary user and without transparent huge pages, where the caller is root.

Everything that user needs is made for it in one temporary directory: an interpreter (a copy, where the caller's own lies
below a directory that only root may enter), the installed packages, the tests, a home. Needs no network. Arguments go to
pytest. Never changes anything outside of that directory.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NOBODY = 65534
PR_SET_THP_DISABLE = 41
ROOT = Path(__file__).resolve().parent.parent
DROP = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]


def reachable(path: Path) -> bool:
    """Whether everyone may read `path`, every directory above it included.

    By mode bits: setpriv keeps root's rights until the exec, so trying would prove nothing.
    """
    found = path.resolve()
    return bool(found.stat().st_mode & 0o004) and all(parent.stat().st_mode & 0o001 for parent in found.parents)


def interpreter_for_everyone(room: Path) -> tuple[Path, dict[str, str]]:
    """An interpreter of the caller's version that everyone may run, and the variables it needs."""
    base = Path(sys.base_prefix)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if reachable(base / "bin" / name) and reachable(Path(sysconfig.get_path("stdlib"))):
        return base / "bin" / name, {}
    copy = room / "python"
    for folder in ("bin", "lib"):
        (copy / folder).mkdir(parents=True)
    shutil.copy2((base / "bin" / name).resolve(), copy / "bin" / name)
    for library in (base / "lib").glob("libpython*.so*"):
        shutil.copy2(library, copy / "lib" / library.name)
    skipped = shutil.ignore_patterns("site-packages", "test", "tests", "__pycache__", "config-*", "idlelib", "lib2to3")
    shutil.copytree(base / "lib" / name, copy / "lib" / name, ignore=skipped)
    (copy / "lib" / name / "site-packages").mkdir()
    # Its run path still points to where only root may look.
    return copy / "bin" / name, {"LD_LIBRARY_PATH": str(copy / "lib")}


def main() -> int:
    if os.geteuid() != 0:
        print("unprivileged: the tests just ran as an ordinary user; nothing more to do")
        return 0
    with tempfile.TemporaryDirectory(prefix="ksmrs-unprivileged-", dir="/tmp") as directory:
        room = Path(directory)
        room.chmod(0o755)
        python, needed = interpreter_for_everyone(room)
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(room / "home"),
            "TMPDIR": str(room / "tmp"),
            "LANG": "C.UTF-8",
            # A third of the first time.
            "KSMRS_ORACLE_SECONDS": "20",
            **needed,
            **{name: value for name, value in os.environ.items() if name.startswith("KSMRS_")},
        }
        venv = room / "venv"
        subprocess.run([python, "-m", "venv", "--without-pip", venv], env=environment, check=True)
        (packages,) = venv.glob("lib/python3*/site-packages")
        shutil.copytree(sysconfig.get_path("purelib"), packages, dirs_exist_ok=True, symlinks=True)
        tree = room / "tree"
        shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml",):
            shutil.copy2(ROOT / name, tree / name)
        if (ROOT / "dist").is_dir():
            shutil.copytree(ROOT / "dist", tree / "dist")
        subprocess.run(["chmod", "-R", "go+rX,go-w", directory], check=True)
        for name in ("home", "tmp"):
            (room / name).mkdir(mode=0o700)
            os.chown(room / name, NOBODY, NOBODY)
        pytest = [str(venv / "bin/python"), "-m", "pytest", "-p", "no:cacheprovider", "-m", "not once"]
        command = [*DROP, *pytest, *sys.argv[1:]]
        # Inherited by every process of the run: what root's run did with huge pages, this one does without.
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
        return subprocess.run(command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
