"""KVCache: keys and values that grow, and attention over them token by token.

kv         KVCache: what users call
layout     what a cache holds, and the checks of what is given to it
forest     keys and values in a growing forest: the treecode
trees      the trees of one tier of it
balances   what queries tell of how its keys are to be split
rows       keys and values in rows, as they came: Exact and LSH
exact      exact attention of the last tokens, for both
groups     sequences that are alike, taken together
memory     where arrays lie: the device, the host, a file
arrays     writing to arrays of libraries that write in place, and of those that do not
file       saved caches
"""

from opoch_xp.cache.kv import KVCache

__all__ = ["KVCache"]
