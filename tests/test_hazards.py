"""What else a program does while its pages are merged: forks, signals, closed descriptors, stops, too many mappings."""

from __future__ import annotations

import os
import signal
import textwrap
import time

import pytest

import ksmrs
from children import Child, run, state_of, wait_for

MERGED = """
regions, contents = equal_regions(256, {shared})
wait_merged(512, *regions)
arrays = [region.array(np.uint8, contents.size) for region in regions]
"""


AT_THE_LIMIT = """
import mmap
from mapping_limit import give_mappings_back, take_all_mappings
"""


def hazard(program: str, shared: bool, returncode: int = 0, seconds: float = 120) -> str:
    program = MERGED.format(shared=shared) + textwrap.dedent(program)
    return run(program, returncode=returncode, seconds=seconds)


def test_forks_in_which_both_sides_write(shared: bool) -> None:
    hazard(
        """
        for turn in range(30):
            child = os.fork()
            if child == 0:
                ok = (arrays[0] == contents).all()
                arrays[0][turn * 4096] ^= 0xFF
                expected = contents.copy(); expected[turn * 4096] ^= 0xFF
                ok = ok and (arrays[0] == expected).all()
                os._exit(0 if ok else 9)
            page = (turn + 100) * 4096
            arrays[1][page] ^= 0xFF
            arrays[1][page] ^= 0xFF
            assert os.waitpid(child, 0)[1] == 0, turn
            if {shared}:
                arrays[0][turn * 4096] = contents[turn * 4096]
            assert all((array == contents).all() for array in arrays), turn
            ksmrs.merge(2)
        """.replace("{shared}", str(shared)),
        shared,
    )


def test_fork_storm_with_writing_threads(shared: bool) -> None:
    hazard(
        """
        stop = threading.Event()
        def write(array, step):
            value = 0
            while not stop.is_set():
                value = (value + 1) % 256
                array[step::4096] = value
                assert (array[step::4096] == value).all()
        threads = [threading.Thread(target=write, args=(arrays[0], step)) for step in (1, 2)]
        for thread in threads: thread.start()
        for turn in range(100):
            child = os.fork()
            if child == 0:
                os._exit(0 if (arrays[1] == contents).all() else 9)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        for thread in threads: thread.join()
        assert (arrays[1] == contents).all()
        """,
        shared,
    )


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of the system call is that of x86-64")
def test_a_raw_clone_that_no_fork_handler_saw(shared: bool) -> None:
    hazard(
        """
        import ctypes
        # PyDLL keeps the GIL, so that the child has it: it has one thread, and no handler told it that it is a child.
        clone = ctypes.PyDLL(None).syscall
        for turn in range(20):
            child = clone(56, int(signal.SIGCHLD), 0, 0, 0, 0)
            if child == 0:
                ok = all((array == contents).all() for array in arrays)
                for array in arrays:
                    array[turn * 4096] ^= 0xFF
                    ok = ok and array[turn * 4096] == contents[turn * 4096] ^ 0xFF
                    array[turn * 4096] ^= 0xFF
                ok = ok and all((array == contents).all() for array in arrays)
                os._exit(0 if ok else 9)
            page = (turn + 100) * 4096
            arrays[1][page] ^= 0xFF
            arrays[1][page] ^= 0xFF
            assert os.waitpid(child, 0)[1] == 0, turn
            assert all((array == contents).all() for array in arrays), turn
            wait_merged(512, *regions)
        """,
        shared,
    )


def test_subprocess_storm(shared: bool) -> None:
    hazard(
        """
        for turn in range(60):
            assert subprocess.run(["true"]).returncode == 0
            arrays[turn % 2][turn * 4096] ^= 0xFF
            arrays[turn % 2][turn * 4096] ^= 0xFF
        assert all((array == contents).all() for array in arrays)
        """,
        shared,
    )


def test_all_descriptors_closed_under_us(shared: bool) -> None:
    hazard(
        """
        os.closerange(3, 65536)
        strangers = [os.open("/dev/zero", os.O_RDONLY) for _ in range(64)]
        for array in arrays:
            array[:] = array ^ 0xFF
        assert all((array == contents ^ 0xFF).all() for array in arrays)
        wait_merged(512, *regions)
        assert all((array == contents ^ 0xFF).all() for array in arrays)
        """,
        shared,
    )


def test_a_signal_handler_writes_merged_memory(shared: bool) -> None:
    hazard(
        """
        import itertools
        page = itertools.count()
        def on_alarm(number, frame):
            arrays[0][next(page) % 256 * 4096 + 5] = 77
        signal.signal(signal.SIGALRM, on_alarm)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for turn in range(256):
            arrays[0][turn * 4096 + 9] = 78
            ksmrs.merge(0.01)
        signal.setitimer(signal.ITIMER_REAL, 0)
        expected = contents.copy(); expected[9::4096] = 78
        expected[5::4096][:next(page)] = 77
        assert (arrays[0] == expected).all() and (arrays[1] == contents).all()
        """,
        shared,
    )


def test_at_the_mapping_limit_every_write_succeeds(shared: bool) -> None:
    hazard(
        AT_THE_LIMIT
        + textwrap.dedent("""
        flags = np.empty(contents.shape, bool)  # NumPy must not need a mapping while there is none
        take_all_mappings()
        for page in range(0, 256, 2):
            arrays[0][page * 4096] ^= 0xFF
        for page in range(0, 256, 2):
            arrays[0][page * 4096] ^= 0xFF
        assert all(np.equal(array, contents, out=flags).all() for array in arrays)
        give_mappings_back()
        wait_merged(512, *regions)
        assert all((array == contents).all() for array in arrays)
        """),
        shared,
        seconds=240,
    )


