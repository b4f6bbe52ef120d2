"""What the programs beside this file are measured by: the same work without ksmrs, with it, and with kernel KSM.

Memory is that of all processes of a program together: PSS, page tables, a vm_area_struct for each mapping, and with ksmrs the
whole of the broker and frames that nobody maps, with kernel KSM its items and nodes (see footprint.py); beside it, what the
machine's anonymous memory, shared memory and page tables grew by, in which others' work shows too. Both engines run by their
defaults while requests are answered; then what is left is merged on request, by ksmd at its maximum. Answers are hashed and
compared: one that differs ends the program with status 1, packages that are missing with status 77. Workers import this file
too, so that it imports nothing heavy by itself. No scenario of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import http.client
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MIB = 1 << 20
PAGE = 4096
WITHOUT, KSMRS, KERNEL = "without", "ksmrs", "kernel"
PR_SET_MEMORY_MERGE = 67
PATIENCE_SECONDS = 300
SKIPPED = 77
"""The status of a program that cannot run here, as automake has it."""
ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Workers share the processors, and sums come out the same each time."""


def digest(*parts: Any) -> str:
    """A hash of buffers."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def obey(**commands: Callable[[], Any]) -> None:
    """Be a worker: say ready, then do what each line of the standard input names and print what it returns."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


