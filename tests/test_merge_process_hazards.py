"""What may befall a program whose arrays all merge: limits, a dead broker, its end."""

from __future__ import annotations

import pytest

from whole_programs import program


def test_at_the_limit_of_mappings_arrays_are_made_and_freed() -> None:
    program(
        """
        import mmap
        content = chance(1, 16 * MIB)
        pages = np.random.default_rng(2).permutation(4096)
        scattered = content.reshape(4096, PAGE)[pages].reshape(-1)  # each page a mapping
        wanted = bytearray(scattered.data)
        wanted[5 :: PAGE] = bytes(byte ^ 1 for byte in wanted[5 :: PAGE])
        plain = content.copy()
        assert merging() == 2 * 4096
        held = []
        try:
            while True:
                access = mmap.PROT_READ if len(held) % 2 else mmap.PROT_READ | mmap.PROT_WRITE
                held.append(mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=access))
        except OSError:
            pass
        scattered[5 :: PAGE] ^= 1
        assert scattered.data == wanted
        del plain
        zeros = np.zeros(16 * MIB, np.uint8)
        assert not zeros.any()
        del scattered, zeros
        again = [np.zeros(16 * MIB, np.uint8) for _ in range(2)]
        assert not any(array.any() for array in again)
        held.clear()
        assert not any(array.any() for array in again)
        """
    )


def test_where_no_arena_fits_numpys_own_memory_serves() -> None:
    program(
        """
        import resource
        pair = [chance(1, 8 * MIB).copy() for _ in range(2)]
        assert merging() == 2 * 2048
        used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (used + 40 * MIB,) * 2)  # less than an arena
        arrays = []
        try:
            while True:
                arrays.append(np.ones(MIB, np.uint8))
        except MemoryError:
            pass
        lent = sum(map(is_lent, arrays))
        assert 0 < lent < len(arrays) and all(array.all() for array in arrays)
        arrays.clear()
        assert (pair[0] == chance(1, 8 * MIB)).all()
        pair.clear()
        assert not np.zeros(8 * MIB, np.uint8).any()
        for impossible in (1 << 47, 1 << 62):
            try:
                np.empty(impossible, np.uint8)
            except MemoryError:
                continue
            raise AssertionError(impossible)
        """
    )


def test_no_room_for_the_tables_of_an_arena_is_no_end() -> None:
    program(
        """
        import ctypes, resource
        ctypes.CDLL(None).mallopt(-8, 1)  # one arena of its own, else the C library has room elsewhere
        ksmrs.merge_process(True)
        np.ones(MIB, np.uint8)
        lent = []
        # From room for neither, over room for the memory and not for its tables (8 MiB each), to room for all.
        for room in range(28):
            pid = os.fork()
            if pid == 0:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
                resource.setrlimit(resource.RLIMIT_AS, (used + 4096 * MIB + room * MIB,) * 2)
                try:
                    os._exit(1 if is_lent(np.empty(4096 * MIB, np.uint8)) else 2)
                except MemoryError:
                    os._exit(3)
            status = os.waitpid(pid, 0)[1]
            assert os.WIFEXITED(status), (room, status)
            lent.append(os.WEXITSTATUS(status))
        assert set(lent) <= {1, 2, 3} and lent[0] != 1 and lent[-1] == 1, lent
        """,
        on=False,
    )


def test_locked_memory_is_given_up_all_the_same() -> None:
    program(
        """
        import ctypes, resource
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
        first = np.ones(MIB, np.uint8)
        if ctypes.CDLL(None).mlockall(1):
            sys.exit(0)  # the limit is below what any program has
        for _ in range(10):
            arrays = [np.zeros(6 * MIB, np.uint8) for _ in range(20)]
            assert not any(array.any() for array in arrays)
            for array in arrays:
                array[:] = 1
            del arrays, array
            assert ksmrs.process_stats().numpy_kept_bytes <= 64 * MIB
        """
    )


def test_a_broker_that_is_killed_costs_nothing_but_time() -> None:
    program(
        """
        arrays = [chance(1, 8 * MIB).copy() for _ in range(2)]
        assert merging() == 2 * 2048
        os.kill(_ksmrs.status()["pid"], signal.SIGKILL)
        arrays += [chance(1, 8 * MIB).copy() for _ in range(2)]
        del arrays[0]
        zeros = np.zeros(8 * MIB, np.uint8)
        assert not zeros.any()
        wait_for(lambda: merging() >= 3 * 2048, "merging under the next broker")
        ksmrs.disconnect()
        del arrays[1]
        assert all((array == chance(1, 8 * MIB)).all() for array in arrays)
        assert not np.zeros(8 * MIB, np.uint8).any()
        """
    )


