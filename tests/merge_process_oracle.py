"""Plays at random with the arrays of a program that opted in as a whole, and knows what every byte must be.

Run as a program, twice or more at once so that there are equals elsewhere: `merge_process_oracle.py SECONDS SEED`. Threads
make, write, resize, pin, opt out, hand over and free arrays; forks and `merge_process(False)` come in between. What arrays must
hold is kept in bytearrays, which are the C library's. Prints counts as JSON; any wrong byte ends it.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from typing import Any

import numpy as np

import ksmrs
from ksmrs import _ksmrs

PAGE = 4096
SIZES = (65536, 70_001, 1 << 18, (1 << 20) + 4097, 3 << 20, 9 << 20, 40 << 20)
WEIGHTS = (30, 20, 20, 15, 8, 4, 1)
CLASSES = 4
MOST_BYTES = 64 << 20

Array = np.ndarray[Any, np.dtype[np.uint8]]


class Kept:
    """An array and what it must hold."""

    def __init__(self, array: Array, expected: bytearray) -> None:
        self.array = array
        self.expected = expected

    def check(self, where: str) -> None:
        if bytes(self.array.data) != bytes(self.expected):
            wrong = [at for at in range(len(self.expected)) if self.array[at] != self.expected[at]]
            address = self.array.__array_interface__["data"][0]
            raise AssertionError(
                f"{where}: {len(wrong)} bytes of {len(self.expected)} at {address:#x} are wrong, the first at {wrong[0]:#x}"
            )


class Player:
    """One thread's arrays."""

    def __init__(self, contents: list[bytes], seed: int, passed_on: list[Kept]) -> None:
        self.contents = contents
        self.chance = random.Random(seed)
        self.kept: list[Kept] = []
        self.passed_on = passed_on
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def play(self, until: float) -> None:
        moves = [
            (self.make, 10), (self.make_zeros, 4), (self.write, 14), (self.overwrite, 3), (self.resize, 2),
            (self.free, 9), (self.pass_on, 2), (self.take, 2), (self.pin, 2), (self.opt_out, 2), (self.check, 4),
        ]  # fmt: skip
        while time.monotonic() < until:
            move = self.chance.choices([move for move, _ in moves], [weight for _, weight in moves])[0]
            with self.lock:
                move()
            self.counts[move.__name__] += 1
            # Now and then the passes get a chance to meet what is there.
            if self.chance.random() < 0.02:
                time.sleep(0.02)
        with self.lock:
            for kept in self.kept:
                kept.check("at the end")

    def size(self) -> int:
        return self.chance.choices(SIZES, WEIGHTS)[0]

    def any(self) -> Kept | None:
        return self.chance.choice(self.kept) if self.kept else None

    def make(self) -> None:
        size = self.size()
        if sum(len(kept.expected) for kept in self.kept) + size > MOST_BYTES:
            self.free()
            return
        content = self.chance.choice(self.contents)[:size]
        array = np.empty(size, np.uint8)
        array.data[:] = content
        self.kept.append(Kept(array, bytearray(content)))

    def make_zeros(self) -> None:
        size = self.size()
        array = np.zeros(size, np.uint8)
        kept = Kept(array, bytearray(size))
        kept.check("fresh zeros")
        if size <= 1 << 20:
            self.kept.append(kept)

    def write(self) -> None:
        kept = self.any()
        if kept is None:
            return
        for _ in range(self.chance.randrange(1, 40)):
            at, value = self.chance.randrange(len(kept.expected)), self.chance.randrange(256)
            if kept.array[at] != kept.expected[at]:
                kept.check("before a write")
            kept.array[at] = kept.expected[at] = value

    def overwrite(self) -> None:
        kept = self.any()
        if kept is not None:
            content = self.chance.choice(self.contents)[: len(kept.expected)]
            kept.array.data[:] = content
            kept.expected[:] = content

    def resize(self) -> None:
        kept = self.any()
        if kept is None:
            return
        size = self.size() if self.chance.random() < 0.7 else self.chance.randrange(1, 100_000)
        kept.array.resize(size, refcheck=False)
        kept.expected = kept.expected[:size] + bytearray(max(0, size - len(kept.expected)))
        kept.check("after resize")

    def free(self) -> None:
        if self.kept:
            kept = self.kept.pop(self.chance.randrange(len(self.kept)))
            if self.chance.random() < 0.3:
                kept.check("before it is freed")

    def pass_on(self) -> None:
        if self.kept and len(self.passed_on) < 20:
            self.passed_on.append(self.kept.pop(self.chance.randrange(len(self.kept))))

    def take(self) -> None:
        try:
            kept = self.passed_on.pop()
        except IndexError:
            return
        kept.check("passed on")
        if self.chance.random() < 0.5:
            self.kept.append(kept)

    def pin(self) -> None:
        kept = self.any()
        if kept is None or not _ksmrs.is_lent(kept.array.__array_interface__["data"][0]):
            return
        with ksmrs.pinned(kept.array):
            kept.check("pinned")
            at = self.chance.randrange(len(kept.expected))
            kept.array[at] = kept.expected[at] = 9

    def opt_out(self) -> None:
        kept = self.any()
        if kept is None or not _ksmrs.is_lent(kept.array.__array_interface__["data"][0]):
            return
        pages = kept.array.nbytes // PAGE
        first = self.chance.randrange(max(1, pages))
        last = self.chance.randrange(first, pages) + 1 if first < pages else first
        advice = self.chance.choice([ksmrs.MADV_MERGEABLE, ksmrs.MADV_UNMERGEABLE])
        if first < last:
            ksmrs.madvise(kept.array, advice, first * PAGE, (last - first) * PAGE)
        kept.check("advised")

    def check(self) -> None:
        kept = self.any()
        if kept is not None:
            kept.check("by and by")


