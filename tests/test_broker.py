"""The broker as a process: how it starts, where, how light it is, and whom it trusts."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

import ksmrs
from children import Child, brokers_in, kill_brokers, run, wait_for
from ksmrs import _ksmrs


def resident(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_the_first_region_starts_one_broker(runtime_dir: Path) -> None:
    assert brokers_in(runtime_dir) == []
    program = 'region = ksmrs.Region(4096); print("ready", flush=True); sys.stdin.readline()'
    children = [Child(program) for _ in range(4)]
    try:
        for child in children:
            assert child.line() == "ready"
        wait_for(lambda: len(brokers_in(runtime_dir)) == 1, "one broker")
        wait_for(lambda: ksmrs.stats().clients >= 4, "four clients")
        assert len(brokers_in(runtime_dir)) == 1
    finally:
        for child in children:
            child.tell()
            child.end()


def test_it_is_light_and_a_daemon(runtime_dir: Path) -> None:
    ksmrs.connect()
    (pid,) = brokers_in(runtime_dir)
    status = _ksmrs.status()
    assert status is not None
    assert status["pid"] == pid
    assert resident(pid) < 24 << 20
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "numpy" not in maps
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) != os.getsid(0)
    for number in range(3):
        assert os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/null"


def test_the_runtime_directory_is_ours_alone(runtime_dir: Path) -> None:
    target = runtime_dir / "made"
    run(f"ksmrs.connect({str(target)!r})")
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    for entry in target.iterdir():
        assert stat.S_IMODE(entry.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("trap", ["link", "open", "file", "stranger"])
def test_a_directory_that_others_could_reach_is_refused(runtime_dir: Path, trap: str) -> None:
    real = runtime_dir / "real"
    real.mkdir(mode=0o700)
    target = real
    if trap == "link":
        target = runtime_dir / "link"
        target.symlink_to(real)
    elif trap == "open":
        real.chmod(0o755)
    elif trap == "file":
        target = runtime_dir / "file"
        target.write_text("")
    elif os.geteuid() == 0:
        os.chown(real, 65534, 65534)
    else:
        target = Path("/proc/1")
    output = run(
        f"""
        try:
            ksmrs.connect({str(target)!r})
        except ksmrs.KsmrsError as refused:
            print(isinstance(refused, OSError), {str(target)!r} in str(refused))
        """
    )
    assert output.split() == ["True", "True"]
    assert list(real.iterdir()) == []
    assert brokers_in(runtime_dir) == []


def test_it_goes_when_idle(runtime_dir: Path) -> None:
    run("ksmrs.connect()", KSMRS_IDLE_SECONDS="1")
    wait_for(lambda: brokers_in(runtime_dir) == [], "the end of an idle broker", 20)


def test_the_next_one_starts_by_itself(runtime_dir: Path) -> None:
    with Child(
        """
        region = ksmrs.Region(1 << 20)
        for line in sys.stdin:
            wait_for(lambda: ksmrs.stats().regions == 1, "the region's return")
            print("joined", flush=True)
        """
    ) as child:
        child.tell()
        assert child.line() == "joined"
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            (old,) = kill_brokers(runtime_dir, number)
            child.tell()
            assert child.line() == "joined"
            assert brokers_in(runtime_dir) not in ([], [old])
        child.end_of_input()
        child.end()


def test_disconnect_and_connect_again() -> None:
    run(
        """
        regions, contents = equal_regions(64)
        wait_merged(128, *regions)
        ksmrs.disconnect()
        ksmrs.disconnect()
        for region in regions:
            assert bytes(region) == contents.tobytes()
            region.array(np.uint8, 1)[:] = 1
        ksmrs.connect()
        wait_merged(128, *regions)
        assert all(bytes(region)[1:] == contents.tobytes()[1:] for region in regions)
        """
    )


def test_connecting_differently_is_an_error() -> None:
    run(
        """
        ksmrs.connect(domain="a")
        ksmrs.connect(domain="a")
        try:
            ksmrs.connect(domain="b")
        except ksmrs.BrokerError:
            ksmrs.disconnect()
        ksmrs.connect(domain="b")
        """
    )


def test_an_empty_domain_is_a_value_error() -> None:
    with pytest.raises(ksmrs.ArgumentError, match="domain"):
        ksmrs.connect(domain="")
