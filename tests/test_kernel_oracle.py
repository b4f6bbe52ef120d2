"""The kernel as oracle: the same scenario on kernel KSM and on ksmrs, the same counters to the page.

Each scenario says what the kernel's arithmetic gives (admin-guide/mm/ksm and mm/ksm.c) and is run on every engine, so that a
wrong expectation fails on the kernel and a wrong ksmrs on ksmrs. Smart scan is off but in its own scenario.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

import kernel_ksm
import ksmrs
from children import Child
from scenario import ENGINES, KNOBS, Ours, Scene, scene, why_not

PAGES = 256
A, B, C, D = (1000, 1001, 1002, 1003)

pytestmark = pytest.mark.timeout(240)


def stage(engine: str, **knobs: int) -> Iterator[Scene]:
    reason = why_not(engine)
    if reason is not None:
        pytest.skip(reason)
    with scene(engine, **knobs) as made:
        yield made


@pytest.fixture(params=ENGINES)
def on(request: pytest.FixtureRequest, runtime_dir: object) -> Iterator[Scene]:
    yield from stage(request.param)


@pytest.fixture(params=ENGINES)
def few(request: pytest.FixtureRequest, runtime_dir: object) -> Iterator[Scene]:
    """With frames that serve sixteen pages."""
    yield from stage(request.param, max_page_sharing=16)


@pytest.fixture(params=ENGINES)
def many(request: pytest.FixtureRequest, runtime_dir: object) -> Iterator[Scene]:
    """With frames that serve as many pages as there are."""
    yield from stage(request.param, max_page_sharing=10_000)


@pytest.fixture(params=ENGINES)
def zeros(request: pytest.FixtureRequest, runtime_dir: object) -> Iterator[Scene]:
    """With pages of zeros that need no frame."""
    yield from stage(request.param, use_zero_pages=1)


@pytest.mark.parametrize(("processes", "mib"), [(3, 1), (5, 2)])
def test_three_processes_and_more_in_four_phases(many: Scene, processes: int, mib: int) -> None:
    pages = mib * 256
    total = processes * pages
    workers = [many.process(pages, [number] * pages) for number in (C, *[A] * (processes - 1))]
    many.expect(pages_shared=2, pages_sharing=total - 2)
    workers[1].put(0, [B] * pages)
    many.expect(pages_shared=3, pages_sharing=total - 3)
    for worker in workers:
        worker.put(0, [D] * pages)
    many.expect(pages_shared=1, pages_sharing=total - 1)
    workers[1].put(0, [D] * pages, last_byte=0)
    many.expect(pages_shared=1, pages_sharing=total - 2, pages_unshared=1)
    assert many.engine.get("full_scans") > 0
    many.engine.set("run", 2)
    assert many.engine.get("full_scans") == 0
    assert not any(many.engine.counters().values()), "everything is unmerged when the write returns"
    for worker in workers:
        worker.verify()


def test_each_page_has_one_equal(on: Scene) -> None:
    contents = list(range(1, PAGES + 1))
    for _ in range(2):
        on.process(PAGES, contents)
    on.expect(pages_shared=PAGES, pages_sharing=PAGES)


def test_pages_without_an_equal(on: Scene) -> None:
    on.process(PAGES, list(range(1, PAGES + 1)))
    on.expect(pages_unshared=PAGES)


@pytest.mark.parametrize("pages", [96, 97, 98, 112])
def test_a_frame_serves_no_more_than_it_may(few: Scene, pages: int) -> None:
    """Six frames of sixteen; one page more has no twin to found a seventh with, two have each other."""
    few.process(pages, [A] * pages)
    dups, alone = (pages + 14) // 16, int(pages % 16 == 1)
    few.expect(
        pages_shared=dups,
        pages_sharing=pages - dups - alone,
        pages_unshared=alone,
        stable_node_chains=1,
        stable_node_dups=dups,
    )


def test_a_chain_whose_frames_went_is_an_ordinary_node_again(few: Scene) -> None:
    """Which the kernel finds out when it searches: every time, where stable_node_chains_prune_millisecs is 0."""
    few.engine.set("stable_node_chains_prune_millisecs", 0)
    worker = few.process(48, [A] * 48)
    few.expect(pages_shared=3, pages_sharing=45, stable_node_chains=1, stable_node_dups=3)
    # Nobody merges meanwhile: what breaks would merge again with what is not yet written.
    few.engine.set("run", 0)
    worker.put(1, list(range(1, 48)))
    few.engine.set("run", 1)
    found = few.engine.settled()
    # Differs on purpose: a block of shared memory breaks as a whole once half of it is written (README), the last page with it.
    left = (0, 0, 48) if few.engine.name == "ksmrs shared" else (1, 0, 47)
    assert (found["pages_shared"], found["pages_sharing"], found["pages_unshared"]) == left, found
    if few.engine.name != "kernel":
        # Differs on purpose: here nobody has to search.
        assert (found["stable_node_chains"], found["stable_node_dups"]) == (0, 0), found
    worker.put(47, [A])
    few.expect(pages_shared=1, pages_sharing=1, pages_unshared=46)


def test_pages_of_zeros_need_no_frame_until_they_are_written(zeros: Scene) -> None:
    worker = zeros.process(PAGES, [0] * (PAGES // 2) + [A] * (PAGES // 2))
    half = PAGES // 2
    zeros.expect(ksm_zero_pages=half, pages_shared=1, pages_sharing=half - 1)
    worker.put(0, list(range(1, half // 2 + 1)))
    zeros.expect(ksm_zero_pages=half // 2, pages_shared=1, pages_sharing=half - 1, pages_unshared=half // 2)


def test_pages_of_zeros_are_like_others_where_the_knob_says_so(on: Scene) -> None:
    worker = on.process(PAGES)
    on.expect(pages_shared=1, pages_sharing=PAGES - 1)
    on.engine.set("use_zero_pages", 1)
    # Not one after the other: a write to shared memory that looks like a sequence takes neighbours along (README).
    worker.put(40, [A])
    worker.put(7, [B])
    on.expect(pages_shared=1, pages_sharing=PAGES - 3, pages_unshared=2)
    worker.put(40, [0])
    worker.put(7, [0])
    # What merged stays; what merges from now on needs no frame.
    on.expect(pages_shared=1, pages_sharing=PAGES - 3, ksm_zero_pages=2)


def test_half_a_range_is_unmerged_and_has_memory_of_its_own(on: Scene) -> None:
    contents = list(range(1, PAGES + 1))
    one, other = (on.process(PAGES, contents) for _ in range(2))
    on.expect(pages_shared=PAGES, pages_sharing=PAGES)
    one.advise(False, 0, PAGES // 2)
    on.expect(pages_shared=PAGES, pages_sharing=PAGES // 2)
    if os.geteuid() == 0:
        same = [mine == theirs for mine, theirs in zip(one.frames(), other.frames(), strict=True)]
        assert same == [False] * (PAGES // 2) + [True] * (PAGES // 2)
    one.advise(True, 0, PAGES // 2)
    on.expect(pages_shared=PAGES, pages_sharing=PAGES)


def test_a_page_that_changes_in_every_pass_is_volatile(on: Scene) -> None:
    on.engine.set("sleep_millisecs", 50)
    worker = on.process(64, list(range(1, 65)))
    worker.write_always(7)
    for _ in range(3):
        on.engine.passes(2)
        found = on.engine.counters()
        assert (found["pages_volatile"], found["pages_unshared"]) == (1, 63), found
    worker.be_quiet()
    on.expect(pages_unshared=64)


def test_every_pass_looks_at_every_page(on: Scene) -> None:
    """pages_scanned and full_scans by their own arithmetic: a pass is all pages, in batches of pages_to_scan."""
    batch = 50
    on.engine.set("pages_to_scan", batch)
    on.process(PAGES, list(range(1, PAGES + 1)))
    on.expect(pages_unshared=PAGES)
    # The kernel counts a page more per batch than it looks at, and nothing for the batch that a pass ends in.
    per_pass = PAGES // batch * (batch + 1) if on.engine.name == "kernel" else PAGES
    scans, scanned = on.engine.get("full_scans"), on.engine.get("pages_scanned")
    on.engine.passes(20)
    on.engine.set("run", 0)
    passes, scanned = on.engine.get("full_scans") - scans, on.engine.get("pages_scanned") - scanned
    assert passes >= 20
    # The first and the last of them are not whole.
    assert (passes - 1) * per_pass <= scanned <= (passes + 1) * per_pass, (passes, scanned)


def test_smart_scan_leaves_most_of_what_never_merges_out(on: Scene) -> None:
    on.engine.set("smart_scan", 1)
    on.process(PAGES, list(range(1, PAGES + 1)))
    on.engine.passes(12)
    scans, skipped = on.engine.get("full_scans"), on.engine.get("pages_skipped")
    on.engine.passes(16)
    passes, skipped = on.engine.get("full_scans") - scans, on.engine.get("pages_skipped") - skipped
    assert passes >= 16
    assert passes * PAGES // 2 <= skipped <= (passes + 1) * PAGES
    on.processes[0].verify()


def test_a_process_ends_while_merged(on: Scene) -> None:
    contents = list(range(1, PAGES + 1))
    _, other, third = (on.process(PAGES, contents) for _ in range(3))
    on.expect(pages_shared=PAGES, pages_sharing=2 * PAGES)
    on.gone(other)
    on.expect(pages_shared=PAGES, pages_sharing=PAGES)
    third.kill()
    third.end(-9)
    on.processes.remove(third)
    on.expect(pages_shared=PAGES)


def test_a_fork_while_merged(on: Scene) -> None:
    """Differs on purpose in shared memory: a child keeps its parent's shared regions from merging (README)."""
    contents = list(range(1, 65))
    one, _ = (on.process(64, contents) for _ in range(2))
    on.expect(pages_shared=64, pages_sharing=64)
    one.fork()
    if on.engine.name == "ksmrs shared":
        on.engine.passes()
        found = on.engine.counters()
        assert (found["pages_shared"], found["pages_sharing"]) == (64, 0), found
        assert found["pages_unshared"] + found["pages_volatile"] == 64, found
    else:
        on.expect(pages_shared=64, pages_sharing=128)
    one.verify_child()
    one.put(0, list(range(101, 165)))
    if on.engine.name != "ksmrs shared":
        on.expect(pages_shared=64, pages_sharing=64, pages_unshared=64)


