"""Threads of the NumPy plugin: the same bits whatever their number, and BLAS left as it was."""

import os
import signal
import subprocess
import sys
import textwrap
from _thread import interrupt_main
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Timer, current_thread, main_thread
from time import sleep

import numpy as np
import pytest
from threadpoolctl import OpenBLASController, threadpool_info, threadpool_limits

import opoch_xp as ox
from opoch_xp.backends.numpy import thread_count, threads
from opoch_xp.backends.numpy.pool import run
from opoch_xp.testing import clustered, qkv
from opoch_xp.threads import share

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


def test_blas_is_held_whichever_thread_calls(two_blas_threads: list[int]) -> None:
    held = [1] * len(two_blas_threads)
    assert run(lambda _: blas_threads(), [0]) == [held]
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(run, lambda _: blas_threads(), [0]).result() == [held]
        assert blas_threads() == two_blas_threads
    assert run(lambda _: blas_threads(), [0]) == [held]


def test_blas_is_held_where_another_thread_is_in_charge_of_it() -> None:
    with threadpool_limits(2, user_api="blas"):  # which puts this thread in charge
        before = blas_threads()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(run, lambda _: blas_threads(), [0]).result() == [[1] * len(before)]
        assert blas_threads() == before


def test_ctrl_c_ends_a_call_after_the_tasks_that_run() -> None:
    done = []

    def task(number: int) -> None:
        if number == 3:
            signal.raise_signal(signal.SIGINT)  # taken by the main thread, between two of its tasks
        sleep(0.01)
        done.append(number)

    with pytest.raises(KeyboardInterrupt):
        share(task, range(1000), 2)
    held = len(done)
    assert held < 20
    sleep(0.05)
    assert len(done) == held, "no task runs any more"
    share(done.append, range(10), 2)
    assert len(done) == held + 10


def test_ctrl_c_while_the_main_thread_waits() -> None:
    begun, ended = Event(), Event()

    def task(number: int) -> None:
        if current_thread() is not main_thread():
            begun.set()
            sleep(0.3)
            ended.set()
        else:
            assert begun.wait(30)

    timer = Timer(0.1, interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        share(task, range(2), 2)
    timer.join()
    assert ended.is_set(), "raised once no task runs any more"


def in_a_process(code: str) -> list[str]:
    """The lines that a program prints which has x (3, 2000, 8) and an index of some of it."""
    begin = (
        "import atexit, os, sys, threading, time, numpy as np, opoch_xp as ox;"
        "x = np.random.default_rng(0).standard_normal((3, 2000, 8)).astype('f4');"
        "index = ox.LSHIndex(8, 4, 4); index.add(x[0])\n"
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", begin + textwrap.dedent(code)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout.splitlines()


def test_calls_after_the_end_of_the_main_thread() -> None:
    lines = in_a_process(
        """
        def use():
            print(ox.attention(x, x, x, causal=True).shape, index.search(x[1], 3).ids.shape)

        def later():
            threading.main_thread().join()
            use()

        atexit.register(use)
        threading.Thread(target=later).start()
        """
    )
    assert lines == ["(3, 2000, 8) (2000, 3)"] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_fork_while_other_threads_compute() -> None:
    """The child can compute, and so can the parent, whatever other threads were about."""
    lines = in_a_process(
        """
        going, growing = True, ox.LSHIndex(8, 4, 4)

        def work():
            while going:
                index.search(x[1], 3, exact=True)
                growing.add(x[1][:10])
                ox.attention(x, x, x)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        ended = 0
        for _ in range(10):
            child = os.fork()
            if child == 0:
                index.search(x[1], 3, exact=True)
                growing.add(x[1][:10])
                ox.attention(x, x, x)
                os._exit(0)
            for _ in range(600):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    ended += status == 0
                    break
                time.sleep(0.05)
            else:
                os.kill(child, 9)
        going = False
        for thread in threads:
            thread.join()
        print(ended)
        """
    )
    assert lines == ["10"]
