"""Forked children as clients of their own: what they inherited stays merged and counted, and their parent is rid of them.

Programs run in children of the test, which fork in their turn. They wait for conditions; a child that is not asked
anything connects by itself after a second.
"""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

import pytest

from children import PRELUDE, TESTS, Child, brokers_in, kill_brokers, run, wait_for

MERGED = """
regions, contents = equal_regions(256)
wait_merged(512, *regions)
arrays = [region.array(np.uint8, contents.size) for region in regions]
def intact():
    assert all((array == contents).all() for array in arrays)
def alone():
    wait_for(lambda: ksmrs.stats().clients == 1, "the end of all children")
"""


def forks(program: str, seconds: float = 120) -> str:
    return run(MERGED + textwrap.dedent(program), seconds=seconds)


def test_a_child_goes_on_with_what_it_inherited() -> None:
    forks(
        """
        def child():
            intact()
            # It is a client before any broker knows: the states are its own.
            assert merged(*regions) == 512 and counted() == -1
            wait_counted(512)
            stats = ksmrs.stats()
            assert (stats.pages_shared, stats.pages_sharing) == (256, 768), stats
            # It writes, and what it wrote merges again.
            for array in arrays:
                array[::4096] ^= 0xFF
            contents[::4096] ^= 0xFF
            intact()
            wait_merged(512, *regions)
            wait_counted(512)
            intact()
            assert ksmrs.stats().pages_disbelieved == 0
        pid = forked(child)
        ended(pid)
        intact()
        alone()
        wait_for(lambda: ksmrs.stats().frames == 256)
        """
    )


@pytest.mark.parametrize("first", ["parent", "child"])
def test_memory_is_private_whoever_writes_first(first: str) -> None:
    forks(
        f"""
        written, seen = os.pipe(), os.pipe()
        def child():
            wait_counted(512)
            if {first == "parent"}:
                os.read(written[0], 1)
                intact()
            for page in range(0, 256, 3):
                arrays[0][page * 4096 + 1] ^= 0x55
                contents[page * 4096 + 1] ^= 0x55
            assert (arrays[0] == contents).all()
            os.write(seen[1], b".")
            if {first == "child"}:
                os.read(written[0], 1)
            assert (arrays[0] == contents).all()
            ksmrs.merge(20)
            assert (arrays[0] == contents).all()
        pid = forked(child)
        if {first == "child"}:
            os.read(seen[0], 1)
            intact()
        for page in range(0, 256, 2):
            arrays[0][page * 4096 + 2] ^= 0xAA
            contents[page * 4096 + 2] ^= 0xAA
        os.write(written[1], b".")
        assert (arrays[0] == contents).all()
        ksmrs.merge(20)
        ended(pid)
        assert (arrays[0] == contents).all()
        """
    )


def test_a_parent_is_not_held_up_by_its_children() -> None:
    forks(
        """
        go, counts = os.pipe(), os.pipe()
        def child():
            wait_counted(512)
            os.write(counts[1], b".")
            os.read(go[0], 1)
            intact()
        pid = forked(child)
        os.read(counts[0], 1)
        given_up = contents ^ 0xFF
        for array in arrays:
            array[:] = given_up
        wait_merged(512, *regions)
        # Nothing but the child's own references keeps what the parent gave up.
        wait_for(lambda: ksmrs.stats().references_in_limbo == 0, "the parent's limbo")
        wait_for(lambda: ksmrs.stats().frames == 512)
        os.write(go[1], b".")
        ended(pid)
        alone()
        wait_for(lambda: ksmrs.stats().frames == 256)
        del array, arrays
        for region in regions:
            region.close()
        wait_for(lambda: ksmrs.stats().store_bytes == 0, "the end of all frames")
        """
    )