def test_two_pages_of_which_a_byte_each_is_written(on: Scene) -> None:
    one, other = (on.process(1, [A]) for _ in range(2))
    on.expect(pages_shared=1, pages_sharing=1)
    one.poke(0, 1)
    other.poke(0, 2)
    on.expect(pages_unshared=2)
    other.poke(0, 1)
    on.expect(pages_shared=1, pages_sharing=1)


def test_run_0_keeps_and_run_2_ends_what_is_merged(on: Scene) -> None:
    worker = on.process(PAGES, [A] * PAGES)
    on.expect(pages_shared=1, pages_sharing=PAGES - 1)
    on.engine.set("run", 0)
    worker.put(0, [B])
    found = on.engine.counters()
    assert found["pages_shared"] == 1, "stopped, and kept"
    on.engine.set("run", 2)
    assert not any(on.engine.counters().values())
    on.engine.set("run", 1)
    on.expect(pages_shared=1, pages_sharing=PAGES - 2, pages_unshared=1)


def test_every_scenario_begins_with_the_knobs_that_it_says(on: Scene) -> None:
    assert {knob: on.engine.get(knob) for knob in KNOBS} == KNOBS


TEXTS = {
    "sleep_millisecs": ["7", "+7", "07", "0x7", " 7", "7\n", "7 ", "-7", "7.5", "y", "4294967295", "4294967296"],
    "pages_to_scan": ["100", "0100", "1e2", "-1", "4294967296"],
    "run": ["0", "00", "3", "y"],
    "merge_across_nodes": ["1", "0", "01", "2", "y", "n"],
    "max_page_sharing": ["256", "2", "1", "0", "-2", "0x10", "0300"],
    "stable_node_chains_prune_millisecs": ["2000", "0", "-1", "4294967296"],
    "use_zero_pages": ["1", "0", "y", "No", "on", "OFF", "off\n", "2", "o", "true", "f", "1x", " 1", "-1"],
    "smart_scan": ["1", "0", "Y", "n", "On", "of", "2", "ok", "False", "t", "maybe"],
    "advisor_target_scan_time": ["200", "0", "0x10", "-1"],
    "advisor_min_pages_to_scan": ["500", "0500", "y"],
    "advisor_max_cpu": ["70", "0", "070", "-1"],
    "advisor_mode": ["none", "scan-time\n", "none", "Scan-time", "scan", "none "],
}


