"""gunicorn with `--preload`: the master loads the data and forks four workers; each changes some and later reloads it all.

    python benches/programs/prefork_server.py [--workers 4] [--rounds 1] [--quick] [--json]

A service that finds similar articles: a matrix of vectors and a table of stock, read with `np.load` when the module is
imported. Workers are forked, so that they begin with one memory anyway; what merging is for is what comes after. Each worker
writes the rows of stock that are its own, and when the files are newer it reads them again, as services do whose data is
made anew every night: then each has a copy. With ksmrs there is one line more, `ksmrs.merge_process(True)` before the data is
loaded. Requests go over a socket to whichever worker accepts. This file is program and application. Relies on measure.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import measure

NEEDS = ("gunicorn", "numpy")
WIDTH = 64
ARTICLES, QUICK_ARTICLES, NONE = 160_000, 48_000, 100
STOCK = 16
"""Entries of stock per article: warehouses."""
OWN_ROWS = 64
FOLDER, MERGES = "PREFORK_FOLDER", "PREFORK_KSMRS"


def write_data(folder: Path, articles: int, version: int) -> None:
    """The files of a version, always the same; each appears as a whole."""
    import numpy as np

    chance = np.random.default_rng(version)
    data = {
        "vectors": chance.standard_normal((articles, WIDTH), np.float32),
        "stock": chance.integers(0, 1000, (articles, STOCK), np.int64),
        "version": np.array([version]),
    }
    for name, array in data.items():
        np.save(folder / "new.npy", array)
        (folder / "new.npy").rename(folder / f"{name}.npy")


class Application:
    """What gunicorn serves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        os.register_at_fork(before=self._count)
        self._load()

    def _count(self) -> None:
        # The child that is born next has this number.
        self._number += 1

    def _load(self) -> None:
        import numpy as np

        # The version is written last, so that the rest is there.
        self._seen = (self._folder / "version.npy").stat().st_mtime_ns
        self._version = int(np.load(self._folder / "version.npy")[0])
        self._vectors = np.load(self._folder / "vectors.npy")
        self._stock = np.load(self._folder / "stock.npy")
        self._turn = 0

    def _book(self, row: int) -> None:
        """Write one of the rows of stock that are this worker's alone."""
        at = (row * 1009 * measure.PAGE + self._number) % len(self._stock)
        self._stock[at] = self._number * 1_000_000 + row

    def _similar(self, article: int) -> Any:
        import numpy as np

        scores = self._vectors @ self._vectors[article % len(self._vectors)]
        best = np.argsort(-scores, kind="stable")[:10]
        return {"articles": best.tolist(), "scores": scores[best].tolist()}

    def _state(self) -> Any:
        for row in range(OWN_ROWS):
            self._book(row)
        found = measure.digest(self._vectors.data, self._stock.data)
        return {"number": self._number, "version": self._version, "digest": found}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        asked = json.loads(environ["wsgi.input"].read())
        if (self._folder / "version.npy").stat().st_mtime_ns != self._seen:
            self._load()
        if asked == "state":
            found = self._state()
        else:
            self._turn += 1
            self._book(self._turn % OWN_ROWS)
            found = self._similar(asked)
        body = json.dumps(found).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]


@contextmanager
def gunicorn(side: measure.Side, folder: Path) -> Iterator[tuple[tuple[str, int], int]]:
    """Inside, it runs: where, and which process is the master."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        side.environment[FOLDER] = str(folder)
        side.environment[MERGES] = "1" if side.how == measure.KSMRS else ""
        os.set_inheritable(listening.fileno(), True)
        words = ["--preload", "--workers", str(side.count), "--bind", f"fd://{listening.fileno()}", "--timeout", "300"]
        words += ["--log-level", "warning", "--chdir", str(Path(__file__).parent), "--no-control-socket"]
        command = [sys.executable, "-m", "gunicorn", *words, f"{Path(__file__).stem}:app"]
        master = side.popen(command, pass_fds=[listening.fileno()])
        try:
            yield listening.getsockname(), master.pid
        finally:
            master.terminate()
            try:
                master.wait(measure.PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                master.kill()


def states(side: measure.Side, address: tuple[str, int], version: int) -> dict[int, str]:
    """What each worker has in memory, by its number, once all have this version."""
    found: dict[int, str] = {}
    until = time.monotonic() + measure.PATIENCE_SECONDS
    while len(found) < side.count:
        if time.monotonic() > until:
            raise SystemExit(f"{len(found)} of {side.count} workers answered within {measure.PATIENCE_SECONDS} s")
        for answer in measure.post_together(address, b'"state"', side.count):
            state = json.loads(answer)
            if state["version"] == version:
                found[state["number"]] = state["digest"]
    return found


def run(side: measure.Side) -> None:
    seconds = 1.0 if side.quick else 10.0
    articles = QUICK_ARTICLES if side.quick else ARTICLES
    asked = [json.dumps(article * 37).encode() for article in range(20)]
    folder = side.folder
    write_data(folder, NONE, 1)
    with gunicorn(side, folder) as (address, master):
        states(side, address, 1)
        side.take("of interpreter and libraries", [master, *measure.children(master)])
    write_data(folder, articles, 1)
    with ExitStack() as stack:
        with side.loading("start, s"):
            address, master = stack.enter_context(gunicorn(side, folder))
            first = states(side, address, 1)
        pids = [master, *measure.children(master)]
        side.take("when forked", pids)
        side.ask("when forked", [address] * side.count, asked, seconds, anyone=True)
        side.merge()
        side.take("when forked, merged", pids)
        write_data(folder, articles, 2)
        with side.loading("reload in all workers, s"):
            states(side, address, 2)
        side.take("when reloaded", pids)
        side.ask("while merging", [address] * side.count, asked, seconds, anyone=True)
        side.merge()
        side.take("when merged", pids)
        side.ask("after merging", [address] * side.count, asked, seconds, anyone=True)
        second = states(side, address, 2)
        side.take("at the end", pids)
    for version, found in ((1, first), (2, second)):
        for number, state in found.items():
            side.answer(f"version {version} of worker {number}", state)


if __name__ == "__main__":
    measure.main(run, __doc__, NEEDS)
else:
    if os.environ.get(MERGES):
        import ksmrs

        ksmrs.merge_process(True)
    app = Application(Path(os.environ[FOLDER]))
