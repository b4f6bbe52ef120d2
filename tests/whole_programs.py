"""Programs whose arrays are all in mergeable memory, for the tests of `merge_process`.

Each runs in a child, for what `merge_process` does to NumPy cannot be undone. What merged is read from the child's own
counters, what was saved from its PSS.
"""

from __future__ import annotations

from textwrap import dedent

from children import TESTS, run

BUILD = TESTS.parent / "target" / "mutants"

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
    def numpy_functions():
        # NumPy's default handler, from after its name and version: a context, malloc, calloc, realloc, free.
        import ctypes
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        api = ctypes.cast(pointer(np._core._multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
        default = ctypes.cast(api[306], ctypes.POINTER(ctypes.py_object))[0]
        return (ctypes.c_void_p * 5).from_address(pointer(default, b"mem_handler") + 128)
    def pss():
        return int(re.search(r"^Pss:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) << 10
"""


def program(text: str, *, on: bool = True, failpoints: str = "") -> str:
    """Run a program with what the tests here use, the program's arrays in mergeable memory from the start.

    With failpoints it runs in the build that has them.
    """
    begin = "ksmrs.merge_process(True)\n" if on else ""
    return run(
        dedent(PRELUDE) + begin + dedent(text),
        PYTHONPATH=f"{BUILD}:{TESTS}" if failpoints else str(TESTS),
        KSMRS_FAILPOINTS=failpoints,
    )
