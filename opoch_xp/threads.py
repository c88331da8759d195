"""Tasks over threads, for kernels that run without the interpreter's lock.

A fork waits until no task runs, since it takes the forking thread alone along: a child that was forked while another
thread computed would wait forever for locks that this thread held.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache
from itertools import count
from threading import Condition
from typing import Any

MOST = 256  # threads of the process, however many calls share tasks at a time; each starts when it is first needed


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST, thread_name_prefix="opoch_xp")


class _Calls:
    """The calls whose tasks run now. What a task calls belongs to the call that the task is of."""

    def __init__(self) -> None:
        self.changed, self.inside, self.forking = Condition(), 0, False
        self.within: ContextVar[bool] = ContextVar("within", default=False)

    @contextmanager
    def one(self) -> Iterator[None]:
        if self.within.get():
            yield
            return
        counted = False
        try:
            with self.changed:
                self.changed.wait_for(lambda: not self.forking)
                self.inside += 1
                counted = True
            self.within.set(True)
            yield
        finally:
            self.within.set(False)
            if counted:
                with self.changed:
                    self.inside -= 1
                    self.changed.notify_all()

    def before_fork(self) -> None:
        """Wait for the calls of other threads, and let none begin until `after_fork`."""
        self.changed.acquire()
        self.forking = True
        self.changed.wait_for(lambda: self.inside == self.within.get())

    def after_fork(self) -> None:
        self.forking = False
        self.changed.notify_all()
        self.changed.release()


_calls = _Calls()
call = _calls.one  # a context in which tasks are shared: a fork waits for its end


def _in_child() -> None:
    _pool.cache_clear()  # a forked process has none of the threads
    _calls.changed = Condition()  # nor those that waited
    _calls.forking = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_calls.before_fork, after_in_parent=_calls.after_fork, after_in_child=_in_child)


def share(function: Callable[[Any], None], tasks: Iterable[Any], workers: int) -> None:
    """function(task) for every task, over `workers` threads, this one among them, each taking the next as it is free.

    The first error is raised, once no task runs any more; after one, and after Ctrl-C, no further task begins. A task
    may share tasks of its own. Where no thread can be had, as after the end of the main thread, this one does it all.
    """
    tasks = list(tasks)
    numbers, stopped = count(), False

    def work() -> None:
        nonlocal stopped
        try:
            while not stopped and (number := next(numbers)) < len(tasks):
                function(tasks[number])
        except BaseException:
            stopped = True
            raise

    with call():
        helpers = _helpers(work, min(workers, len(tasks)) - 1)
        try:
            work()
            errors = _errors(helpers)
        except BaseException:
            stopped = True
            _errors(helpers)
            raise
    for error in filter(None, errors):
        raise error


def _helpers(work: Callable[[], None], wanted: int) -> list[Future[None]]:
    """Threads of the pool that do `work` as well: `wanted`, or fewer where the interpreter starts no more."""
    found: list[Future[None]] = []
    try:
        found.extend(_pool().submit(copy_context().run, work) for _ in range(wanted))
    except RuntimeError:
        pass
    return found


def _errors(helpers: list[Future[None]]) -> list[BaseException | None]:
    """What ended each helper that had begun, once all are done."""
    return [helper.exception() for helper in helpers if not helper.cancel()]
