"""Whom `merge_process` reaches: threads, contexts, workers, and programs that never heard of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from whole_programs import program


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
        here.resize(3 * MIB, refcheck=False)
        assert is_lent(here) and here[:MIB].all() and not here[MIB:].any()
        ksmrs.merge_process(False)
        assert not is_lent(make())
        del here, seen
        """,
        on=False,
    )


def test_what_somebody_else_put_in_our_place_stays() -> None:
    program(
        """
        import ctypes
        functions = numpy_functions()
        Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        before, freed = functions[4], []
        ours = Free(before)
        theirs = Free(lambda context, memory, nbytes: (freed.append(nbytes), ours(context, memory, nbytes))[0])
        array = np.ones(MIB, np.uint8)
        functions[4] = ctypes.cast(theirs, ctypes.c_void_p)
        ksmrs.merge_process(True)
        assert functions[4] == ctypes.cast(theirs, ctypes.c_void_p).value
        del array
        assert MIB in freed
        functions[4] = before
        ksmrs.merge_process(True)
        assert ksmrs.process_stats().numpy_allocator == "every thread"
        assert is_lent(np.ones(MIB, np.uint8))
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
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_environment_opts_in_programs_that_never_heard_of_ksmrs(tmp_path: Path) -> None:
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
