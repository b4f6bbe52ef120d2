"""Children of a program whose arrays all merge: they go on, or have ordinary memory, and change nothing of their parent's."""

from __future__ import annotations

import pytest

from whole_programs import BUILD, program


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


def test_a_child_that_no_python_forked_may_opt_in_again() -> None:
    program(
        """
        import ctypes
        arrays = [chance(1, 8 * MIB).copy() for _ in range(2)]
        assert merging() == 2 * 2048
        loose = [chance(2, 8 * MIB).copy() for _ in range(2)]
        del loose  # whose places are the next to be lent, in the parent
        pid = ctypes.PyDLL(None).fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(100)
                ksmrs.merge_process(True)
                mine = [chance(1, 8 * MIB).copy() for _ in range(2)]
                assert all(map(is_lent, mine)) and merging() == 2 * 2048
                arrays.clear()
                assert not any(np.zeros(8 * MIB, np.uint8).any() for _ in range(5))
                assert all((array == chance(1, 8 * MIB)).all() for array in mine)
                status = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert all((array == chance(1, 8 * MIB)).all() for array in arrays)
        """
    )


def test_forks_while_threads_allocate() -> None:
    program(
        """
        stop = threading.Event()
        def allocate():
            while not stop.is_set():
                a = np.ones(1 << 17) + 1
                zeros = np.zeros(3 * MIB, np.uint8)
                assert not zeros[:: PAGE].any()
                zeros += 1
        threads = [threading.Thread(target=allocate) for _ in range(3)]
        for thread in threads:
            thread.start()
        def child(deep):
            array = np.ones(MIB, np.uint8)
            fine = is_lent(array) and not any(np.zeros(n, np.uint8).any() for n in (MIB, 3 * MIB, 100_000))
            if deep:
                pid = os.fork()
                if pid == 0:
                    os._exit(child(False))
                fine = fine and os.waitpid(pid, 0)[1] == 0
            return 0 if fine else 3
        for turn in range(60):
            pid = os.fork()
            if pid == 0:
                status = 9
                try:
                    status = child(turn % 5 == 0)
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0, turn
        stop.set()
        for thread in threads:
            thread.join()
        """
    )


@pytest.mark.skipif(not (BUILD / "ksmrs").is_dir(), reason="no build with failpoints: run make mutants")
def test_a_child_frees_what_its_parent_was_opening() -> None:
    program(
        """
        array = chance(1, 8 * MIB).copy()
        thread = threading.Thread(target=ksmrs.merge, args=(60,))
        thread.start()
        # It counts as taking part, and whoever opens it stays where it is for two seconds, with the lock that a free needs.
        wait_for(lambda: ksmrs.process_stats().numpy_mergeable_bytes == array.nbytes)
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            del array
            os._exit(0 if not np.zeros(8 * MIB, np.uint8).any() and is_lent(np.ones(MIB, np.uint8)) else 1)
        assert os.waitpid(pid, 0)[1] == 0
        thread.join()
        assert (array == chance(1, 8 * MIB)).all()
        """,
        failpoints="block-opens=delay:2000000",
    )


def test_children_of_an_embedded_broker_have_numpys_own_memory() -> None:
    program(
        """
        ksmrs.connect(embedded=True)
        ksmrs.merge_process(True)
        arrays = [chance(1, 8 * MIB).copy() for _ in range(2)]
        assert merging() == 2 * 2048
        pid = os.fork()
        if pid == 0:
            fine = not is_lent(np.ones(MIB, np.uint8)) and (arrays[0] == chance(1, 8 * MIB)).all()
            arrays.clear()
            os._exit(0 if fine and not np.zeros(8 * MIB, np.uint8).any() else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert all((array == chance(1, 8 * MIB)).all() for array in arrays)
        """,
        on=False,
    )