def test_an_old_parent_may_leave_its_children_everything() -> None:
    forks(
        """
        go, counts = os.pipe(), os.pipe()
        def child():
            os.read(go[0], 1)
            # The parent closed its regions and disconnected before the child was counted.
            wait_counted(512)
            intact()
            stats = ksmrs.stats()
            assert (stats.pages_shared, stats.pages_sharing, stats.pages_disbelieved) == (256, 256, 0), stats
            for region in regions:
                region.close()
            wait_for(lambda: ksmrs.stats().frames == 0)
        pid = forked(child)
        del arrays
        for region in regions:
            region.close()
        ksmrs.disconnect()
        os.write(go[1], b".")
        ended(pid)
        """
    )


def test_children_let_go_of_memory_by_themselves() -> None:
    forks(
        """
        def child():
            wait_counted(512)
            assert ksmrs.stats().regions == 4
            with ksmrs.pinned(arrays[0]):
                assert merged(regions[0]) == 0
            ksmrs.madvise(arrays[1], ksmrs.MADV_UNMERGEABLE)
            assert merged(regions[1]) == 0
            ksmrs.madvise(arrays[1], ksmrs.MADV_MERGEABLE)
            intact()
            wait_merged(512, *regions)
            # Seen through its array, the memory outlives its merging.
            regions[1].close()
            intact()
            del arrays[1]
            wait_for(lambda: ksmrs.stats().regions == 3)
            intact()
            mine, more = equal_regions(64, seed=7)
            wait_merged(128, *mine)
            intact()
        ended(forked(child))
        assert merged(*regions) == 512
        """
    )


def test_holds_are_inherited() -> None:
    forks(
        """
        ksmrs.madvise(arrays[0][: 100 * 4096], ksmrs.MADV_UNMERGEABLE)
        with ksmrs.pinned(arrays[1][: 4096]) as pin:
            def child():
                wait_counted(411)
                assert regions[0].page_states()[:100] == bytes([PageState.HELD] * 100)
                assert regions[1].page_states()[0] == PageState.HELD
                intact()
            pid = forked(child)
            ended(pid)
            pid = os.fork()
        if pid == 0:
            # The pin ended here, too.
            wait_merged(412, *regions)
            assert merged(regions[0]) == 156
            os._exit(0)
        ended(pid)
        """
    )


def test_adopted_memory_is_inherited() -> None:
    run(
        """
        contents = np.random.default_rng(1).integers(0, 256, 256 * 4096, np.uint8)
        import mmap
        anonymous = mmap.mmap(-1, contents.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        arrays = [np.empty(contents.size + 4096, np.uint8), np.frombuffer(anonymous, np.uint8)]
        phase = -arrays[0].ctypes.data % 4096
        arrays[0] = arrays[0][phase:][:contents.size]
        for array in arrays:
            array[:] = contents
            ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
        wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages == 512)
        def child():
            global arrays
            assert all((array == contents).all() for array in arrays)
            wait_counted(512)
            arrays[0][:4096] ^= 0xFF
            ksmrs.madvise(arrays[1], ksmrs.MADV_UNMERGEABLE)
            contents[:4096] ^= 0xFF
            assert (arrays[0] == contents).all() and (arrays[1][4096:] == contents[4096:]).all()
            wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages == 255)
            # The last reference ends the region, in the child alone.
            del arrays
            gc.collect()
            wait_for(lambda: ksmrs.stats().regions == 2)
        ended(forked(child))
        assert all((array == contents).all() for array in arrays)
        assert ksmrs.process_stats().ksm_merging_pages == 512
        """
    )


def test_a_thousand_forks_while_pages_merge_and_break() -> None:
    forks(
        """
        stop = threading.Event()
        def work():
            while not stop.is_set():
                arrays[0][5::4096] ^= 0xFF
                ksmrs.merge(0.05)
                arrays[0][5::4096] ^= 0xFF
        worker = threading.Thread(target=work)
        worker.start()
        def child():
            assert (arrays[1] == contents).all()
            arrays[1][::8192] ^= 0xFF
            assert (arrays[1][::8192] == contents[::8192] ^ 0xFF).all()
        pids = []
        for turn in range(1000):
            pids.append(forked(child))
            if len(pids) == 8:
                ended(*pids)
                pids.clear()
        ended(*pids)
        stop.set()
        worker.join()
        intact()
        alone()
        wait_for(lambda: ksmrs.stats().references_in_limbo == 0)
        """,
        seconds=100,
    )


