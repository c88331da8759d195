"""NumPy plugin: the kernels in blocks that stay in cache, on all cores.

Threads: `threads(n)` around a call, or the environment variable OPOCH_NUM_THREADS; by default all cores. See
`opoch_xp.backends.numpy.threads`.
"""

from opoch_xp.backends.numpy.threads import thread_count, threads

__all__ = ["thread_count", "threads"]
