"""The benchmarks themselves: what is missing or too long is n/a, what is wrong is not timed, and the smallest run."""

from importlib import import_module
from itertools import product

import pytest
from suites import attention, cache, common, dispatch, hashing, index

SMALL = [attention.Length, cache.Decoding, dispatch.Dispatch, hashing.Codes, index.Index]


@pytest.mark.parametrize("suite", SMALL, ids=lambda suite: suite.__name__)
@pytest.mark.parametrize("backend", ["numpy", "generic"])
def test_the_smallest_sizes_run(suite, backend):
    others = [axis if isinstance(axis[0], str) else axis[:1] for axis in suite.params[1:]]
    for parameters in product([backend], *others):
        benchmark = suite()
        benchmark.setup(*parameters)
        for name in dir(benchmark):
            if name.startswith(("time_", "track_")):
                figure = getattr(benchmark, name)(*parameters)
                assert figure is None or figure >= 0


def test_a_missing_library_is_not_applicable(monkeypatch):
    monkeypatch.setattr(common, "namespace", lambda name: import_module("no_such_library"))
    with pytest.raises(NotImplementedError, match="cupy is not here: No module named 'no_such_library'"):
        attention.Length().setup("cupy", "Exact", 1024)


def test_what_takes_too_long_is_not_applicable():
    with pytest.raises(NotImplementedError, match="above the limit"):
        attention.Length().setup("numpy", "Exact", 2**20)
    with pytest.raises(NotImplementedError, match="above the limit"):
        attention.Length().setup("generic", "Treecode", 2**20)


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setitem(attention.BOUNDS["scattered"], "LSH", 0.01)
    with pytest.raises(AssertionError, match="error must be from 0 to 0.01"):
        attention.Length().setup("numpy", "LSH", 1024)
    with pytest.raises(AssertionError, match="got nan"):
        common.verify("error", float("nan"), most=1.0)


def test_preparation_is_done_once_for_all_samples():
    class Counted(common.Suite):
        prepared = 0

        def prepare(self, size):
            self.prepared += size

    benchmark = Counted()
    for size in (1, 1, 2, 2):
        benchmark.setup(size)
    assert benchmark.prepared == 3