def fork_and_look(players: list[Player]) -> None:
    """A child finds everything as it was, writes, frees, makes new ones, and changes nothing here."""
    for player in players:
        player.lock.acquire()
    pid = os.fork()
    if pid == 0:
        try:
            for player in players:
                for kept in player.kept:
                    kept.check("in a child")
                    at = player.chance.randrange(len(kept.expected))
                    kept.array[at] = kept.expected[at] = 77
                del player.kept[::2]
                for _ in range(20):
                    player.make()
                    player.make_zeros()
                for kept in player.kept:
                    kept.check("written in a child")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    for player in players:
        player.lock.release()
    _, status = os.waitpid(pid, 0)
    if status:
        raise AssertionError(f"a child ended with {status}")


def main() -> None:
    seconds, seed = float(sys.argv[1]), int(sys.argv[2])
    contents = [np.random.default_rng(number).bytes(max(SIZES)) for number in range(CLASSES)]
    ksmrs.merge_process(True)
    ksmrs.tunables.sleep_millisecs = 1
    ksmrs.tunables.advisor_mode = "none"
    ksmrs.tunables.pages_to_scan = 20_000
    passed_on: list[Kept] = []
    players = [Player(contents, seed * 100 + number, passed_on) for number in range(3)]
    failures: list[str] = []

    def play(player: Player) -> None:
        try:
            player.play(until)
        except BaseException:
            failures.append(traceback.format_exc())

    until = time.monotonic() + seconds
    threads = [threading.Thread(target=play, args=(player,)) for player in players]
    for thread in threads:
        thread.start()
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    while time.monotonic() < until and not failures:
        time.sleep(chance.uniform(0.05, 0.3))
        event = chance.choices(["fork", "off", "merge", "unmerge"], [4, 2, 4, 1])[0]
        counts[event] += 1
        if event == "fork":
            fork_and_look(players)
        elif event == "off":
            ksmrs.merge_process(False)
            time.sleep(chance.uniform(0, 0.05))
            ksmrs.merge_process(True)
        elif event == "merge":
            ksmrs.merge(1)
        else:
            ksmrs.tunables.run = 2
            ksmrs.tunables.run = 1
    for thread in threads:
        thread.join()
    if failures:
        sys.exit("\n".join(failures))
    for player in players:
        counts += player.counts
    stats = ksmrs.process_stats()
    print(json.dumps({"merges": stats.merges, "breaks": stats.breaks, **counts}))


if __name__ == "__main__":
    main()
