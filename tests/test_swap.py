"""Under memory pressure: no byte is lost on its way through swap, and what is in swap is not brought back to be scanned.

Needs root: for a swap file where there is no swap, and for a memory cgroup that has the pressure to itself. Both go again.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from children import TESTS, Child, kill_brokers

MIB = 1 << 20
LEAST = 512 * MIB
CGROUPS = Path("/sys/fs/cgroup")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="swap files and cgroups are root's"),
    pytest.mark.timeout(200),
]


def vm(name: str) -> int:
    line = next(line for line in Path("/proc/vmstat").read_text().splitlines() if line.startswith(name + " "))
    return int(line.split()[1])


@pytest.fixture(scope="module", autouse=True)
def swap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    free = re.search(r"^SwapFree:\s+(\d+)", Path("/proc/meminfo").read_text(), re.M)
    if free and int(free[1]) * 1024 >= LEAST:
        yield
        return
    file = tmp_path_factory.mktemp("swap") / "file"
    file.write_bytes(b"")
    file.chmod(0o600)
    with file.open("r+b") as made:
        for _ in range(LEAST // MIB):
            made.write(bytes(MIB))
    try:
        for command in ("mkswap", "swapon"):
            subprocess.run([command, file], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as refused:
        file.unlink()
        pytest.skip(f"no swap: {refused}")
    yield
    subprocess.run(["swapoff", file], check=True)
    file.unlink()


class Pressure:
    """A memory cgroup of version 1 or 2."""

    def __init__(self) -> None:
        of_memory = re.compile(r"^\d+:(?:.*\bmemory\b.*|):(.*)$", re.M)
        paths = [found[1].lstrip("/") for found in of_memory.finditer(Path("/proc/self/cgroup").read_text())]
        roots = [CGROUPS / "memory" / path for path in paths] + [CGROUPS / path for path in paths]
        for root in roots:
            self.path = root / f"ksmrs-test-{os.getpid()}"
            with suppress(OSError):
                self.path.mkdir()
                if any((self.path / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
                    return
                self.path.rmdir()
        pytest.skip("no memory cgroup can be made")

    def limit(self, nbytes: int) -> None:
        second = self.path / "memory.max"
        (second if second.exists() else self.path / "memory.limit_in_bytes").write_text(str(nbytes))

    def swap_out(self) -> None:
        """Everything in it, as far as the kernel likes."""
        second = self.path / "memory.reclaim"
        with suppress(OSError):
            if second.exists():
                second.write_text(f"{LEAST} swappiness=200")
            else:
                (self.path / "memory.force_empty").write_text("1")

    def end(self) -> None:
        until = time.monotonic() + 10
        while True:
            try:
                return self.path.rmdir()
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)


@pytest.fixture
def pressure(runtime_dir: Path) -> Iterator[Pressure]:
    made = Pressure()
    yield made
    kill_brokers(runtime_dir)
    made.end()


@pytest.mark.parametrize("dirty_tracking", [True, False])
def test_what_is_in_swap_stays_there(shared: bool, dirty_tracking: bool, pressure: Pressure) -> None:
    program = f"""
        import re
        from pathlib import Path
        Path({str(pressure.path / "cgroup.procs")!r}).write_text(str(os.getpid()))
        ksmrs.connect(dirty_tracking={dirty_tracking})
        ksmrs.tunables.advisor_mode, ksmrs.tunables.smart_scan = "none", 0
        ksmrs.tunables.pages_to_scan, ksmrs.tunables.sleep_millisecs = 100_000, 10
        array = ksmrs.array(np.frombuffer(np.random.default_rng(1).bytes(64 << 20), np.uint8), shared={shared})
        begin = array.__array_interface__["data"][0]
        def resident():
            mib, inside = 0, False
            for line in Path("/proc/self/smaps").read_text().splitlines():
                if (found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
                    inside = begin <= int(found[1], 16) < begin + array.nbytes
                elif inside and line.startswith("Rss:"):
                    mib += int(line.split()[1]) / 1024
            return mib
        def passes(count):
            before = ksmrs.stats().full_scans
            wait_for(lambda: ksmrs.stats().full_scans >= before + count, "passes", 60)
        passes(6)
        assert resident() > 60
        ksmrs.tunables.run = 0
        print("scanned", flush=True)
        sys.stdin.readline()
        wait_for(lambda: resident() < 4, "swapping", 30)
        ksmrs.tunables.run = 1
        passes(4)
        print(resident(), flush=True)
        expected = np.frombuffer(np.random.default_rng(1).bytes(64 << 20), np.uint8)
        assert (array == expected).all()
        """
    with Child(program) as child:
        assert child.line() == "scanned"
        pressure.swap_out()
        child.tell()
        assert float(child.line()) < 8
        child.end()


def test_the_oracle_finds_nothing_under_pressure(pressure: Pressure) -> None:
    seconds = 20
    program = f"""
        from pathlib import Path
        Path({str(pressure.path / "cgroup.procs")!r}).write_text(str(os.getpid()))
        os.execv(sys.executable, [sys.executable, {str(TESTS / "oracle.py")!r}, "{seconds}"])
        """
    # It needs about 240 MiB.
    pressure.limit(150 * MIB)
    out, back = vm("pswpout"), vm("pswpin")
    with Child(program) as child:
        child.end(seconds=120)
    swapped = vm("pswpout") - out, vm("pswpin") - back
    assert min(swapped) > 500, f"hardly anything was swapped: {swapped}; this tests nothing"