def test_forks_while_memory_comes_and_goes() -> None:
    forks(
        """
        stop = threading.Event()
        def make():
            while not stop.is_set():
                made = [ksmrs.Region(8 * 4096) for _ in range(20)]
                array = np.ones(64 * 4096, np.uint8)
                ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
                with ksmrs.pinned(arrays[0][: 64 * 4096]):
                    made.clear()
                time.sleep(0.01)
        makers = [threading.Thread(target=make) for _ in range(2)]
        for maker in makers: maker.start()
        def child():
            intact()
            arrays[0][::4096] ^= 0xFF
            contents[::4096] ^= 0xFF
            ksmrs.merge(0.5)
            assert (arrays[0] == contents).all()
        for turn in range(40):
            ended(forked(child))
        stop.set()
        for maker in makers: maker.join()
        intact()
        alone()
        """
    )


def test_children_that_hardly_live() -> None:
    forks(
        """
        def daemon():
            if os.fork():
                os._exit(0)
            os.setsid()
            os.closerange(3, 65536)
            wait_counted(512)
            intact()
        kinds = [
            lambda: None,
            lambda: os.execv("/bin/true", ["true"]),
            lambda: os.kill(os.getpid(), 9),
            lambda: sys.exit(0),
            daemon,
        ]
        for turn in range(100):
            kind = kinds[turn % len(kinds)]
            pid = forked(kind)
            status = os.waitpid(pid, 0)[1]
            assert status in (0, 9 if kind is kinds[2] else 256 if kind is kinds[3] else 0), (turn, status)
        intact()
        alone()
        wait_for(lambda: ksmrs.stats().references_in_limbo == 0)
        """
    )


def test_a_grandchild_is_born_of_a_child() -> None:
    forks(
        """
        def grandchild():
            wait_counted(512)
            arrays[0][::4096] ^= 0xFF
            contents[::4096] ^= 0xFF
            assert (arrays[0] == contents).all()
            wait_for(lambda: ksmrs.merge(5) and (arrays[0] == contents).all())
        def child():
            before = forked(grandchild)
            wait_counted(512)
            after = forked(grandchild)
            arrays[1][::4096] ^= 0xFF
            ended(before, after)
            arrays[1][::4096] ^= 0xFF
            intact()
            # Born of a client that is gone, in a line of four.
            def line(depth):
                if depth == 0:
                    return grandchild()
                pid = os.fork()
                if pid == 0:
                    return line(depth - 1)
                ended(pid)
                os._exit(0)
            ended(forked(lambda: line(4)))
        ended(forked(child))
        intact()
        alone()
        wait_for(lambda: ksmrs.stats().references_in_limbo == 0)
        """
    )


def test_a_fork_that_python_did_not_see_stays_unregistered() -> None:
    forks(
        """
        import ctypes
        # PyDLL keeps the GIL, so that the child has it; Python's own handlers do not run.
        fork = ctypes.PyDLL(None).fork
        def unregistered():
            pid = fork()
            if pid:
                return pid
            try:
                assert set(regions[0].page_states()) == {PageState.HELD}
                intact()
                # Nor are its own children anybody.
                def child():
                    assert set(regions[0].page_states()) == {PageState.HELD}
                    arrays[0][::4096] ^= 0xFF
                ended(forked(child))
                intact()
                # But what it makes is its own, and its children are born with that.
                mine, more = equal_regions(64, seed=7)
                wait_merged(128, *mine)
                def grandchild():
                    wait_counted(128)
                    assert (mine[0].array(np.uint8, more.size) == more).all()
                    intact()
                pid = forked(grandchild)
                del mine
                ended(pid)
                intact()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        pid = unregistered()
        for array in arrays:
            array[:] ^= 0xFF
        contents ^= 0xFF
        wait_merged(512, *regions)
        ended(pid)
        intact()
        """
    )


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method: str) -> None:
    forks(
        f"""
        import multiprocessing, children
        from concurrent.futures import ProcessPoolExecutor
        context = multiprocessing.get_context("{method}")
        children.inherited = arrays[0]
        inherits = "{method}" == "fork"
        argument = children.flipped_inherited if inherits else children.flipped
        if inherits:
            with ProcessPoolExecutor(3, mp_context=context) as pool:
                assert all(pool.map(children.flipped_inherited, range(40)))
            with context.Pool(3) as pool:
                assert all(pool.map(children.flipped_inherited, range(40)))
        else:
            with ProcessPoolExecutor(2, mp_context=context) as pool:
                assert all(pool.map(children.flipped, [contents[:8192].copy()] * 8, [1] * 8))
        process = context.Process(target=children.flipped, args=(contents[:8192].copy(), 0))
        process.start()
        process.join()
        assert process.exitcode == 0
        intact()
        alone()
        """
    )