def test_knobs_are_read_as_the_kernel_reads_them(runtime_dir: object) -> None:
    reason = why_not("kernel")
    if reason is not None:
        pytest.skip(reason)
    ours, differ = Ours(shared=False), []
    ksmrs.connect()
    with kernel_ksm.turned({"advisor_mode": "none"}):
        ours.set("advisor_mode", "none")
        for knob, texts in TEXTS.items():
            if not (kernel_ksm.KSM / knob).exists():
                continue
            for text in texts:
                with contextlib.suppress(OSError):
                    (kernel_ksm.KSM / knob).write_text(text)
                with contextlib.suppress(ValueError):
                    ours.set(knob, text)
                found = (str(getattr(ksmrs.tunables, knob)), kernel_ksm.knob(knob))
                if found[0] != found[1]:
                    differ.append((knob, text, found))
    assert not differ, "(knob, text, (ksmrs's value after it, the kernel's))"


def test_the_kernels_knobs_come_back_whatever_happens() -> None:
    reason = why_not("kernel")
    if reason is not None:
        pytest.skip(reason)
    names = [name for name in kernel_ksm.KNOBS if (kernel_ksm.KSM / name).exists()]
    before = {name: kernel_ksm.knob(name) for name in names}
    with pytest.raises(ZeroDivisionError), kernel_ksm.turned({"run": 1, "pages_to_scan": 77, "advisor_mode": "none"}):
        assert (kernel_ksm.knob("run"), kernel_ksm.knob("pages_to_scan")) == ("1", "77")
        kernel_ksm.turn("sleep_millisecs", 12345)
        raise ZeroDivisionError
    assert {name: kernel_ksm.knob(name) for name in names} == before
    with pytest.raises(OSError, match="max_page_sharing=1"), kernel_ksm.turned({"max_page_sharing": 1, "run": 1}):
        pass
    assert {name: kernel_ksm.knob(name) for name in names} == before


def test_memory_that_somebody_else_registered_keeps_the_kernel_from_being_the_oracle() -> None:
    reason = why_not("kernel")
    if reason is not None:
        pytest.skip(reason)
    with Child(
        """
        import mmap
        memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(12)
        print("advised")
        sys.stdin.read()
        """
    ) as stranger:
        assert stranger.line() == "advised"
        assert why_not("kernel") == f"somebody else's pages are registered with kernel KSM: processes [{stranger.pid}]"
        stranger.end_of_input()
        stranger.end()
    assert why_not("kernel") is None
