"""Random scenarios with the kernel as oracle: what hypothesis thinks of is done on kernel KSM and on ksmrs, and counted alike.

A few small processes, each of them a twin on both engines, write pages of few contents and single bytes, opt ranges in and out,
end, and turn knobs. Then whole passes go by, and

- every byte is what was written, on both engines;
- on each engine the counters are the arithmetic of what its pages really show, looked up in /proc/self/pagemap: `Arithmetic`;
- between the engines the counters agree, to the page, as far as the kernel's own are a function of the contents.

Where they are not, what happened before decides, in the kernel and in ksmrs, and the order of the scan with it:

- *Scanning while pages are written* (`still` is false): a page that has no equal any more stays on its frame if it once merged,
  and is unshared if it did not; which of the two it is depends on whether a pass came by while it had one. pages_sharing is
  the same in any case, and so is pages_shared + pages_unshared. Otherwise the engines stand still (run=0) while pages are
  written, and all counters agree.
- *A small max_page_sharing*: pages leave the frames of a content, which are not filled up by moving others, so how many frames
  there are depends on which page once met which. The total of the pages is the same, and `Arithmetic` knows the limits.

A run is short and always the same one; KSMRS_RANDOM_EXAMPLES=200 makes it long, and another one each time. The steps that
hypothesis prints for a failure are a program: the same calls in the same order.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

import ksmrs
from children import wait_for
from scenario import NO_MEMORY, OWN_MEMORY, Engine, Process, Scene, content, scene, why_not

EXAMPLES = int(os.environ.get("KSMRS_RANDOM_EXAMPLES", "0"))
ENOUGH_SHARING = 10_000
"""A max_page_sharing that all pages together never come to."""
LARGEST = 48
MOST_PROCESSES = 4

Page = tuple[int, int]
"""What a page holds: the number of its content, and its first byte."""
ZERO: Page = (0, 0)
FIRST_BYTE = {number: content(number)[0] for number in range(64)}

pytestmark = pytest.mark.timeout(1200 if EXAMPLES else 300)

# Few contents, so that most pages have an equal; zeros; and some that have none. Each with how many pages of it follow.
Runs = list[tuple[int, int]]
contents = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 1, 2, 3, 4, *range(40, 60)]), st.integers(1, 12)), min_size=1, max_size=6
)
positions = st.integers(0, LARGEST - 1)


def laid_out(runs: Runs) -> list[int]:
    """The contents of pages, one after the other."""
    return [number for number, pages in runs for _ in range(pages)]


@dataclass
class Twins:
    """A process on each engine, and what their pages hold."""

    name: int
    processes: list[Process]
    holds: list[Page]
    mergeable: list[bool]

    def __repr__(self) -> str:
        return f"<twins {self.name}>"

    def clipped(self, first: int, pages: int) -> range:
        """A range that they have, from one that they may not."""
        first %= len(self.holds)
        return range(first, min(first + pages, len(self.holds)))


class Arithmetic:
    """What the counters of an engine must be, by what its pages show."""

    def __init__(self, holds: list[Page], shown: list[int], max_page_sharing: int) -> None:
        users: dict[int, list[Page]] = defaultdict(list)
        self.alone: Counter[Page] = Counter()
        for page, frame in zip(holds, shown, strict=True):
            if frame == OWN_MEMORY:
                self.alone[page] += 1
            elif frame == NO_MEMORY:
                assert page == ZERO, f"no memory for {page}"
            else:
                users[frame].append(page)
        self.frames: dict[Page, list[int]] = defaultdict(list)
        for pages in users.values():
            assert len(set(pages)) == 1, f"one frame for {set(pages)}"
            assert len(pages) <= max_page_sharing, f"a frame shown {len(pages)} times"
            self.frames[pages[0]].append(len(pages))
        self.chains = {page: counts for page, counts in self.frames.items() if len(counts) > 1}
        self.counters = {
            "pages_shared": len(users),
            "pages_sharing": sum(map(len, users.values())) - len(users),
            "pages_unshared": self.alone.total(),
            "pages_volatile": 0,
            "ksm_zero_pages": shown.count(NO_MEMORY),
        }

    def check(self, engine: Engine, found: dict[str, int], max_page_sharing: int, use_zero_pages: int) -> None:
        differ = {name: (found[name], value) for name, value in self.counters.items() if found[name] != value}
        assert not differ, f"{engine.name}: (counted, shown) {differ}"
        chains, dups = len(self.chains), sum(map(len, self.chains.values()))
        named = (found["stable_node_chains"], found["stable_node_dups"])
        if engine.name == "kernel":
            # Differs on purpose: the kernel finds out late that nobody maps a frame of a chain any more.
            assert named[0] >= chains
            assert named[1] >= dups
        else:
            assert named == (chains, dups), engine.name
        # Two that are equal would have met; pages of zeros would have lost their memory.
        assert all(count == 1 for count in self.alone.values()), f"{engine.name}: {self.alone}"
        assert not (use_zero_pages and self.alone[ZERO]), engine.name
        for page in self.alone:
            assert all(users == max_page_sharing for users in self.frames[page]), f"{engine.name}: room for {page}"


class Oracle(RuleBasedStateMachine):
    """The kernel, and `rival`."""

    rival = ""
    twins = Bundle("twins")

    def __init__(self) -> None:
        super().__init__()
        self._ends = ExitStack()
        self._scenes: list[Scene] = []
        self._alive: list[Twins] = []
        self._born = 0
        self._still = True
        self._max_page_sharing = ENOUGH_SHARING
        self._use_zero_pages = 0

    def _each(self, act: Callable[[Engine], Any]) -> None:
        for made in self._scenes:
            act(made.engine)

    def _set(self, knob: str, value: int) -> None:
        self._each(lambda engine: engine.set(knob, value))

    def _make(self, runs: Runs, mergeable: bool) -> Twins:
        pages = laid_out(runs)[:LARGEST]
        processes = [made.process(len(pages), pages, mergeable) for made in self._scenes]
        self._born += 1
        twins = Twins(
            self._born, processes, [(number, FIRST_BYTE[number]) for number in pages], [mergeable] * len(pages)
        )
        self._alive.append(twins)
        return twins

    @initialize(
        target=twins,
        still=st.sampled_from([True, True, False]),
        max_page_sharing=st.sampled_from([ENOUGH_SHARING, ENOUGH_SHARING, 2, 3, 7]),
        use_zero_pages=st.integers(0, 1),
        one=contents,
        other=contents,
    )
    def begin(self, still: bool, max_page_sharing: int, use_zero_pages: int, one: Runs, other: Runs) -> Any:
        wait_for(lambda: ksmrs.stats().regions == 0, "the end of the last example's regions")
        self._still, self._max_page_sharing, self._use_zero_pages = still, max_page_sharing, use_zero_pages
        for name in ("kernel", self.rival):
            knobs = {"max_page_sharing": max_page_sharing, "use_zero_pages": use_zero_pages, "run": int(not still)}
            self._scenes.append(self._ends.enter_context(scene(name, **knobs)))
        return multiple(self._make(one, True), self._make(other, True))

    def _write_zeros_again(self, of: Twins, where: range) -> None:
        """Differs on purpose: the kernel gives pages of zeros memory when it unmerges them; in private regions a write does."""
        for page in where:
            if of.holds[page] == ZERO:
                for process in of.processes:
                    process.poke(page, 0)

    def _unmerge(self) -> None:
        self._set("run", 2)
        for made in self._scenes:
            assert not any(made.engine.counters().values()), (
                f"{made.engine.name}: all is unmerged when the write returns"
            )
        for twins in self._alive:
            self._write_zeros_again(twins, range(len(twins.holds)))

    @precondition(lambda self: len(self._alive) < MOST_PROCESSES)
    @rule(target=twins, holds=contents, mergeable=st.sampled_from([True, True, False]))
    def start(self, holds: Runs, mergeable: bool) -> Twins:
        return self._make(holds, mergeable)

    @rule(of=twins, first=positions, holds=contents)
    def put(self, of: Twins, first: int, holds: Runs) -> None:
        numbers = laid_out(holds)
        where = of.clipped(first, len(numbers))
        del numbers[len(where) :]
        for process in of.processes:
            process.put(where.start, numbers)
        of.holds[where.start : where.stop] = [(number, FIRST_BYTE[number]) for number in numbers]

    @rule(of=twins, at=st.lists(positions, min_size=1, max_size=6), byte=st.integers(0, 2))
    def poke(self, of: Twins, at: list[int], byte: int) -> None:
        for page in dict.fromkeys(position % len(of.holds) for position in at):
            for process in of.processes:
                process.poke(page, byte)
            of.holds[page] = (of.holds[page][0], byte)

    @rule(of=twins, first=positions, pages=st.integers(1, LARGEST), mergeable=st.booleans())
    def advise(self, of: Twins, first: int, pages: int, mergeable: bool) -> None:
        where = of.clipped(first, pages)
        for process in of.processes:
            process.advise(mergeable, where.start, len(where))
        of.mergeable[where.start : where.stop] = [mergeable] * len(where)
        if not mergeable:
            self._write_zeros_again(of, where)

    @precondition(lambda self: len(self._alive) > 1)
    @rule(of=consumes(twins), killed=st.booleans())
    def end(self, of: Twins, killed: bool) -> None:
        self._alive.remove(of)
        for made, process in zip(self._scenes, of.processes, strict=True):
            if killed:
                process.kill()
                process.end(-9)
                made.processes.remove(process)
            else:
                made.gone(process)

    @rule(value=st.integers(0, 1))
    def zero_pages(self, value: int) -> None:
        self._set("use_zero_pages", value)
        self._use_zero_pages = value

    @rule()
    def unmerge(self) -> None:
        self._unmerge()
        self._set("run", int(not self._still))

    @rule(value=st.sampled_from([2, 3, 7, ENOUGH_SHARING]), unmerged=st.booleans())
    def share(self, value: int, unmerged: bool) -> None:
        """Another max_page_sharing: refused while anything is shared."""
        self._settle()
        if unmerged:
            self._unmerge()
        refused = []
        for made in self._scenes:
            shared = made.engine.get("pages_shared")
            try:
                made.engine.set("max_page_sharing", value)
                refused.append(False)
            except (OSError, ksmrs.ArgumentError):
                refused.append(True)
            assert refused[-1] == (shared > 0 and value != self._max_page_sharing), made.engine.name
        if any(refused) and not all(refused):
            # A page that lost its equal stays on its frame on one engine and is unshared on the other: see above.
            assert not self._still or self._max_page_sharing < ENOUGH_SHARING
            self._unmerge()
            self._set("max_page_sharing", value)
        if not all(refused):
            self._max_page_sharing = value
        self._set("run", int(not self._still))

    @rule()
    def settle(self) -> None:
        self._settle()
        self._set("run", int(not self._still))

    def _settle(self) -> None:
        self._set("run", 1)
        found = [made.engine.settled() for made in self._scenes]
        eligible = [
            page for twins in self._alive for page, may in zip(twins.holds, twins.mergeable, strict=True) if may
        ]
        for which, made in enumerate(self._scenes):
            shown = []
            for twins in self._alive:
                process = twins.processes[which]
                process.verify()
                frames = process.shown()
                out = [frame for frame, may in zip(frames, twins.mergeable, strict=True) if not may]
                assert set(out) <= {OWN_MEMORY}, f"{made.engine.name}: merged though opted out"
                shown += [frame for frame, may in zip(frames, twins.mergeable, strict=True) if may]
            arithmetic = Arithmetic(eligible, shown, self._max_page_sharing)
            arithmetic.check(made.engine, found[which], self._max_page_sharing, self._use_zero_pages)
        kernel, ours = found
        if self._max_page_sharing == ENOUGH_SHARING and self._still:
            assert ours == kernel, f"{self.rival} {ours}, kernel {kernel}"
            return
        pages = ("pages_shared", "pages_sharing", "pages_unshared", "ksm_zero_pages")
        assert sum(ours[name] for name in pages) == sum(kernel[name] for name in pages) == len(eligible)
        if self._max_page_sharing == ENOUGH_SHARING and ZERO not in eligible:
            assert ours["pages_sharing"] == kernel["pages_sharing"]

    def teardown(self) -> None:
        with self._ends:
            if self._alive:
                self._settle()


@pytest.mark.parametrize("rival", ["ksmrs private", "ksmrs shared"])
def test_whatever_happens_both_count_alike(rival: str) -> None:
    reason = why_not("kernel")
    if reason is not None:
        pytest.skip(reason)
    machine = type("Oracle", (Oracle,), {"rival": rival})
    ksmrs.connect()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES or 7,
            stateful_step_count=12 if EXAMPLES else 9,
            deadline=None,
            derandomize=not EXAMPLES,
            database=None,
            # A failure is printed as it was found: making it smaller would take minutes.
            phases=[Phase.generate],
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
