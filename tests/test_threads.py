"""Threads of the NumPy plugin: the same bits whatever their number, and BLAS left as it was."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
from threadpoolctl import OpenBLASController, threadpool_info, threadpool_limits

import opoch_xp as ox
from opoch_xp.backends.numpy import thread_count, threads
from opoch_xp.backends.numpy.pool import run
from opoch_xp.testing import clustered, qkv

METHODS = [ox.Exact(), ox.Treecode(block=64, leaf=4), ox.Treecode(group=16, iterations=0), ox.LSH(bits=4, tables=3)]


free = getattr(OpenBLASController, "clear_controlling_thread", lambda force: None)  # where a thread can be in charge


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.fixture
def two_blas_threads() -> Iterator[list[int]]:
    """BLAS set to two threads, and no Python thread in charge of it: threadpoolctl lets one alone set the number."""
    with threadpool_limits(2, user_api="blas"):
        free(force=True)
        yield blas_threads()
        free(force=True)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_whatever_the_threads(method: ox.Exact, causal: bool) -> None:
    q, k, v = (np.stack([a, a[::-1]]) for a in clustered(0, 1500))
    found = []
    for number in (1, 2, 2, 5):
        with threads(number):
            found.append(ox.attend(q, k, v, causal=causal, method=method))
    for other in found[1:]:
        assert np.array_equal(other.out, found[0].out)
        assert np.array_equal(other.lse, found[0].lse)


def test_concurrent_calls_give_what_single_calls_give() -> None:
    inputs = [qkv(seed, 400, lead=(2,)) for seed in range(6)]
    method = ox.Treecode(block=32, leaf=4)
    alone = [ox.attention(*arrays, causal=True, method=method) for arrays in inputs]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda arrays: ox.attention(*arrays, causal=True, method=method), inputs * 2))
    for out, expected in zip(together, alone * 2, strict=True):
        assert np.array_equal(out, expected)


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPOCH_NUM_THREADS", "3")
    assert thread_count() == 3
    with threads(2):
        assert thread_count() == 2
        with threads(7):
            assert thread_count() == 7
        assert thread_count() == 2
    assert thread_count() == 3
    monkeypatch.delenv("OPOCH_NUM_THREADS")
    assert thread_count() >= 1


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5", "\N{SUPERSCRIPT TWO}"])
def test_an_environment_variable_that_is_no_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OPOCH_NUM_THREADS", text)
    q, k, v = np.ones((3, 4, 2))
    with pytest.raises(ValueError, match=f"OPOCH_NUM_THREADS must be a whole number of at least 1, got '{text}'"):
        ox.attend(q, k, v, method=ox.Exact())


@pytest.mark.parametrize("number", [0, -2, 1.5, True, None])
def test_a_number_of_threads_that_is_none(number: int) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1, got"), threads(number):
        pass


def test_blas_is_held_to_one_thread_and_let_go(two_blas_threads: list[int]) -> None:
    assert set(two_blas_threads) == {2}, "a BLAS is there to be held"
    held = [1] * len(two_blas_threads)
    with threads(2):
        assert run(lambda _: blas_threads(), range(3)) == [held] * 3
        assert blas_threads() == two_blas_threads
        assert run(lambda _: (run(lambda _: 0, range(2)), blas_threads())[1], range(2)) == [held] * 2
        assert blas_threads() == two_blas_threads


def test_blas_is_held_until_the_last_of_overlapping_calls_ends(two_blas_threads: list[int]) -> None:
    first_in, second_in, first_out = Event(), Event(), Event()
    waiting = 30  # seconds, after which a deadlock is called one

    def first(_: int) -> None:
        first_in.set()
        assert second_in.wait(waiting)

    def second(_: int) -> list[int]:
        second_in.set()
        assert first_out.wait(waiting)
        return blas_threads()

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, first, [0])
        assert first_in.wait(waiting)
        two = pool.submit(run, second, [0])
        one.result(waiting)
        first_out.set()
        assert two.result(waiting) == [[1] * len(two_blas_threads)]
        assert blas_threads() == two_blas_threads, "let go by another thread than the one that took hold"


def test_an_error_in_a_task_is_raised_and_blas_let_go(two_blas_threads: list[int]) -> None:
    def fail(task: int) -> None:
        raise ZeroDivisionError(f"task {task}")

    for number in (1, 2):
        with threads(number), pytest.raises(ZeroDivisionError, match="task"):
            run(fail, range(4))
        assert blas_threads() == two_blas_threads


def test_tasks_come_back_in_order() -> None:
    with threads(4):
        assert run(lambda task: task * task, range(50)) == [task * task for task in range(50)]
        assert run(lambda task: task, []) == []
