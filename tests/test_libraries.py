"""Libraries on memory that was opted in where they had put it: pandas, scikit-learn, gevent. Same results, same addresses.

Each runs in a child, whose arrays get mappings of their own, hence the same phase; two equal objects merge with each other,
and a third that takes no part says what is right. Merging goes on meanwhile, and each program checks that it did.
"""

from __future__ import annotations

import importlib.util

import pytest

from children import TESTS, run


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def library(program: str, prelude: bool = True) -> None:
    run(program, prelude=prelude, MALLOC_MMAP_THRESHOLD_="65536", PYTHONPATH=str(TESTS))


@needs("pandas")
def test_data_frames_whose_columns_were_opted_in() -> None:
    library(
        """
        import reading
        import pandas as pd
        from pandas.testing import assert_frame_equal
        ROWS = 64_000
        def frame():
            chance = np.random.default_rng(1)
            return pd.DataFrame({
                "a": chance.random(ROWS), "b": chance.random(ROWS), "k": chance.integers(0, 100, ROWS),
                "t": pd.date_range("2020", periods=ROWS, freq="min"), "s": chance.choice(["x", "y", "z"], ROWS),
            })
        NUMBERS = ["a", "b", "k", "t"]
        def results(df):
            yield df.groupby("k").agg({"a": "sum", "b": "median", "t": "max"})
            yield df.sort_values(["b", "k"])
            yield df.merge(pd.DataFrame({"k": range(100), "name": [str(n) for n in range(100)]}), on="k")
            yield df[["a", "b"]].rolling(50).mean()
            yield df.query("a > b and k < 50")
            yield df.pivot_table(index="k", columns="s", values="a", aggfunc="mean")
            yield df.set_index("t")[["a", "b"]].resample("1D").sum()
            yield df[NUMBERS].describe()
            yield df.copy()
        def addresses(df):
            return [df[name].to_numpy().ctypes.data for name in NUMBERS]
        *frames, reference = (frame() for _ in range(3))
        before = [addresses(df) for df in frames]
        for df in frames:
            for name in NUMBERS:
                ksmrs.madvise(df[name].to_numpy(), ksmrs.MADV_MERGEABLE)
        pages = 2 * len(NUMBERS) * (ROWS * 8 // 4096 - 1)
        wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages >= pages, "merging", 60)
        merges, copied = ksmrs.process_stats().merges, ksmrs.stats().cow_ksm
        with reading.merging_without_pause():
            for turn in range(4):
                for df in (*frames, reference):  # in place, in every page
                    df.loc[turn::400, "a"] += 1.0
                    df.iloc[turn::400, 2] = turn
                wanted = list(results(reference))
                for df in frames:
                    for number, (got, right) in enumerate(zip(results(df), wanted, strict=True)):
                        assert_frame_equal(got, right, check_exact=True, obj=f"turn {turn}, result {number}")
                    again = df.copy()
                    assert_frame_equal(again, reference, check_exact=True)
            wait_for(lambda: ksmrs.process_stats().merges >= merges + pages, "merging of what was written", 30)
        assert ksmrs.stats().cow_ksm >= copied + pages // 2, ksmrs.stats()
        assert [addresses(df) for df in frames] == before
        import pickle
        for df in frames:
            assert_frame_equal(pickle.loads(pickle.dumps(df)), reference, check_exact=True)
            # The bytes of each column too; those of a whole frame also tell which strings are one object.
            for name in NUMBERS:
                assert pickle.dumps(df[name].to_numpy()) == pickle.dumps(reference[name].to_numpy())
        """
    )


