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
from threading import Condition, local
from typing import Any
from weakref import WeakSet, ref

PATIENCE = 0.1  # seconds between looks at the calls that a fork waits for
MOST = 256  # threads of the process, however many calls share tasks at a time; each starts when it is first needed


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST, thread_name_prefix="opoch_xp")


class _Call:
    """One call whose tasks run. What a task calls belongs to the call that the task is of."""


class _Calls:
    """The calls there are; one that an interrupt tore out of its own bookkeeping is forgotten with its frame."""

    def __init__(self) -> None:
        self.changed, self.forking, self.forks = Condition(), 0, local()
        self.running: WeakSet[_Call] = WeakSet()
        self.within: ContextVar[ref[_Call] | None] = ContextVar("within", default=None)

    def ours(self) -> _Call | None:
        """The call that this thread is inside of."""
        held = self.within.get()
        return None if held is None else held()

    @contextmanager
    def one(self) -> Iterator[None]:
        if self.ours() is not None:
            yield
            return
        new = _Call()
        try:
            with self.changed:
                self.changed.wait_for(lambda: not self.forking)
                self.running.add(new)
            self.within.set(ref(new))
            yield
        finally:
            self.within.set(None)
            with self.changed:
                self.running.discard(new)
                self.changed.notify_all()

    def before_fork(self) -> None:
        """Wait for the calls of other threads, and let none begin until `after_fork`."""
        ours = self.ours()
        self.changed.acquire()
        self.forks.waiting = True
        self.forking += 1
        while not all(call is ours for call in self.running):
            self.changed.wait(PATIENCE)

    def after_fork(self) -> None:
        if getattr(self.forks, "waiting", False):
            self.forks.waiting = False
            self.forking -= 1
            self.changed.notify_all()
            self.changed.release()

    def in_child(self) -> None:
        """A forked process has the forking thread alone, and none of those that waited."""
        ours = self.ours()
        self.changed, self.forking, self.forks = Condition(), 0, local()
        self.running = WeakSet([] if ours is None else [ours])


_calls = _Calls()
call = _calls.one  # a context in which tasks are shared: a fork waits for its end


def _in_child() -> None:
    _pool.cache_clear()
    _calls.in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_calls.before_fork, after_in_parent=_calls.after_fork, after_in_child=_in_child)


def share(function: Callable[[Any], None], tasks: Iterable[Any], workers: int) -> None:
    """function(task) for every task, over `workers` threads, this one among them, each taking the next as it is free.

    The first error is raised, once no task runs any more; after one, and after Ctrl-C, no further task begins. A task
    may share tasks of its own. Where no thread can be had, as after the end of the main thread, this one does it all.
    """
    tasks = list(tasks)
    numbers, stopped = count(), False
    helpers: list[Future[None]] = []

    def work() -> None:
        nonlocal stopped
        try:
            while not stopped and (number := next(numbers)) < len(tasks):
                function(tasks[number])
        except BaseException:
            stopped = True
            raise

    with call():
        try:
            _enlist(helpers, work, min(workers, len(tasks)) - 1)
            work()
            errors = _errors(helpers)
        except BaseException:
            stopped = True
            _wait_for(helpers)
            raise
    for error in filter(None, errors):
        raise error


def _enlist(helpers: list[Future[None]], work: Callable[[], None], wanted: int) -> None:
    """Have threads of the pool do `work` as well: `wanted`, or fewer where the interpreter starts no more.

    A helper is known before it is handed to the pool, which may queue what it has no thread for.
    """
    for _ in range(wanted):
        helper: Future[None] = Future()
        helpers.append(helper)
        try:
            _pool().submit(copy_context().run, _help, helper, work)
        except RuntimeError:
            return


def _help(helper: Future[None], work: Callable[[], None]) -> None:
    if not helper.set_running_or_notify_cancel():
        return
    try:
        work()
    except BaseException as error:
        helper.set_exception(error)
    else:
        helper.set_result(None)


def _errors(helpers: list[Future[None]]) -> list[BaseException | None]:
    """What ended each helper that had begun, once all are done."""
    return [helper.exception() for helper in helpers if not helper.cancel()]


def _wait_for(helpers: list[Future[None]]) -> None:
    """Until all are done, whoever interrupts: they write to arrays of the caller's."""
    while True:
        try:
            _errors(helpers)
            return
        except KeyboardInterrupt:
            continue