@pytest.mark.parametrize("zeros", [True, False])
def test_at_the_mapping_limit_regions_that_share_a_mapping_are_written(zeros: bool) -> None:
    """The kernel joins mappings of adjoining regions; where none can be split, what lies in all of them is made writable."""
    run(
        AT_THE_LIMIT
        + textwrap.dedent(f"""
        zeros, part, count = {zeros}, 2 << 20, 6
        memory = mmap.mmap(-1, count * part)
        array = np.frombuffer(memory, np.uint8)
        contents = np.zeros(array.shape, np.uint8)
        if not zeros:
            contents[:] = np.random.default_rng(3).integers(1, 255, contents.size, np.uint8)
        array[:] = contents
        twins = [] if zeros else [ksmrs.array(contents, shared=True)]
        for first in range(0, len(memory), part):
            ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE, first, part)
        pages = len(memory) // 4096
        def merged():
            ksmrs.merge(5)
            stats = ksmrs.process_stats()
            return stats.ksm_zero_pages == pages if zeros else stats.ksm_merging_pages == 2 * pages
        wait_for(merged, "merging", 60)
        ksmrs.tunables.run = 0
        flags = np.empty(contents.shape, bool)
        for page in range(1, pages, 101):
            take_all_mappings()
            array[page * 4096] ^= 0xFF
            contents[page * 4096] ^= 0xFF
        assert np.equal(array, contents, out=flags).all()
        give_mappings_back()
        os._exit(0)
        """),
        seconds=100,
    )


def test_at_the_mapping_limit_opting_in_says_so_or_works(shared: bool) -> None:
    """Where not even a list of the mappings would find memory."""
    run(
        AT_THE_LIMIT
        + textwrap.dedent(f"""
        memory = mmap.mmap(-1, 2 << 20, mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if {shared} else mmap.MAP_PRIVATE))
        memory[::4096] = bytes(i % 256 for i in range(512))
        begun = ksmrs.Region(4096)
        take_all_mappings()
        try:
            ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
        except ksmrs.SystemCallError as refused:
            assert "Cannot allocate memory" in str(refused), refused
        give_mappings_back()
        ksmrs.madvise(memory, ksmrs.MADV_MERGEABLE)
        assert memory[::4096] == bytes(i % 256 for i in range(512))
        """)
    )


@pytest.mark.once
def test_a_stopped_client_and_its_proposals(shared: bool) -> None:
    """A client is stopped while it merges; others go on; when it wakes nothing is wrong."""
    program = (
        MERGED.format(shared=shared)
        + """
print("ready", flush=True)
for line in sys.stdin:
    for array in arrays:
        array[::4096] = int(line) % 256
        contents[::4096] = int(line) % 256
    ksmrs.merge(2)
    print(all((array == contents).all() for array in arrays), flush=True)
"""
    )
    with Child(program) as stopped, Child(program) as running:
        stopped.line()
        running.line()
        for turn in range(10):
            stopped.tell(str(turn))
            os.kill(stopped.pid, signal.SIGSTOP)
            wait_for(lambda: state_of(stopped.pid) == "T", "the stop")
            running.tell(str(turn + 1))
            assert running.line() == "True"
            os.kill(stopped.pid, signal.SIGCONT)
            assert stopped.line() == "True"
        for child in (stopped, running):
            child.end_of_input()
            child.end()


def test_a_killed_client_leaves_nothing(shared: bool) -> None:
    with Child(MERGED.format(shared=shared) + "\nprint('ready', flush=True); time.sleep(600)") as child:
        child.line()
        assert ksmrs.stats().frames > 0
        child.kill()
        wait_for(lambda: ksmrs.stats().frames == 0, "the release of the frames of a killed client")
        wait_for(lambda: ksmrs.stats().clients <= 1, "the end of a killed client")


def test_at_exit_threads_still_write(shared: bool) -> None:
    """Daemon threads write merged memory while the interpreter ends: no crash, exit status 0."""
    hazard(
        """
        def write():
            while True:
                for page in range(256):
                    arrays[0][page * 4096] += 1
        for _ in range(2):
            threading.Thread(target=write, daemon=True).start()
        """,
        shared,
    )


@pytest.mark.parametrize("how", ["os._exit(0)", "sys.exit(0)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_every_way_to_end(shared: bool, how: str) -> None:
    hazard(how, shared, returncode=-signal.SIGTERM if "SIGTERM" in how else 0)


@pytest.mark.once
def test_a_process_that_was_stopped_does_not_take_its_broker_for_silent() -> None:
    with Child(
        """
        region = ksmrs.Region(64 * 4096)
        region.array(np.uint8, region.nbytes)[:] = 7
        stop, errors = threading.Event(), []
        def merge():
            try:
                while not stop.is_set():
                    ksmrs.merge(0.01)
            except ksmrs.KsmrsError as error:
                errors.append(error)
        threads = [threading.Thread(target=merge) for _ in range(4)]
        for thread in threads: thread.start()
        print("merging")
        input()
        ksmrs.merge(5)
        stop.set()
        for thread in threads: thread.join()
        assert not errors, errors
        """
    ) as child:
        assert child.line() == "merging"
        child.kill(signal.SIGSTOP)
        time.sleep(6)  # longer than a broker may take over its time
        child.kill(signal.SIGCONT)
        child.tell()
        child.end()