@needs("sklearn")
def test_fitted_models_whose_arrays_were_opted_in() -> None:
    library(
        """
        import pickle, warnings
        import reading
        from sklearn.ensemble import RandomForestRegressor
        from sklearn.neighbors import KNeighborsRegressor
        from sklearn.neural_network import MLPRegressor
        warnings.simplefilter("ignore")  # two iterations converge nowhere
        chance = np.random.default_rng(1)
        data, asked = chance.random((4000, 32)), chance.random((50, 32))
        target = data[:, 0] * 3 + chance.random(4000)
        fitted = {
            "tree": KNeighborsRegressor(algorithm="kd_tree").fit(data, target),
            "brute": KNeighborsRegressor(algorithm="brute").fit(data, target),
            "network": MLPRegressor(hidden_layer_sizes=(200, 200), max_iter=2, random_state=0).fit(data, target),
            # Two trees: the threads add up what trees predict in any order, which makes a difference from three on.
            "forest": RandomForestRegressor(n_estimators=2, n_jobs=2, random_state=0).fit(data, target),
        }
        wanted = {name: model.predict(asked) for name, model in fitted.items()}
        def arrays(models):
            yield models["tree"]._fit_X
            yield np.asarray(models["tree"]._tree.data)
            yield models["brute"]._fit_X
            yield models["network"].coefs_[1]
        twins = [pickle.loads(pickle.dumps(fitted)) for _ in range(2)]
        for models in twins:
            for array in arrays(models):
                ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
            for tree in models["forest"].estimators_:
                # Nodes of a tree lie in memory of its own that nobody can hold: refused, and nothing is changed.
                try:
                    ksmrs.madvise(tree.tree_.value, ksmrs.MADV_MERGEABLE, min_bytes=4096)
                except ksmrs.ForeignMemoryError as refused:
                    assert "Tree, which cannot be held" in str(refused)
                else:
                    raise AssertionError("a tree's nodes were opted in")
        distinct = {array.ctypes.data: array.nbytes // 4096 - 1 for models in twins for array in arrays(models)}
        pages = sum(distinct.values())
        wait_for(lambda: ksmrs.merge(5) and ksmrs.process_stats().ksm_merging_pages >= pages, "merging", 60)
        merges = ksmrs.process_stats().merges
        rounds = 0
        with reading.merging_without_pause():
            while rounds < 3 or ksmrs.process_stats().merges < merges + 2 * pages:
                for models in twins:
                    for array in {array.ctypes.data: array for array in arrays(models)}.values():
                        if array.flags.writeable:
                            array *= 1.0  # the same bytes, written: its pages merge again
                    for name, model in models.items():
                        assert (model.predict(asked) == wanted[name]).all(), (name, rounds)
                rounds += 1
                assert rounds < 300, ksmrs.stats()
        for models in twins:
            again = pickle.loads(pickle.dumps(models))
            assert all((model.predict(asked) == wanted[name]).all() for name, model in again.items())
            for array, right in zip(arrays(models), arrays(fitted), strict=True):
                assert pickle.dumps(array) == pickle.dumps(right)
        """
    )


@needs("gevent")
def test_greenlets_that_switch_in_the_midst_of_merged_arrays() -> None:
    """Everything patched, as servers do; each greenlet is switched away from with frames of C on its stack."""
    library(
        """
        from gevent import monkey
        monkey.patch_all()
        import random, socket, threading, time
        import gevent
        import numpy as np
        import ksmrs
        PAGE, PAGES, WRITERS = 4096, 256, 16
        content = np.random.default_rng(1).integers(1, 256, PAGES * PAGE, np.uint8)
        def make():
            raw = np.empty(content.size + PAGE, np.uint8)
            array = raw[-raw.ctypes.data % PAGE :][: content.size]
            array[:] = content
            ksmrs.madvise(array, ksmrs.MADV_MERGEABLE)
            return array
        arrays = [make(), make()]
        ksmrs.merge(30)
        ksmrs.tunables.sleep_millisecs = 0  # merging is the background's: merge() holds up all greenlets of its thread
        assert ksmrs.process_stats().ksm_merging_pages == 2 * PAGES
        before, copied = ksmrs.process_stats().merges, ksmrs.stats().cow_ksm
        until = time.monotonic() + 60
        def going_on():
            assert time.monotonic() < until, ksmrs.stats()
            stats = ksmrs.stats()
            return min(ksmrs.process_stats().merges - before, stats.cow_ksm - copied) < 4 * PAGES
        done = []
        def write(number):
            # Pages of its own, of the first 128; the rest are the readers'.
            chance = random.Random(number)
            for _ in range(40):
                array, at = arrays[number % 2], chance.randrange(number, 128, WRITERS) * PAGE + number
                def within(value):
                    array[at] = value
                    gevent.sleep(0)
                    assert array[at] == value
                    return value
                # max() calls back from C, and sorted() once more: two C frames hold the greenlet's state.
                max(sorted([3, 9, 6], key=within), key=within)
                array[at] = content[at]
                gevent.sleep(0)
        def writing(number):
            rounds = 0
            while rounds == 0 or going_on():
                write(number)
                rounds += 1
            done.append(number)
        def read(number, source):
            part = memoryview(arrays[number])[128 * PAGE :]
            rounds = 0
            while rounds < 20 or going_on():
                part[:: PAGE] = bytes(128)
                at = 0
                while at < len(part):
                    with ksmrs.pinned(part[at:]):  # held while others run, pin and write
                        at += source.recv_into(part[at:])
                assert part == memoryview(content)[128 * PAGE :], rounds
                rounds += 1
            done.append("reader")
            source.close()
        def send(sink):
            try:
                while True:
                    sink.sendall(content[128 * PAGE :])
            except OSError:
                sink.close()  # the reader has enough
        jobs = [gevent.spawn(writing, number) for number in range(WRITERS)]
        for number in range(2):
            ours, theirs = socket.socketpair()
            jobs += [gevent.spawn(read, number, ours), gevent.spawn(send, theirs)]
        gevent.joinall(jobs, raise_error=True, timeout=100)
        assert sorted(map(str, done)) == sorted([*map(str, range(WRITERS)), "reader", "reader"]), done
        assert all((array == content).all() for array in arrays)
        """,
        prelude=False,
    )