def test_on_and_off_while_eight_threads_use_it() -> None:
    program(
        """
        import ctypes, queue, random
        functions = numpy_functions()
        P, N = ctypes.c_void_p, ctypes.c_size_t
        # NumPy's own want the GIL; the heap's memory may be freed without.
        malloc = ctypes.PYFUNCTYPE(P, P, N)(functions[1])
        calloc = ctypes.PYFUNCTYPE(P, P, N, N)(functions[2])
        realloc = ctypes.PYFUNCTYPE(P, P, P, N)(functions[3])
        numpys, heaps = ctypes.PYFUNCTYPE(None, P, P, N)(functions[4]), ctypes.CFUNCTYPE(None, P, P, N)(functions[4])
        def free(memory, nbytes):
            lent = _ksmrs.is_lent(memory)
            (heaps if lent else numpys)(None, memory, nbytes)
            freed[lent] += 1
        freed = [0, 0]
        contents = [chance(seed, 4 * MIB).tobytes() for seed in range(2)]
        handed, stop, failures = queue.SimpleQueue(), threading.Event(), []
        def use(seed):
            chance = random.Random(seed)
            try:
                while not stop.is_set():
                    nbytes, content = chance.choice((65536, MIB + 5, 3 * MIB)), chance.choice(contents)
                    if chance.random() < 0.3:
                        memory = calloc(None, 1, nbytes)
                        assert ctypes.string_at(memory, nbytes) == bytes(nbytes), "zeros"
                    else:
                        memory = malloc(None, nbytes)
                    ctypes.memmove(memory, content, nbytes)
                    handed.put((memory, nbytes, content))
                    memory, nbytes, content = handed.get()  # another thread's, as often as not
                    assert ctypes.string_at(memory, nbytes) == content[:nbytes], "what another thread wrote"
                    if nbytes <= 3 * MIB and chance.random() < 0.3:
                        memory, more = realloc(None, memory, nbytes + MIB), nbytes + MIB
                        assert ctypes.string_at(memory, nbytes) == content[:nbytes], "moved"
                        ctypes.memmove(memory, content, more)
                        nbytes = more
                    if handed.qsize() < 20:
                        handed.put((memory, nbytes, content))
                    else:
                        assert ctypes.string_at(memory, nbytes) == content[:nbytes], "before it is freed"
                        free(memory, nbytes)
            except BaseException as failure:
                failures.append(failure)
        threads = [threading.Thread(target=use, args=(seed,), daemon=True) for seed in range(8)]
        for thread in threads:
            thread.start()
        for turn in range(25):
            ksmrs.merge(0.2)
            ksmrs.merge_process(False)
            assert ksmrs.process_stats().numpy_mergeable_bytes == 0
            ksmrs.merge_process(True)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        while not handed.empty():
            memory, nbytes, content = handed.get()
            assert ctypes.string_at(memory, nbytes) == content[:nbytes], "at the end"
            free(memory, nbytes)
        assert ksmrs.process_stats().merges > 1000 and min(freed) > 50, freed
        """
    )


@pytest.mark.parametrize("how", ["sys.exit(0)", "os._exit(0)", "pass"])
def test_the_end_comes_while_threads_allocate(how: str) -> None:
    program(
        f"""
        ksmrs.tunables.sleep_millisecs = 0
        arrays = [chance(1, 8 * MIB).copy() for _ in range(4)]
        begun = threading.Barrier(5)
        def allocate():
            begun.wait()
            while True:
                np.zeros(MIB, np.uint8)[:] = 1
        for _ in range(4):
            threading.Thread(target=allocate, daemon=True).start()
        begun.wait()
        ksmrs.merge(1)
        {how}
        """
    )


def test_a_file_is_read_into_an_earlier_arrays_memory_while_all_merges() -> None:
    program(
        """
        # What is there already is what is read, so pages that were not read yet are equal to others.
        kept = chance(1, 8 * MIB).copy()
        for _ in range(2):
            ksmrs.merge(60)
        open_before = _ksmrs.heap_bytes()[2]
        assert open_before == kept.nbytes
        reading, writing = os.pipe()
        begun, go_on = threading.Event(), threading.Event()
        found, lent = [], []

        def read():
            chance(1, 8 * MIB).copy()
            lent.append(time.monotonic())
            array = np.empty(8 * MIB, np.uint8)  # in the memory of the one before
            found.append((array == kept).all())
            begun.set()
            rest = memoryview(array)
            with open(reading, "rb", buffering=0) as file:
                while rest:
                    count = file.readinto(rest)
                    rest = rest[count:]
                    go_on.wait(60)
            found.append(array)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        begun.wait(60)
        os.write(writing, kept[:PAGE].data)
        for _ in range(2):
            ksmrs.merge(60)
        assert found == [True], "not the memory of the one before: this tests nothing"
        held = _ksmrs.heap_bytes()[2] == open_before
        # Ten seconds it may have; a machine on which two merges take as long tells nothing here.
        assert held or time.monotonic() - lent[0] > 9, "what is being read into takes part"
        go_on.set()
        with open(writing, "wb") as file:
            file.write(kept[PAGE:].data)
        reader.join()
        assert (found[1] == kept).all()
        # But not for ever.
        wait_for(lambda: (ksmrs.merge(60), _ksmrs.heap_bytes()[2])[1] == open_before + kept.nbytes, "its taking part", 60)
        """
    )
