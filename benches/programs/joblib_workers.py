"""scikit-learn models in joblib's workers: four of them load the same fitted models from a file and predict.

    python benches/programs/joblib_workers.py [--workers 4] [--rounds 1] [--quick] [--json]

The models: nearest neighbours over the data that they were fitted to, a neural network, Nystroem features with a ridge, and a
forest. Each of joblib's loky workers loads them with `joblib.load` at its first task and keeps them; tasks are batches to
predict, and each worker keeps the features that it computed. With ksmrs there is one argument more,
`parallel_config(backend="loky", initializer=ksmrs.worker_init)`. The forest's nodes lie in memory of scikit-learn's own, which
does not merge. What joblib passes as arguments, and `joblib.load(mmap_mode="r")`, is one mapped file for all workers anyway:
there is nothing to merge, and this program does neither. Relies on measure.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import measure

NEEDS = ("sklearn", "joblib")
ROWS, QUICK_ROWS = 60_000, 6_000
COLUMNS = 96
BATCH = 40
BATCHES = 12


def data(rows: int, seed: int) -> tuple[Any, Any]:
    import numpy as np

    chance = np.random.default_rng(seed)
    table = chance.standard_normal((rows, COLUMNS))
    return table, table[:, 0] * 3 - table[:, 1] * table[:, 2] + chance.standard_normal(rows) / 10


def fit(path: Path, rows: int) -> None:
    """The models' file, always the same."""
    import warnings

    import joblib
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import Ridge
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline

    warnings.simplefilter("ignore")  # one iteration converges nowhere
    table, target = data(rows, 1)
    few = slice(rows // 10)
    models = {
        "neighbours": KNeighborsRegressor(algorithm="brute").fit(table, target),
        "network": MLPRegressor(hidden_layer_sizes=(1024, 512), max_iter=1, random_state=0).fit(
            table[few], target[few]
        ),
        "kernel": make_pipeline(Nystroem(n_components=500, random_state=0), Ridge()).fit(table[few], target[few]),
        "forest": RandomForestRegressor(20, random_state=0, n_jobs=1, max_features=8).fit(table[few], target[few]),
    }
    joblib.dump(models, path)


@cache
def models(path: str) -> Any:
    import joblib

    return joblib.load(path)


@cache
def features(path: str) -> Any:
    """What a worker computes once and keeps: the same in each."""
    return models(path)["kernel"][0].transform(data(4000, 2)[0])


def predict(path: str, batch: int) -> tuple[int, str]:
    """Which worker it was, and a hash of what all models say of a batch."""
    import numpy as np

    asked, _ = data(BATCH, 100 + batch)
    said = [model.predict(asked) for model in models(path).values()]
    near = features(path) @ models(path)["kernel"][0].transform(asked).T
    return os.getpid(), measure.digest(*(np.ascontiguousarray(each).data for each in (*said, near)))


def predict_first(path: str, turn: int) -> tuple[int, str]:
    import time

    found = predict(path, turn)
    time.sleep(0.05)  # so that every worker gets one
    return found


def held(path: str, _: int) -> tuple[int, str]:
    """A hash of what a worker has loaded and computed."""
    loaded = models(path)
    network, kernel = loaded["network"], loaded["kernel"]
    arrays = [
        loaded["neighbours"]._fit_X,
        *network.coefs_,
        kernel[0].components_,
        kernel[0].normalization_,
        features(path),
    ]
    return os.getpid(), measure.digest(*(array.tobytes() for array in arrays))


def imported(_: int) -> int:
    """What a worker has of libraries before it has any models."""
    import time

    import sklearn.ensemble
    import sklearn.kernel_approximation
    import sklearn.linear_model
    import sklearn.neighbors
    import sklearn.neural_network
    import sklearn.pipeline  # noqa: F401

    time.sleep(0.2)  # so that every worker gets one of these tasks
    return os.getpid()


def parent(path: str) -> None:
    """The program itself, told what to do line by line."""
    from joblib import Parallel, delayed, parallel_config

    count = int(sys.argv[-2])
    options: dict[str, Any] = {"backend": "loky", "n_jobs": count}
    if sys.argv[-3] == measure.KSMRS:
        import ksmrs

        options["initializer"] = ksmrs.worker_init

    def together(task: Any, *words: Any, times: int) -> list[Any]:
        with parallel_config(**options):
            return list(
                Parallel(batch_size=1, pre_dispatch="all")(delayed(task)(*words, turn) for turn in range(times))
            )

    def on_all(task: Any, *words: Any) -> list[Any]:
        """Until each worker had one."""
        found: dict[int, Any] = {}
        while len(found) < count:
            found |= dict(together(task, *words, times=2 * count))
        return list(found.values())

    measure.obey(
        imported=lambda: sorted({pid for _ in range(3) for pid in together(imported, times=2 * count)}),
        load=lambda: on_all(predict_first, path),
        predict=lambda: [found for _, found in together(predict, path, times=BATCHES)],
        held=lambda: on_all(held, path),
    )


def run(side: measure.Side) -> None:
    seconds = 1.0 if side.quick else 10.0
    path = side.folder / "models.joblib"
    if not path.exists():
        # On one thread as the workers, so that every run has the same models.
        words = [sys.executable, __file__, "--fit", str(path), str(QUICK_ROWS if side.quick else ROWS)]
        subprocess.run(words, env=side.environment, check=True)
    command = [sys.executable, __file__, "--parent", str(path), side.how, str(side.count)]
    with measure.Workers(side, command, 1) as program:
        program.ask("imported")
        pids = [*program.pids, *measure.children(program.pids[0])]
        side.take("of interpreter and libraries", pids)
        with side.loading():
            program.ask("load")
        side.take("when loaded", pids)
        side.repeat("while merging", lambda: program.ask("predict")[0], seconds)
        side.merge()
        side.take("when merged", pids)
        side.repeat("after merging", lambda: program.ask("predict")[0], seconds)
        for found in program.ask("held")[0]:
            side.answer("what workers hold", found)
        side.take("at the end", pids)


if __name__ == "__main__":
    if "--parent" in sys.argv:
        # Tasks have to be in a module that workers can import.
        import joblib_workers

        joblib_workers.parent(sys.argv[sys.argv.index("--parent") + 1])
    elif "--fit" in sys.argv:
        fit(Path(sys.argv[-2]), int(sys.argv[-1]))
    else:
        measure.main(run, __doc__, NEEDS)