def test_workers_of_a_preforking_server() -> None:
    forks(
        """
        done = os.pipe()
        def worker(number):
            mine = contents.copy()
            for turn in range(20):
                page = (number * 64 + turn) * 4096
                for array in arrays:
                    array[page : page + 4096] ^= number
                mine[page : page + 4096] ^= number
                assert all((array == mine).all() for array in arrays)
                ksmrs.merge(0.1)
            wait_merged(512, *regions)
            assert all((array == mine).all() for array in arrays)
            wait_counted(512)
            os.write(done[1], b".")
            signal.pause()
        workers = [forked(lambda: worker(number)) for number in range(1, 4)]
        for _ in workers:
            os.read(done[0], 1)
        intact()
        stats = ksmrs.stats()
        assert stats.pages_shared + stats.pages_sharing == 4 * 512, stats
        # 20 pages of each worker are not those of the others.
        assert stats.pages_shared == 256 + 3 * 20, stats
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        alone()
        wait_for(lambda: ksmrs.stats().pages_shared == 256 and ksmrs.stats().frames == 256)
        """
    )


def test_shared_regions_stay_with_the_parent() -> None:
    forks(
        """
        shared, same = equal_regions(64, True, seed=5)
        wait_merged(128, *shared)
        views = [region.array(np.uint8, same.size) for region in shared]
        go, counts = os.pipe(), os.pipe()
        def child():
            assert set(shared[0].page_states()) == {PageState.HELD}
            wait_counted(512)
            views[0][::4096] ^= 0xFF
            os.write(counts[1], b".")
            os.read(go[0], 1)
            intact()
            same[::4096] ^= 0xFF
            assert (views[0] == same).all()
            del views[:]
            shared[0].close()
        pid = forked(child)
        os.read(counts[0], 1)
        same[::4096] ^= 0xFF
        assert (views[0] == same).all(), "it is the same memory"
        ksmrs.merge(5)
        assert merged(*shared) == 0, "somebody else maps it"
        os.write(go[1], b".")
        ended(pid)
        views[1][:] = same
        wait_merged(128, *shared)
        assert (views[0] == same).all()
        intact()
        """
    )


def test_a_child_of_one_that_disconnected_waits_to_be_asked() -> None:
    forks(
        """
        ksmrs.disconnect()
        def threads():
            names = set()
            for task in os.listdir("/proc/self/task"):
                with open(f"/proc/self/task/{task}/comm") as comm:
                    names.add(comm.read().strip())
            return names
        def child():
            # Its childhood is over: by now it would ask for a broker.
            wait_for(lambda: "ksmrs-scan" in threads(), f"a scanner, not {threads()}")
            assert not ksmrs._ksmrs.is_connected()
            intact()
            arrays[0][::4096] ^= 0xFF
            ksmrs.connect()
            wait_for(lambda: ksmrs.merge(5) and counted() > 0)
            arrays[0][::4096] ^= 0xFF
            wait_merged(512, *regions)
            intact()
        ended(forked(child))
        intact()
        """
    )


