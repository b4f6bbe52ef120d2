"""A whole program's NumPy arrays in mergeable memory: who is reached, what becomes of memory, and that no byte is ever wrong.

Each program runs in a child, for what `merge_process` does to NumPy cannot be undone. What merged is read from the child's own
counters, what was saved from its PSS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from children import TESTS, Child, run

PAGE = 4096
PRELUDE = """
    import asyncio, contextvars, re
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from ksmrs import _ksmrs
    PAGE, MIB = 4096, 1 << 20
    def is_lent(array):
        return _ksmrs.is_lent(array.__array_interface__["data"][0])
    def chance(seed, nbytes=MIB):
        return np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)
    def merging():
        # Counters change with a look at every page.
        ksmrs.merge(60)
        return ksmrs.process_stats().ksm_merging_pages
    def pss():
        return int(re.search(r"^Pss:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) << 10
"""


def program(text: str, *, on: bool = True) -> str:
    """Run a program with what the tests here use, the program's arrays in mergeable memory from the start."""
    begin = "ksmrs.merge_process(True)\n" if on else ""
    return run(dedent(PRELUDE) + begin + dedent(text), PYTHONPATH=str(TESTS))


def test_arrays_are_numpys_own_in_every_respect() -> None:
    program(
        """
        a = np.arange(MIB // 8)
        assert is_lent(a) and a.flags.owndata and a.base is None
        address = a.ctypes.data
        a.resize(MIB // 8 - 100)  # in place
        assert a.ctypes.data == address and (a == np.arange(MIB // 8 - 100)).all()
        a.resize(4 * MIB // 8)
        assert is_lent(a) and (a[:1000] == np.arange(1000)).all() and not a[MIB // 8 :].any()
        a.resize(10)  # moves out: a small array keeps no large block
        assert not is_lent(a) and (a == np.arange(10)).all()
        for nbytes in (65536, 65537, 100_000, MIB, 3 * MIB + 5, 40 * MIB, 100 * MIB + 1):
            for make in (np.empty, np.zeros, np.ones):
                array = make(nbytes, np.uint8)
                assert is_lent(array) and array.ctypes.data % PAGE == 0, (nbytes, make)
                array[:: PAGE] = 5
                array[-1] = 5
        assert not is_lent(np.empty(65535, np.uint8))
        assert ksmrs.process_stats().numpy_allocator == "every thread"
        found = [finding for finding in ksmrs.doctor() if finding.name == "NumPy's allocator"]
        assert [finding.state for finding in found] == ["ok"]
        """
    )


def test_a_size_is_at_least_a_page() -> None:
    run(
        """
        for size in (0, 4095, -1):
            try:
                ksmrs.merge_process(True, min_size=size)
            except ValueError as refused:
                assert str(size) in str(refused)
            else:
                raise AssertionError(size)
        assert ksmrs.process_stats().numpy_allocator == "off"
        ksmrs.merge_process(True, min_size=4096)
        from ksmrs import _ksmrs
        arrays = [np.empty(nbytes, np.uint8) for nbytes in (4096, 4095)]
        assert [_ksmrs.is_lent(array.ctypes.data) for array in arrays] == [True, False]
        """
    )


def test_every_thread_and_every_context_is_reached() -> None:
    program(
        """
        before = ThreadPoolExecutor(1)
        before.submit(int).result()
        ksmrs.merge_process(True)
        make = lambda: np.ones(MIB, np.uint8)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(make()))
        thread.start()
        thread.join()
        with ThreadPoolExecutor(4) as pool:
            seen += pool.map(lambda _: make(), range(16))
        seen.append(before.submit(make).result())  # a thread from before
        before.shutdown()
        seen.append(contextvars.Context().run(make))
        async def gathered():
            return [make(), await asyncio.to_thread(make), await asyncio.get_running_loop().run_in_executor(None, make)]
        seen += asyncio.run(gathered())
        assert len(seen) == 22 and all(map(is_lent, seen)), [is_lent(array) for array in seen]
        """,
        on=False,
    )


def test_where_numpys_functions_cannot_be_replaced_threads_are_given_a_handler() -> None:
    program(
        """
        import logging
        logging.disable()
        _ksmrs.replace_numpy_functions = lambda: False
        ksmrs.merge_process(True)
        assert ksmrs.process_stats().numpy_allocator == "the context of merge_process and threads started since"
        found = [finding for finding in ksmrs.doctor() if finding.name == "NumPy's allocator"]
        assert [finding.state for finding in found] == ["limited"] and found[0].next_step
        make = lambda: np.ones(MIB, np.uint8)
        here = make()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(make()))
        thread.start()
        thread.join()
        assert "run" not in vars(thread)
        with ThreadPoolExecutor(2) as pool:
            seen += pool.map(lambda _: make(), range(4))
        assert is_lent(here) and all(map(is_lent, seen)) and len(seen) == 5
        assert not is_lent(contextvars.Context().run(make))  # as documented
        here.resize(3 * MIB)
        assert is_lent(here) and here[:MIB].all() and not here[MIB:].any()
        ksmrs.merge_process(False)
        assert not is_lent(make())
        del here, seen
        """,
        on=False,
    )


def test_equal_arrays_of_two_processes_are_one_memory() -> None:
    text = dedent(
        PRELUDE
        + """
    ksmrs.merge_process(True)
    rest = pss()
    arrays = [chance(seed, 16 * MIB).copy() for seed in range(2)] + [np.zeros(16 * MIB, np.uint8)]
    arrays[2][:: PAGE] = 0
    print(pss())
    sys.stdin.readline()
    print(pss())
    sys.stdin.readline()
    for array in arrays:
        array.view(np.uint8)[5 :: PAGE] ^= 1
    for seed in range(2):
        wanted = chance(seed, 16 * MIB).copy()
        wanted[5 :: PAGE] ^= 1
        assert (arrays[seed] == wanted).all()
    print("written")
    sys.stdin.readline()
    """
    )
    import ksmrs

    with Child(text) as first, Child(text) as second:
        alone = [int(child.line()) for child in (first, second)]
        # Another process's arrays take part once they outlived a pass.
        for _ in range(3):
            ksmrs.merge(60)
        pages = 32 << 20 >> 12
        stats = ksmrs.stats()
        assert (stats.pages_shared, stats.pages_sharing, stats.ksm_zero_pages) == (pages, pages, pages), stats
        for child in (first, second):
            child.tell()
        merged = [int(child.line()) for child in (first, second)]
        # Half of 32 MiB, for the frames are both children's, and all of the zeros.
        saved = [before - after for before, after in zip(alone, merged, strict=True)]
        assert min(saved) > 30 << 20, (alone, merged)
        for child in (first, second):
            child.tell()
            assert child.line() == "written"
        for child in (first, second):
            child.tell()
            child.end()


def test_memory_from_before_and_after_mixes() -> None:
    program(
        """
        old = [np.full(size, size % 251, np.uint8) for size in (10, 5000, 70_000, 3 * MIB)]
        ksmrs.merge_process(True)
        assert not any(map(is_lent, old))
        for array in old:
            size = array.size
            array.resize(2 * MIB + size, refcheck=False)  # by the functions that made it
            assert (array[:size] == size % 251).all() and not array[size:].any()
        new = [np.full(size, size % 251, np.uint8) for size in (10, 5000, 70_000, 3 * MIB)]
        assert [is_lent(array) for array in new] == [False, False, True, True]
        ksmrs.merge_process(False)
        for array in new:
            size = array.size
            array.resize(5 * size, refcheck=False)
            assert (array[:size] == size % 251).all() and not array[size:].any()
        # Freed where nobody made them, and while merging is off, too.
        def drop(arrays):
            while arrays:
                arrays.pop()
        for arrays in (old, new):
            thread = threading.Thread(target=drop, args=(arrays,))
            thread.start()
            thread.join()
        ksmrs.merge_process(True)
        assert is_lent(np.empty(MIB, np.uint8)) and ksmrs.process_stats().numpy_bytes == 0
        """,
        on=False,
    )


def test_zeros_are_zeros_whatever_was_there_before() -> None:
    program(
        """
        for nbytes in (MIB, 48 * MIB):
            for merge in (False, True):
                for fill in (chance(3, nbytes), bytes(nbytes)):
                    fill = np.frombuffer(fill, np.uint8)
                    pair = [fill.copy(), fill.copy()]
                    address = pair[0].ctypes.data
                    if merge:
                        assert merging() + ksmrs.process_stats().ksm_zero_pages >= 2 * nbytes // PAGE
                    del pair
                    for _ in range(3):
                        again = [np.zeros(nbytes, np.uint8) for _ in range(3)]
                        assert not any(array.any() for array in again), (nbytes, merge)
                        for array in again:
                            array[:] = 1
                    del again
        """
    )


def test_freed_memory_is_abandoned_and_not_copied() -> None:
    program(
        """
        arrays = [chance(7, 64 * MIB).copy() for _ in range(2)]
        assert merging() == 2 * 64 * 256
        before, faults = pss(), __import__("resource").getrusage(0).ru_minflt
        arrays.clear()
        # Copies would be 128 MiB, by faults or by the kernel.
        assert __import__("resource").getrusage(0).ru_minflt - faults < 2000
        assert pss() < before + 4 * MIB
        assert merging() == 0
        wait_for(lambda: ksmrs.stats().frames == 0, "the end of frames that nobody shows")
        assert ksmrs.process_stats().numpy_kept_bytes <= 64 * MIB
        """
    )


def test_what_is_kept_is_bounded_and_free_arenas_end() -> None:
    program(
        """
        arrays = [np.ones(20 * MIB, np.uint8) for _ in range(30)]
        regions = len(re.findall(r"rw-p", Path("/proc/self/maps").read_text()))
        full = pss()
        arrays.clear()
        assert ksmrs.process_stats().numpy_kept_bytes <= 64 * MIB
        assert pss() < full - 500 * MIB, (pss(), full)
        wait_for(lambda: _ksmrs.heap_bytes()[0] <= 3 * 64 * MIB, "the end of free arenas")
        ksmrs.merge(30)
        assert ksmrs.stats().regions <= 3, ksmrs.stats()
        """
    )


def test_what_is_kept_goes_back_when_nothing_comes_for_it() -> None:
    """Not what a program has use for: arrays that come and go meanwhile keep theirs."""
    program(
        """
        held = chance(1, 4 * MIB).copy()
        before = pss()
        np.ones(32 * MIB, np.uint8)  # freed at once: twice as much is kept at most
        freed = [np.ones(2 * MIB, np.uint8) for _ in range(16)]
        del freed
        assert ksmrs.process_stats().numpy_kept_bytes >= 32 * MIB and pss() > before + 30 * MIB
        addresses, used = set(), 0
        def still_kept():
            # Two at a time, of another size.
            global used
            first, second = np.ones(MIB, np.uint8), np.ones(MIB, np.uint8)
            addresses.update((first.ctypes.data, second.ctypes.data))
            used += 1
            return ksmrs.process_stats().numpy_kept_bytes
        wait_for(lambda: still_kept() <= 2 * MIB, "the end of what nobody came for", 60)
        assert ksmrs.process_stats().numpy_kept_bytes == 2 * MIB and pss() < before + 6 * MIB
        assert used > 100 and len(addresses) == 2, (used, addresses)
        assert (held == chance(1, 4 * MIB)).all() and not np.zeros(2 * MIB, np.uint8).any()
        """
    )


def test_only_what_outlives_a_pass_takes_part() -> None:
    program(
        """
        ksmrs.tunables.run = 0
        kept = chance(1, 8 * MIB).copy()
        assert ksmrs.process_stats().numpy_mergeable_bytes == 0
        ksmrs.tunables.advisor_mode = "none"
        ksmrs.tunables.sleep_millisecs = 1
        ksmrs.tunables.pages_to_scan = 100_000
        ksmrs.tunables.run = 1
        scans = ksmrs.stats().full_scans
        wait_for(lambda: ksmrs.stats().full_scans > scans + 2, "passes")
        # It takes part by itself, with nobody asking for a merge.
        wait_for(lambda: ksmrs.process_stats().numpy_mergeable_bytes == kept.nbytes, "taking part")
        ksmrs.tunables.run = 0
        scans = ksmrs.stats().full_scans
        wait_for(lambda: ksmrs.stats().full_scans == scans, "the end of passes")
        after = chance(2, 8 * MIB).copy()
        assert ksmrs.process_stats().numpy_mergeable_bytes == kept.nbytes
        """
    )


def test_off_gives_everything_memory_of_its_own() -> None:
    program(
        """
        arrays = [chance(1, 8 * MIB).copy() for _ in range(3)] + [np.zeros(4 * MIB, np.uint8)]
        arrays[3][0] = 0
        small = pss()
        assert merging() >= 3 * 8 * 256
        merged = pss()
        assert merged < small - 14 * MIB
        kept = ksmrs.process_stats().numpy_kept_bytes
        ksmrs.merge_process(False)
        assert ksmrs.process_stats().numpy_mergeable_bytes == 0 and pss() + kept > merged + 14 * MIB
        assert merging() == 0
        assert all((array == chance(1, 8 * MIB)).all() for array in arrays[:3]) and not arrays[3].any()
        assert not is_lent(np.empty(MIB, np.uint8))
        assert ksmrs.process_stats().numpy_allocator == "off"
        # And on again: what is there takes part again.
        ksmrs.merge_process(True)
        assert merging() >= 3 * 8 * 256
        """
    )


def test_parts_are_pinned_and_opted_out_as_other_memory_is() -> None:
    program(
        """
        pair = [chance(1).copy() for _ in range(2)]
        assert merging() == 512
        with ksmrs.pinned(pair[0]):
            assert merging() == 256
        assert merging() == 512
        ksmrs.madvise(pair[1], ksmrs.MADV_UNMERGEABLE, 0, 64 * PAGE)
        assert merging() == 512 - 64
        ksmrs.madvise(pair[1], ksmrs.MADV_MERGEABLE)
        assert merging() == 512
        # Who gets the memory next knows nothing of that.
        ksmrs.madvise(pair[1], ksmrs.MADV_UNMERGEABLE)
        content, address = chance(1), pair.pop().ctypes.data
        pair.append(content.copy())
        assert pair[1].ctypes.data == address and merging() == 512
        # Pinned while out of merging, it stays out.
        ksmrs.tunables.run = 0
        lent = ksmrs.process_stats().numpy_mergeable_bytes
        other = np.ones(MIB, np.uint8)
        with ksmrs.pinned(other):
            pass
        assert ksmrs.process_stats().numpy_mergeable_bytes == lent
        """
    )


def test_arrays_of_ksmrs_are_numpys_where_those_merge() -> None:
    program(
        """
        ksmrs.tunables.run = 0
        address = np.full(MIB, 3, np.uint8).__array_interface__["data"][0]  # freed, and next in line
        for array in (ksmrs.empty((256, 4096), "u1", "F"), ksmrs.zeros(MIB, "u1"), ksmrs.array(chance(1))):
            assert is_lent(array) and array.base is None and array.flags.owndata
            assert array.any() == (array.ndim == 1 and array[0] == chance(1)[0])
        assert ksmrs.process_stats().numpy_mergeable_bytes >= MIB
        for array in (ksmrs.zeros(MIB, "u1", shared=True), ksmrs.zeros(5000, "u1")):  # a region of their own
            assert not is_lent(array) and array.base is not None
        """
    )


def test_a_forked_child_goes_on() -> None:
    program(
        """
        arrays = [chance(1, 8 * MIB).copy() for _ in range(2)]
        assert merging() == 2 * 2048
        def child():
            assert is_lent(np.empty(MIB, np.uint8))  # at once
            assert (arrays[0] == chance(1, 8 * MIB)).all()
            arrays[0][:] = 3
            mine = chance(1, 8 * MIB).copy()
            assert is_lent(mine)
            wait_for(lambda: merging() >= 2 * 2048, "merging in the child")
            assert ksmrs.process_stats().numpy_bytes == 3 * 8 * MIB
            arrays.clear()  # inherited, and merged
            zeros = [np.zeros(8 * MIB, np.uint8) for _ in range(3)]
            assert not any(array.any() for array in zeros) and (mine == chance(1, 8 * MIB)).all()
        pid = os.fork()
        if pid == 0:
            try:
                child()
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert all((array == chance(1, 8 * MIB)).all() for array in arrays)
        """
    )


def test_a_child_forked_before_the_first_array_merges() -> None:
    """As a server does that opts in before it forks its workers."""
    program(
        """
        ends = []
        for number in range(2):
            ours, theirs = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    mine = chance(1, 8 * MIB).copy()
                    assert is_lent(mine)
                    wait_for(lambda: merging() >= 2048, "merging with a sibling", 60)
                    os.write(theirs, b"merged")
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                time.sleep(1000)  # until it is killed
            os.close(theirs)
            ends.append((pid, ours))
        for pid, ours in ends:
            assert os.read(ours, 10) == b"merged"
        for pid, _ in ends:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        """
    )


def test_a_child_that_no_python_forked_only_reads_and_frees() -> None:
    program(
        """
        import ctypes
        arrays = [chance(1, 8 * MIB).copy() for _ in range(2)]
        loose = chance(2, 8 * MIB).copy()
        assert merging() == 2 * 2048
        pid = ctypes.PyDLL(None).fork()
        if pid == 0:
            status = 1
            try:
                assert not is_lent(np.empty(MIB, np.uint8))
                assert (arrays[0] == chance(1, 8 * MIB)).all() and (loose == chance(2, 8 * MIB)).all()
                arrays[1][:: PAGE] = 1
                del arrays[0], loose
                zeros = [np.zeros(8 * MIB, np.uint8) for _ in range(3)]
                assert not any(array.any() for array in zeros)
                arrays.clear()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert all((array == chance(1, 8 * MIB)).all() for array in arrays) and (loose == chance(2, 8 * MIB)).all()
        assert merging() == 2 * 2048
        """
    )


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_are_opted_in_by_their_initializer(method: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        f"""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import numpy as np
import ksmrs
def work(number):
    from ksmrs import _ksmrs
    array = np.ones(1 << 20, np.uint8)
    return _ksmrs.is_lent(array.ctypes.data), ksmrs.process_stats().numpy_allocator
if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    with ProcessPoolExecutor(2, context, initializer=ksmrs.worker_init) as pool:
        assert set(pool.map(work, range(8))) == {{(True, "every thread")}}
    with context.Pool(1) as pool:
        assert pool.map(work, [1]) == [(False, "off")]
"""
    )
    import subprocess

    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_environment_opts_in_programs_that_never_heard_of_ksmrs(tmp_path: Path) -> None:
    import subprocess

    script = tmp_path / "app.py"
    script.write_text(
        "import sys\n"
        "assert 'numpy' not in sys.modules\n"
        "import numpy as np, subprocess\n"
        "array, small = np.ones(1 << 20, np.uint8), np.ones(5000, np.uint8)\n"
        "again = [sys.executable, __file__, 'inner']\n"
        "inner = subprocess.run(again, capture_output=True, text=True) if not sys.argv[1:] else None\n"
        "from ksmrs import _ksmrs\n"
        "print(_ksmrs.is_lent(array.ctypes.data), _ksmrs.is_lent(small.ctypes.data), sys.argv[1:])\n"
        "print(inner.stdout + inner.stderr if inner else '', end='')\n"
    )

    def output(*command: str | Path, **environment: str) -> list[str]:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        return done.stdout.splitlines()

    assert output(sys.executable, script) == ["False False []", "False False ['inner']"]
    for value in ("0", "", "off"):
        assert output(sys.executable, script, KSMRS_MERGE_PROCESS=value) == ["False False []", "False False ['inner']"]
    assert output(sys.executable, script, KSMRS_MERGE_PROCESS="1") == ["True False []", "True False ['inner']"]
    ksmrs = [sys.executable, "-m", "ksmrs"]
    assert output(*ksmrs, "run", "--", sys.executable, script, "--inner") == ["True False ['--inner']"]
    assert output(*ksmrs, "run", "--min-size", "4096", sys.executable, script) == [
        "True True []",
        "True True ['inner']",
    ]
    # A program must not fail for what it did not ask for.
    done = subprocess.run(
        [sys.executable, "-c", "import numpy; print(numpy.ones(9).sum())"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KSMRS_MERGE_PROCESS": "1", "KSMRS_MERGE_PROCESS_MIN_SIZE": "many"},
    )
    assert done.stdout == "9.0\n" and "'many'" in done.stderr, done


def test_a_command_that_does_not_exist_is_said_so() -> None:
    from click.testing import CliRunner

    from ksmrs.cli import main

    missing = CliRunner().invoke(main, ["run", "/nonexistent/program"], env={"KSMRS_MERGE_PROCESS": None})
    os.environ.pop("KSMRS_MERGE_PROCESS", None)
    assert missing.exit_code == 127 and "No such file" in missing.output


LIBRARIES = {
    "pandas": """
        import pandas as pd
        ROWS = 64_000
        def frame():
            g = np.random.default_rng(1)
            return pd.DataFrame({"a": g.random(ROWS), "b": g.random(ROWS), "k": g.integers(0, 100, ROWS)})
        frames = [frame() for _ in range(3)]
        def results(df):
            yield df.groupby("k").agg({"a": "sum", "b": "median"})
            yield df.sort_values(["b", "k"])
            yield df[["a", "b"]].rolling(50).mean()
            yield df.pivot_table(index="k", values="a", aggfunc="mean")
            yield df.copy()
        wanted = list(results(frame()))
        for _ in range(3):
            assert merging() >= 3 * 3 * (ROWS * 8 // PAGE - 1), ksmrs.process_stats()
            for df in frames:
                for got, right in zip(results(df), wanted, strict=True):
                    pd.testing.assert_frame_equal(got, right, check_exact=True)
                df.loc[::400, "a"] *= 1.0
        """,
    "sklearn": """
        import warnings
        from sklearn.ensemble import RandomForestRegressor
        from sklearn.neighbors import KNeighborsRegressor
        from sklearn.neural_network import MLPRegressor
        warnings.simplefilter("ignore")
        g = np.random.default_rng(1)
        data, asked = g.random((4000, 32)), g.random((50, 32))
        target = data[:, 0] * 3 + g.random(4000)
        def fitted():
            return [
                KNeighborsRegressor(algorithm="kd_tree").fit(data.copy(), target),
                MLPRegressor(hidden_layer_sizes=(200, 200), max_iter=2, random_state=0).fit(data, target),
                RandomForestRegressor(n_estimators=2, n_jobs=2, random_state=0).fit(data, target),
            ]
        import pickle
        models = fitted()
        wanted = [model.predict(asked) for model in models]
        twins = [pickle.loads(pickle.dumps(models)) for _ in range(2)]
        assert merging() > 450, ksmrs.process_stats()
        for twin in twins:
            assert all((model.predict(asked) == right).all() for model, right in zip(twin, wanted, strict=True))
        again = fitted()
        assert all(np.allclose(model.predict(asked), right) for model, right in zip(again, wanted, strict=True))
        """,
    "joblib": """
        import joblib
        from joblib import Parallel, delayed
        def work(seed):
            import numpy as np, ksmrs
            from ksmrs import _ksmrs
            array = np.random.default_rng(seed).random(1 << 17)
            return _ksmrs.is_lent(array.ctypes.data), float(array.sum())
        wanted = [float(np.random.default_rng(seed).random(1 << 17).sum()) for seed in range(8)]
        threads = Parallel(2, backend="threading")(delayed(work)(seed) for seed in range(8))
        assert threads == [(True, right) for right in wanted]
        with joblib.parallel_config(backend="loky", n_jobs=2, initializer=ksmrs.worker_init):
            loky = Parallel()(delayed(work)(seed) for seed in range(8))
        assert loky == [(True, right) for right in wanted], loky
        """,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_whose_arrays_all_merge(library: str) -> None:
    pytest.importorskip(library)
    program(LIBRARIES[library])