def serve(answer: Callable[[bytes], bytes]) -> int:
    """Answer what is posted from now on, one connection after the other, on a thread; the port."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one segment

        def do_POST(self) -> None:
            found = answer(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


class Side:
    """One run of a program: how it is run, and what was found."""

    def __init__(self, how: str, quick: bool, count: int, folder: Path) -> None:
        self.how, self.quick, self.count = how, quick, count
        self.folder = folder
        """For files, which all runs share."""
        self.figures: dict[str, float] = {}
        self.answers: dict[str, str] = {}
        """Hashes by what was asked of whom; the same in every run."""
        self.broker: int | None = None
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("KSMRS_MERGE")} | ONE_THREAD
        self._pids: list[int] = []
        self._machine = 0
        self._loaded = 0.0
        self._seen: list[tuple[float, int]] = []

    # How processes are started.

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process of the program; by kernel KSM with all its memory, and its children's, opted in."""
        if self.how == KERNEL:
            prctl = ctypes.CDLL(None).prctl
            options["preexec_fn"] = lambda: prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0)
        return subprocess.Popen(command, env=self.environment, text=True, **options)

    # Memory.

    def take(self, when: str, pids: Sequence[int]) -> None:
        """Measure what these processes, and whoever merges, take now."""
        import footprint

        self._pids = list(pids)
        taken = footprint.together(map(footprint.of, pids))
        total = taken.pss + taken.page_tables + taken.mappings * footprint.vm_area_struct() + taken.rmap_items
        if self.broker is not None:
            engine = footprint.of(self.broker)
            unmapped = max(0, footprint.store(self.broker) - self._counter("pages_shared") * PAGE)
            total += engine.pss + engine.page_tables + unmapped
        elif self.how == KERNEL:
            total += self._counter("pages_shared") * footprint.ITEM
        self.figures[f"memory {when}, MiB"] = total / MIB
        self.figures[f"machine's memory {when}, MiB"] = (anonymous() - self._machine) / MIB

    def _counter(self, name: str) -> int:
        if self.how == KERNEL:
            import kernel_ksm

            return kernel_ksm.counter(name)
        import ksmrs

        return int(getattr(ksmrs.stats(), name))

    # Time.

    @contextmanager
    def loading(self, name: str = "load, s") -> Iterator[None]:
        """Inside, the program loads what is to be merged; from its end on is counted how long merging takes."""
        began = time.monotonic()
        yield
        self._loaded = time.monotonic()
        self._seen.clear()
        self.figures[name] = self._loaded - began

    def ask(
        self,
        when: str,
        addresses: Sequence[tuple[str, int]],
        bodies: Sequence[bytes],
        seconds: float,
        anyone: bool = False,
    ) -> None:
        """Have one client per address post all bodies in turn, at least once, until the time is up.

        Behind one address may be `anyone` of the workers, so that who answered what is left out of account.
        """
        began = time.monotonic()
        cpu = self._cpu()
        with self._watching(), ThreadPoolExecutor(len(addresses)) as pool:
            clients = [
                pool.submit(
                    self._client,
                    address,
                    f"{when}, {'anyone' if anyone else number}",
                    bodies,
                    began + seconds,
                )
                for number, address in enumerate(addresses)
            ]
            took = [each for client in clients for each in client.result()]
        self._tell(when, took, len(took), time.monotonic() - began, self._cpu() - cpu)

    def _client(self, address: tuple[str, int], who: str, bodies: Sequence[bytes], until: float) -> list[float]:
        took: list[float] = []
        with closing(http.client.HTTPConnection(*address, timeout=PATIENCE_SECONDS)) as connection:
            while len(took) < len(bodies) or time.monotonic() < until:
                number = len(took) % len(bodies)
                began = time.perf_counter()
                found = post(connection, bodies[number])
                took.append(time.perf_counter() - began)
                self.answer(f"{who}, request {number}", digest(found))
        return took

    def repeat(self, when: str, act: Callable[[], list[str]], seconds: float) -> None:
        """Have something done, which returns a hash of each answer, again and again until the time is up."""
        took: list[float] = []
        answers = 0
        with self._watching():
            began, cpu = time.monotonic(), self._cpu()
            while time.monotonic() < began + seconds or not took:
                before = time.perf_counter()
                found = act()
                took.append(time.perf_counter() - before)
                answers += len(found)
                for number, each in enumerate(found):
                    self.answer(f"{when}, request {number}", each)
            self._tell(when, took, answers, time.monotonic() - began, self._cpu() - cpu)

    def _cpu(self) -> float:
        """Seconds of CPU of the processes last measured and the broker; they tell more than clocks where others work too."""
        ticks = 0
        for pid in [*self._pids, *([self.broker] if self.broker else [])]:
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def _tell(self, when: str, took: list[float], count: int, seconds: float, cpu: float) -> None:
        took.sort()
        self.figures[f"requests/s {when}"] = count / seconds
        self.figures[f"CPU a request {when}, ms"] = cpu / count * 1e3
        self.figures[f"p50 {when}, ms"] = took[len(took) // 2] * 1e3
        self.figures[f"p99 {when}, ms"] = took[len(took) * 99 // 100] * 1e3

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside, note how the saving grows."""
        done = threading.Event()

        def watch() -> None:
            while self.how != WITHOUT and not done.wait(0.05):
                self._seen.append((time.monotonic(), self._counter("pages_sharing")))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def merge(self) -> None:
        """Merge what is left."""
        if self.how == WITHOUT:
            return
        began = time.monotonic()
        if self.how == KSMRS:
            self._merge_by_ksmrs()
        else:
            self._merge_by_kernel()
        sharing = self._counter("pages_sharing")
        self._seen.append((time.monotonic(), sharing))
        self.figures["merge what was left, s"] = self._seen[-1][0] - began
        self.figures["saved, gross, MiB"] = sharing * PAGE / MIB
        first = next(when for when, pages in self._seen if pages >= sharing * 0.9)
        self.figures["90 % saved after load, s"] = max(0.0, first - self._loaded)

    def _merge_by_ksmrs(self) -> None:
        import ksmrs

        # An array takes part once it outlived a pass, so that the first may find nothing.
        idle, until = 0, time.monotonic() + PATIENCE_SECONDS
        while idle < 2:
            report = ksmrs.merge(timeout=PATIENCE_SECONDS)
            if not report.finished or time.monotonic() > until:
                raise SystemExit(f"not merged within {PATIENCE_SECONDS} s: {report}")
            idle = 0 if report.pages_merged else idle + 1

    def _merge_by_kernel(self) -> None:
        import kernel_ksm
        from time_to_savings import KERNEL_DEFAULTS

        for name, value in (("sleep_millisecs", 0), ("pages_to_scan", 100_000), ("smart_scan", 0)):
            kernel_ksm.turn(name, value)
        until, before = time.monotonic() + PATIENCE_SECONDS, -1
        while True:
            scans = kernel_ksm.counter("full_scans")
            while kernel_ksm.counter("full_scans") < scans + 2:
                if time.monotonic() > until:
                    raise SystemExit(f"kernel KSM was not done within {PATIENCE_SECONDS} s")
                time.sleep(0.01)
            if (sharing := kernel_ksm.counter("pages_sharing")) <= before * 1.001:
                break
            before = sharing
        for name, value in KERNEL_DEFAULTS.items():
            if name in ("sleep_millisecs", "pages_to_scan", "smart_scan"):
                kernel_ksm.turn(name, value)

    # Results.

    def answer(self, what: str, found: str) -> None:
        """Note a hash; asked the same again, it must be the same."""
        if self.answers.setdefault(what, found) != found:
            raise SystemExit(f"{self.how}: the answer to the same question changed: {what}")

    def cpu(self) -> None:
        """Note what the engine used by itself; what workers did for it is in their own time."""
        if self.how == KSMRS:
            tasks = Path(f"/proc/{self.broker}/task").glob("*/schedstat")
            self.figures["broker CPU, s"] = sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    @contextmanager
    def engine(self) -> Iterator[None]:
        """With whoever merges, by defaults, in a place of its own."""
        import kernel_ksm
        import ksmrs
        from merge_equal import fresh_broker
        from time_to_savings import KERNEL_DEFAULTS

        with ExitStack() as stack:
            if self.how == KSMRS:
                self.broker = stack.enter_context(fresh_broker()).pid
                ksmrs.tunables.run = 1
                self.environment["KSMRS_RUNTIME_DIR"] = os.environ["KSMRS_RUNTIME_DIR"]
            elif self.how == KERNEL:
                stack.enter_context(kernel_ksm.turned(KERNEL_DEFAULTS))
            self._machine = anonymous()
            yield
            self.cpu()


def anonymous() -> int:
    """What the machine has in memory that belongs to no file, and in page tables."""
    import footprint

    memory = footprint.fields("/proc/meminfo")
    return memory["AnonPages"] + memory["Shmem"] + memory["PageTables"]


def post(connection: http.client.HTTPConnection, body: bytes) -> bytes:
    connection.request("POST", "/", body)
    response = connection.getresponse()
    found = response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {found[:200]!r}")
    return found


def post_together(address: tuple[str, int], body: bytes, count: int) -> list[bytes]:
    """Post the same so many times at once; the answers."""

    def one(_: int) -> bytes:
        with closing(http.client.HTTPConnection(*address, timeout=PATIENCE_SECONDS)) as connection:
            return post(connection, body)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class Workers:
    """Processes of a program that do as they are told, all at the same time (see `obey`)."""

    def __init__(self, side: Side, command: Sequence[str], count: int | None = None) -> None:
        self._processes = [
            side.popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for number in range(count or side.count)
        ]
        self.pids = [process.pid for process in self._processes]

    def ask(self, command: str) -> list[Any]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()
        return [json.loads(self._line(process)) for process in self._processes]

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {process.pid} ended with status {process.wait()}")
        return line

    def __enter__(self) -> Workers:
        for process in self._processes:
            if self._line(process).strip() != "ready":
                raise SystemExit(f"worker {process.pid} did not say that it is ready")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(PATIENCE_SECONDS)


def children(pid: int) -> list[int]:
    """The processes that a process started, with theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def main(run: Callable[[Side], None], about: str | None, needs: Sequence[str]) -> None:
    """Run a program in turn, without and with, as the command line says, and tell what came of it."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all works")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    name = Path(sys.argv[0]).stem
    if absent := missing(needs):
        print(f"skipped, not installed: {', '.join(absent)}; see benches/requirements.txt", file=sys.stderr)
        sys.exit(SKIPPED)
    import kernel_ksm

    refusal = kernel_ksm.unavailable()
    hows = [WITHOUT, KSMRS, *([KERNEL] if refusal is None else [])]
    runs: dict[str, list[dict[str, float]]] = {how: [] for how in hows}
    first: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="ksmrs-program-") as folder:
        # In turn, so that a noisy minute is everybody's, and there and back, so that nobody is always first.
        turns = [how for number in range(arguments.rounds) for how in (hows[::-1] if number % 2 else hows)]
        for how in turns:
            side = Side(how, arguments.quick, arguments.workers, Path(folder))
            with side.engine():
                run(side)
            runs[how].append(side.figures)
            first = first or side.answers
            if side.answers != first:
                wrong = sorted(what for what in {*first, *side.answers} if first.get(what) != side.answers.get(what))
                sys.exit(f"{how}: {len(wrong)} answers are not those without: {wrong[:3]}")
    result = {
        "program": name,
        "workers": arguments.workers,
        "answers_identical": len(first),
        "figures": {how: spread(found) for how, found in runs.items()},
        "of_without": {how: spread(parts(runs[how], runs[WITHOUT])) for how in hows[1:]},
        "kernel_unavailable": refusal,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, arguments.rounds)


def parts(runs: list[dict[str, float]], of: list[dict[str, float]]) -> list[dict[str, float]]:
    """Each figure as a part of the same one of another side, in the same round."""
    return [{k: v / other[k] for k, v in one.items() if other.get(k)} for one, other in zip(runs, of, strict=True)]


def spread(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each figure the median, the least and the most."""
    found = {}
    for name in runs[0]:
        values = [run[name] for run in runs if name in run]
        found[name] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return found


def show(result: dict[str, Any], rounds: int) -> None:
    print(
        f"{result['program']}: {result['workers']} workers, median of {rounds} rounds; part of without: least to most"
    )
    if result["kernel_unavailable"]:
        print(f"kernel KSM: not measured, {result['kernel_unavailable']}")
    figures, relative = result["figures"], result["of_without"]
    names = list(dict.fromkeys(name for found in figures.values() for name in found))
    width = max(map(len, names))
    print(f"{'':{width}}", *(f"{how:>10}{'' if how == WITHOUT else '   of without':13}" for how in figures))
    for name in names:
        cells = []
        for how, found in figures.items():
            value = f"{found[name]['median']:10.4g}" if name in found else f"{'-':>10}"
            part = relative.get(how, {}).get(name)
            cells.append(value + (f"   {part['least']:.2f} - {part['most']:.2f}" if part else " " * 13))
        print(f"{name:{width}}", *cells)
    print(f"{result['answers_identical']} answers, the same in every run")
