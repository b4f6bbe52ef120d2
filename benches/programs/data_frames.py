"""Four processes load the same table into pandas frames, ask it questions, and each adds to its own.

    python benches/programs/data_frames.py [--workers 4] [--rounds 1] [--quick] [--json]

A CSV file of trips, made here by a generator with a fixed seed: times, distances, prices, places as categories, a column of
free text. Each worker is a program of its own (a notebook, a report, a shard of a service), started with `ksmrs run --`
before its command line and otherwise unchanged. It reads the file, answers requests over HTTP with what groupby and the like
find, and holds a column of its own that nobody else has. pandas keeps numbers, times and categories in NumPy arrays, which
merge; text is Python strings (Arrow's buffers with pyarrow), which do not. Relies on measure.py.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import measure

NEEDS = ("pandas",)
ROWS, QUICK_ROWS = 1_500_000, 300_000
NUMBERS = ("pickup", "minutes", "km", "fare", "tip", "tolls", "passengers", "vendor", "from", "to", "rate")
QUESTIONS = ("busiest", "fare by hour", "tips", "routes", "longest", "speed")


def write_table(path: Path, rows: int) -> None:
    """The file, always the same."""
    import numpy as np
    import pandas as pd

    chance = np.random.default_rng(11)
    km = chance.gamma(2.0, 2.5, rows).round(3)
    minutes = (km * chance.uniform(1.5, 5.0, rows)).round(2)
    fare = (3 + 1.9 * km + 0.4 * minutes).round(2)
    pd.DataFrame(
        {
            "pickup": pd.Timestamp("2024-01-01")
            + pd.to_timedelta(np.sort(chance.integers(0, 90 * 86_400, rows)), unit="s"),
            "minutes": minutes,
            "km": km,
            "fare": fare,
            "tip": (fare * chance.choice([0, 0.1, 0.2], rows)).round(2),
            "tolls": chance.choice([0, 0, 0, 6.55], rows),
            "passengers": chance.integers(1, 6, rows),
            "vendor": chance.integers(1, 3, rows),
            "from": chance.choice([f"zone {n}" for n in range(250)], rows),
            "to": chance.choice([f"zone {n}" for n in range(250)], rows),
            "rate": chance.choice(["standard", "airport", "agreed"], rows),
            "note": chance.choice(["", "", "", "paid in cash", "luggage", "waited for the passenger"], rows),
        }
    ).to_csv(path, index=False)


@cache
def frame() -> Any:
    import pandas as pd

    categories = dict.fromkeys(("from", "to", "rate"), "category")
    table = pd.read_csv(PATH, dtype=categories, parse_dates=["pickup"])
    table["speed"] = table["km"] / (table["minutes"] / 60 + 1e-9)
    # What each has of its own: no page of it equals another worker's.
    table["score"] = table["fare"] * (1 + WORKER) + table.index
    return table


def find(question: str) -> Any:
    table = frame()
    if question == "busiest":
        return table.groupby("from", observed=True).size().sort_values(ascending=False, kind="stable").head(20)
    if question == "fare by hour":
        return table.groupby(table["pickup"].dt.hour)["fare"].agg(["mean", "median", "count"])
    if question == "tips":
        return table[table["tip"] > 0].groupby(["rate", "passengers"], observed=True)["tip"].sum()
    if question == "routes":
        return table.groupby(["from", "to"], observed=True)["km"].sum().nlargest(20)
    if question == "longest":
        return table.nlargest(50, "minutes")[["pickup", "km", "minutes", "note"]]
    return table["speed"].clip(0, 120).describe()


def answer(body: bytes) -> bytes:
    return str(find(json.loads(body)).to_json(double_precision=15, date_format="iso")).encode()


def state() -> str:
    table = frame()
    numbers = (table[name].to_numpy().data for name in ("minutes", "km", "fare", "tip", "tolls", "speed", "score"))
    codes = (table[name].cat.codes.to_numpy().data for name in ("from", "to", "rate"))
    return measure.digest(*numbers, *codes, "".join(table["note"].fillna("")).encode())


def change() -> None:
    """Correct some rows, each worker other ones."""
    frame().loc[WORKER::1000, "fare"] += 1.0


def run(side: measure.Side) -> None:
    seconds = 1.0 if side.quick else 10.0
    asked = [json.dumps(question).encode() for question in QUESTIONS]
    path = side.folder / "trips.csv"
    if not path.exists():
        write_table(path, QUICK_ROWS if side.quick else ROWS)
    ksmrs_run = ["-m", "ksmrs", "run", "--", sys.executable] if side.how == measure.KSMRS else []
    with measure.Workers(side, [sys.executable, *ksmrs_run, __file__, "--worker", str(path)]) as workers:
        workers.ask("imported")
        side.take("of interpreter and libraries", workers.pids)
        with side.loading():
            workers.ask("load")
        addresses = [("127.0.0.1", port) for port in workers.ask("serve")]
        side.take("when loaded", workers.pids)
        side.ask("while merging", addresses, asked, seconds)
        side.merge()
        side.take("when merged", workers.pids)
        workers.ask("change")
        side.ask("after merging", addresses, asked, seconds)
        for number, found in enumerate(workers.ask("state")):
            side.answer(f"frame of {number}", found)
        side.take("at the end", workers.pids)


def imported() -> None:
    import pandas  # noqa: F401


if __name__ == "__main__":
    if "--worker" in sys.argv:
        PATH, WORKER = sys.argv[-2], int(sys.argv[-1])
        measure.obey(
            imported=imported,
            load=lambda: frame() is None or None,
            serve=lambda: measure.serve(answer),
            state=state,
            change=change,
        )
    else:
        measure.main(run, __doc__, NEEDS)
