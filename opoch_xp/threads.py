"""Tasks over threads, for kernels that run without the interpreter's lock."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from itertools import count
from typing import Any

MOST = 256  # threads of the process, however many calls share tasks at a time; each starts when it is first needed


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST, thread_name_prefix="opoch_xp")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def share(function: Callable[[Any], None], tasks: Iterable[Any], workers: int) -> None:
    """function(task) for every task, over `workers` threads, this one among them, each taking the next as it is free.

    The first error is raised, once no task runs any more. A task may share tasks of its own.
    """
    tasks = list(tasks)
    numbers = count()

    def work() -> None:
        while (number := next(numbers)) < len(tasks):
            function(tasks[number])

    helpers = [_pool().submit(copy_context().run, work) for _ in range(min(workers, len(tasks)) - 1)]
    try:
        work()
    finally:
        errors = [helper.exception() for helper in helpers if not helper.cancel()]
    for error in filter(None, errors):
        raise error
