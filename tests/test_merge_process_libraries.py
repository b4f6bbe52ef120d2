"""Libraries in a program whose arrays all merge compute what they compute without."""

from __future__ import annotations

import pytest

from whole_programs import program

LIBRARIES = {
    "pandas": """
        import pandas as pd
        ROWS = 64_000
        def frame():
            g = np.random.default_rng(1)
            return pd.DataFrame({"a": g.random(ROWS), "b": g.random(ROWS), "k": g.integers(0, 100, ROWS)})
        frames = [frame() for _ in range(3)]
        def results(df):
            yield df.groupby("k").agg({"a": "sum", "b": "median"})
            yield df.sort_values(["b", "k"])
            yield df[["a", "b"]].rolling(50).mean()
            yield df.pivot_table(index="k", values="a", aggfunc="mean")
            yield df.copy()
        wanted = list(results(frame()))
        for _ in range(3):
            assert merging() >= 3 * 3 * (ROWS * 8 // PAGE - 1), ksmrs.process_stats()
            for df in frames:
                for got, right in zip(results(df), wanted, strict=True):
                    pd.testing.assert_frame_equal(got, right, check_exact=True)
                df.loc[::400, "a"] *= 1.0
        """,
    "sklearn": """
        import warnings
        from sklearn.ensemble import RandomForestRegressor
        from sklearn.neighbors import KNeighborsRegressor
        from sklearn.neural_network import MLPRegressor
        warnings.simplefilter("ignore")
        g = np.random.default_rng(1)
        data, asked = g.random((4000, 32)), g.random((50, 32))
        target = data[:, 0] * 3 + g.random(4000)
        def fitted():
            return [
                KNeighborsRegressor(algorithm="kd_tree").fit(data.copy(), target),
                MLPRegressor(hidden_layer_sizes=(200, 200), max_iter=2, random_state=0).fit(data, target),
                RandomForestRegressor(n_estimators=2, n_jobs=2, random_state=0).fit(data, target),
            ]
        import pickle
        models = fitted()
        wanted = [model.predict(asked) for model in models]
        twins = [pickle.loads(pickle.dumps(models)) for _ in range(2)]
        assert merging() > 450, ksmrs.process_stats()
        for twin in twins:
            assert all((model.predict(asked) == right).all() for model, right in zip(twin, wanted, strict=True))
        again = fitted()
        assert all(np.allclose(model.predict(asked), right) for model, right in zip(again, wanted, strict=True))
        """,
    "joblib": """
        import joblib
        from joblib import Parallel, delayed
        def work(seed):
            import numpy as np, ksmrs
            from ksmrs import _ksmrs
            array = np.random.default_rng(seed).random(1 << 17)
            return _ksmrs.is_lent(array.ctypes.data), float(array.sum())
        wanted = [float(np.random.default_rng(seed).random(1 << 17).sum()) for seed in range(8)]
        threads = Parallel(2, backend="threading")(delayed(work)(seed) for seed in range(8))
        assert threads == [(True, right) for right in wanted]
        with joblib.parallel_config(backend="loky", n_jobs=2, initializer=ksmrs.worker_init):
            loky = Parallel()(delayed(work)(seed) for seed in range(8))
        assert loky == [(True, right) for right in wanted], loky
        """,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_whose_arrays_all_merge(library: str) -> None:
    pytest.importorskip(library)
    program(LIBRARIES[library])