def test_children_of_an_embedded_broker_stay_unregistered() -> None:
    run(
        "ksmrs.connect(embedded=True)\n"
        + MERGED
        + textwrap.dedent(
            """
            def child():
                intact()
                arrays[0][::4096] ^= 0xFF
                assert set(regions[0].page_states()) == {PageState.HELD}
                os._exit(0)
            ended(*[forked(child) for _ in range(20)])
            intact()
            assert merged(*regions) == 512
            """
        )
    )


def test_the_broker_dies_while_a_child_is_born(runtime_dir: Path) -> None:
    program = """
    pids = [forked(lambda: (sys.stdin.readline(), wait_merged(512, *regions), intact())) for _ in range(3)]
    print("forked", flush=True)
    sys.stdin.readline()
    wait_merged(512, *regions)
    ended(*pids)
    intact()
    """
    with Child(MERGED + textwrap.dedent(program)) as parent:
        parent.line()
        kill_brokers(runtime_dir)
        for _ in range(4):
            parent.tell()
        parent.end()


def test_the_parent_dies_while_a_child_is_born(runtime_dir: Path) -> None:
    result = runtime_dir / "result"
    program = f"""
    def child():
        os.close(1); os.close(2)
        text = "wrong"
        try:
            wait_counted(512)
            intact()
            arrays[0][::4096] ^= 0xFF
            arrays[0][::4096] ^= 0xFF
            wait_merged(512, *regions)
            intact()
            wait_for(lambda: ksmrs.stats().clients == 1)
            wait_for(lambda: ksmrs.stats().references_in_limbo == 0)
            text = "well"
        finally:
            open({str(result)!r}, "w").write(text)
    forked(child)
    print("forked", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with Child(MERGED + textwrap.dedent(program)) as parent:
        assert parent.line() == "forked"
        parent.end(-signal.SIGKILL)
    wait_for(lambda: result.exists() and result.read_text() != "", "the child's word")
    assert result.read_text() == "well"
    assert brokers_in(runtime_dir)


@pytest.mark.skipif(os.geteuid() == 0, reason="the limit of processes is none for root")
def test_a_child_without_a_thread_stays_unregistered() -> None:
    program = """
    import resource
    def no_threads():
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    # Before the import of ksmrs, so that it runs before its own.
    os.register_at_fork(after_in_child=no_threads)
    """
    # The prelude imports ksmrs only after this.
    early = "import os\n" + textwrap.dedent(program)
    run(
        early
        + PRELUDE.format(tests=str(TESTS))
        + MERGED
        + textwrap.dedent(
            """
            def child():
                assert set(regions[0].page_states()) == {PageState.HELD}
                intact()
                arrays[0][::4096] ^= 0xFF
                try:
                    ksmrs.connect()
                    raise SystemExit("a client without a thread")
                except ksmrs.KsmrsError:
                    pass
                assert (arrays[0][::4096] == contents[::4096] ^ 0xFF).all()
            for turn in range(5):
                ended(forked(child))
            intact()
            """
        ),
        prelude=False,
    )


def test_two_hundred_children_at_once() -> None:
    forks(
        """
        go, ready = os.pipe(), os.pipe()
        def child(number):
            arrays[0][number::4096] ^= 0xFF
            mine = contents.copy()
            mine[number::4096] ^= 0xFF
            wait_for(lambda: ksmrs._ksmrs.is_connected(), seconds=60)
            assert (arrays[0] == mine).all()
            os.write(ready[1], b".")
            os.read(go[0], 1)
            assert (arrays[0] == mine).all() and (arrays[1] == contents).all()
        pids = [forked(lambda: child(number)) for number in range(200)]
        for _ in pids:
            os.read(ready[0], 1)
        for array in arrays:
            array ^= 0x11
        contents ^= 0x11
        ksmrs.merge(5)
        intact()
        os.write(go[1], b"." * len(pids))
        ended(*pids)
        intact()
        alone()
        wait_for(lambda: ksmrs.stats().references_in_limbo == 0)
        wait_merged(512, *regions)
        wait_for(lambda: ksmrs.stats().frames == 256)
        """
    )


def test_more_children_than_a_frame_can_count() -> None:
    run(
        """
        regions = [ksmrs.Region(512 * 4096) for _ in range(2)]
        arrays = [region.array(np.uint8, 512 * 4096) for region in regions]
        page = np.random.default_rng(1).integers(0, 256, 4096, np.uint8)
        for array in arrays:
            array.reshape(-1, 4096)[:] = page
        wait_merged(1024, *regions)
        go, ready = os.pipe(), os.pipe()
        def child():
            wait_for(lambda: ksmrs._ksmrs.is_connected(), seconds=60)
            os.write(ready[1], b".")
            os.read(go[0], 1)
            assert all((array.reshape(-1, 4096) == page).all() for array in arrays)
            arrays[0][::4096] ^= 1
            ksmrs.merge(2)
            assert (arrays[0][::4096] == page[0] ^ 1).all()
        # 1024 pages on 4 frames, 80 times.
        pids = [forked(child) for _ in range(80)]
        for _ in pids:
            os.read(ready[0], 1)
        ksmrs.merge(5)
        assert ksmrs.stats().pages_disbelieved > 0, "all of them could be counted"
        for array in arrays:
            array[:] = 7
        for _ in range(5):
            ksmrs.merge(5)
        os.write(go[1], b"." * len(pids))
        ended(*pids)
        wait_for(lambda: ksmrs.stats().clients == 1, "the end of all children")
        wait_for(lambda: ksmrs.stats().references_in_limbo == 0)
        wait_merged(1024, *regions)
        wait_for(lambda: ksmrs.stats().frames == 4)
        """
    )


def test_forks_deeper_than_a_process_counts_lives() -> None:
    forks(
        """
        def line(depth):
            for array in (*arrays, contents):
                array[depth] ^= 0xFF
            intact()
            if depth:
                ended(forked(lambda: line(depth - 1)))
                intact()
        line(75)
        alone()
        wait_for(lambda: ksmrs.stats().references_in_limbo == 0)
        """
    )


def test_children_without_descriptors_or_address_space() -> None:
    forks(
        """
        import resource
        def no_descriptors():
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            arrays[0][::4096] ^= 0xFF
            try:
                ksmrs.merge(1)
                raise SystemExit("a client without descriptors")
            except ksmrs.KsmrsError:
                pass
            arrays[0][::4096] ^= 0xFF
            intact()
            ended(forked(intact))
            del arrays[1]
            regions[1].close()
            intact()
        ended(forked(no_descriptors))
        # No room for a copy of the words: the child stays unregistered.
        def no_words():
            assert set(regions[0].page_states()) == {PageState.HELD}
            arrays[0][::4096] ^= 0xFF
            assert (arrays[0][::4096] == contents[::4096] ^ 0xFF).all() and (arrays[1] == contents).all()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used, limits[1]))
        ended(forked(no_words))
        resource.setrlimit(resource.RLIMIT_AS, limits)
        intact()
        alone()
        """
    )


def test_born_children_spawn_and_clone() -> None:
    forks(
        """
        import ctypes
        clone = ctypes.PyDLL(None).syscall
        def raw():
            # The number of clone on x86-64, and no handler runs: unregistered.
            pid = clone(56, int(signal.SIGCHLD), 0, 0, 0, 0)
            if pid == 0:
                good = (arrays[0] == contents).all() and (arrays[1] == contents).all()
                arrays[0][::4096] ^= 0xFF
                os._exit(0 if good and (arrays[0][::4096] == contents[::4096] ^ 0xFF).all() else 9)
            return pid
        def child():
            for turn in range(20):
                subprocess.run(["true"], check=True)
                subprocess.run(["true"], check=True, close_fds=False, preexec_fn=intact)
                ended(os.posix_spawnp("true", ["true"], os.environ))
                if os.uname().machine == "x86_64":
                    ended(raw())
                for array in (*arrays, contents):
                    array[turn * 4096] ^= 1
                intact()
                if turn == 10:
                    ksmrs.merge(5)
        ended(*[forked(child) for _ in range(4)])
        intact()
        alone()
        wait_for(lambda: ksmrs.stats().references_in_limbo == 0)
        """
    )


def test_a_born_child_has_shared_memory_of_its_own() -> None:
    forks(
        """
        def child():
            shared, same = equal_regions(64, True, seed=5)
            wait_merged(640, *regions, *shared)
            views = [region.array(np.uint8, same.size) for region in shared]
            views[0][::4096] ^= 0xFF
            assert (views[0][::4096] == same[::4096] ^ 0xFF).all() and (views[1] == same).all()
            intact()
            # Its own child shares it, and is born with the rest alone.
            def grandchild():
                assert set(shared[1].page_states()) == {PageState.HELD}
                assert merged(*regions) == 512
                views[1][5] ^= 0xFF
                wait_counted(512)
                intact()
            ended(forked(grandchild))
            same[5] ^= 0xFF
            assert (views[1] == same).all()
            views[0][:] = same
            wait_merged(640, *regions, *shared)
            assert all((view == same).all() for view in views)
        ended(forked(child))
        intact()
        alone()
        """
    )


def test_children_killed_while_they_are_counted() -> None:
    forks(
        """
        import random
        moments = random.Random(3)
        grown = os.pipe()
        os.set_blocking(grown[0], False)
        def child():
            arrays[1][::4096] ^= 0xFF
            ksmrs.merge(5)
            os.write(grown[1], b".")
            arrays[1][::4096] ^= 0xFF
            ksmrs.merge(5)
            intact()
            signal.pause()
        for turn in range(60):
            started = time.monotonic()
            pids = {forked(child): started + moments.random() * 0.04 for _ in range(5)}
            for pid, moment in pids.items():
                # Any moment will do: this waits for nothing.
                time.sleep(max(0, moment - time.monotonic()))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for array in (*arrays, contents):
                array[7::4096] ^= 0xFF
            intact()
        assert os.read(grown[0], 1000), "no child came so far"
        alone()
        def settled():
            # On request, for a region whose merges do not last rests.
            ksmrs.merge(5)
            stats = ksmrs.stats()
            return (stats.frames, stats.references_in_limbo, merged(*regions)) == (256, 0, 512)
        wait_for(settled, "the end of what the children left")
        intact()
        """
    )


def test_what_is_refused_while_a_child_lives_piles_nothing_up(runtime_dir: object) -> None:
    run("""
        import ctypes
        ksmrs.tunables.advisor_mode = "none"
        ksmrs.tunables.pages_to_scan, ksmrs.tunables.sleep_millisecs = 10_000, 1
        region = ksmrs.Region(64 * 4096, shared=True)
        array = region.array(np.uint8, (64, 4096))
        array[:] = np.repeat(np.random.default_rng(1).integers(0, 256, (32, 4096), np.uint8), 2, axis=0)
        wait_merged(64, region)
        parent = os.getpid()
        child = ctypes.CDLL(None).fork()
        while child == 0:
            if os.getppid() != parent:
                os._exit(0)
            time.sleep(0.05)
        # Nothing of the object merges while the child has it, and the child keeps the frames that it shows, and no more.
        # The broker sees it with its next pass.
        wait_for(lambda: ksmrs.stats().pages_shared == 0 and merged(region) == 0, "the end of what the parent showed")
        assert ksmrs.stats().frames == 32
        proposals = 0
        before = ksmrs.stats()
        while ksmrs.stats().full_scans < before.full_scans + 500:
            now = ksmrs.stats()
            proposals = max(proposals, now.frames)
            assert now.references_in_limbo <= before.references_in_limbo, (before, now)
            ksmrs.merge(5)
        assert proposals <= 64, "32 that the child keeps, and 32 for one try"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        wait_for(lambda: merged(region) == 64, "the merge", 40)
        wait_for(lambda: ksmrs.stats().references_in_limbo == 0 and ksmrs.stats().frames == 32, "limbo to end", 30)
    """)
