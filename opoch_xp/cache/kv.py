"""KVCache: keys and values that grow, and attention over them token by token."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import device

from opoch_xp.arguments import check_scale
from opoch_xp.attention import Attention, Report
from opoch_xp.audit import Audit, check_rows, compared
from opoch_xp.cache import file, forked
from opoch_xp.cache.exact import attend_exactly, last_seen
from opoch_xp.cache.forest import Forest
from opoch_xp.cache.groups import entries, figures, joined, of_columns, together
from opoch_xp.cache.layout import (
    Columns,
    Layout,
    alike,
    arranged,
    arranged_queries,
    check_finite,
    check_numbers,
    check_queries,
    check_same,
    columns_kept,
    of_first,
    sequence_numbers,
)
from opoch_xp.cache.memory import Memory, folder
from opoch_xp.cache.rows import Rows
from opoch_xp.cost import visible_pairs
from opoch_xp.methods import Method, Treecode, check_whole
from opoch_xp.problem import Solution, nothing_seen
from opoch_xp.solve import check_method
from opoch_xp.tensors import from_bytes, to_bytes

Array = Any


class KVCache:
    """Keys and values of one or more sequences that grow, and attention of their last tokens over all of them.

    With `Treecode`, the default, every chunk of keys is split and summarised once, when it fills, and a chunk of the
    next tier takes the place of those it is made of: what a step reads grows slowly with the length, and a key is held
    once. A query's own block is exact, also when it has just filled, and so are the first tokens, the sinks. `Exact`
    and `LSH` keep rows as they came; LSH hashes and sorts them anew in each call, with max_bucket fixed, by default at
    256 keys or what the capacity would give.

    Chunks are split along what queries care about, their *balance* (opoch_xp.treecode.balance). That of a sequence is
    fixed with its first chunk, by the queries given until then to `prefill` and to causal `attend` of the tokens of its
    first block, up to 256; where none were, every dimension counts alike. Later queries do not change it. A crop that
    leaves no chunk lets go of it: it is fixed anew by the queries of the tokens that stay and of those that come after.

    The first keys appended fix library, device, dtype and shapes: k (..., H_kv, n, d), v (..., H_kv, n, d_v), as in
    `attend`; 16 bits are kept in float32 where the kernels do not take them. Sequences of a batch may differ in length:
    positions count from the first token kept of each, so padding on the left and on the right are equal.

    capacity: the most tokens of a sequence. Memory is then taken at the first append, and shapes never change, so that
    kernels compiled by shape (JAX) are compiled once; without, it grows by doubling. offload: where keys and values
    of complete chunks lie, "host" for host memory, of which what is opened is fetched, or a folder for files mapped
    into memory; summaries and the open block stay on the device. offload_finest: the summaries of cells, most of all
    summaries, lie there too. backend as in `attention`.

    Nothing changes in a call that raises (but where memory runs out while sequences of several lengths change, some of
    them may keep the change: `lengths` tells). No gradients; not for several threads at a time.

    Cost: a step, the rows it reads (see `Treecode`) a query head, whatever the length; the query heads of a key head
    share what they open where they make one group (`group` of the method). On two cores, d = 64, a head: 5
    microseconds a token appended in pieces, 22 one at a time; the token that follows a full chunk waits for its
    splitting, 1.3 ms for 1,024 keys, 71 for 32,768, 3,800 for 1,048,576 (docs/decoding.md). Memory: keys and values, a
    ninth more for summaries at leaf=16, and room to grow. Source: Barnes and Hut, 1986, for the tree; O'Neil et al.,
    The log-structured merge-tree, 1996, for its growing.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 1000, 8))
    >>> cache = ox.KVCache(ox.Treecode(rtol=0.2, block=64, leaf=4, group=1))
    >>> prompt = cache.prefill(q[:, :999], k[:, :999], v[:, :999])
    >>> cache.append(k[:, 999:], v[:, 999:])
    >>> step = cache.attend(q[:, 999:])
    >>> step.out.shape, len(cache), sum(step.report.rows.values()) < 500
    ((2, 1, 8), 1000, True)
    """

    def __init__(
        self,
        method: Method | None = None,
        capacity: int | None = None,
        *,
        offload: str | Path | None = None,
        offload_finest: bool = False,
        backend: str | None = None,
    ) -> None:
        self.method = Treecode() if method is None else method
        check_method(self.method)
        if capacity is not None:
            check_whole("capacity", capacity, 1)
        self.capacity, self.backend = capacity, backend
        self.offload, self.offload_finest = folder(offload), bool(offload_finest)
        if offload is not None and not isinstance(self.method, Treecode):
            raise ValueError(f"offload needs a Treecode, which opens few cells; {self.method!r} reads every key")
        if offload_finest and offload is None:
            raise ValueError("offload_finest=True needs offload=, which says where the finest summaries are to lie")
        self._layout: Layout | None = None
        self._store: Any = None

    def __len__(self) -> int:
        """Tokens of the longest sequence."""
        return 0 if self._store is None else int(self._store.lengths.max())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64, in the shape of the axes before heads; a copy, on the host."""
        if self._layout is None:
            return np.zeros((), np.int64)
        return self._store.lengths.reshape(self._layout.lead).copy()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held, room to grow and what is offloaded included."""
        return 0 if self._store is None else self._store.nbytes

    def __repr__(self) -> str:
        given = [repr(self.method)]
        given += [f"{name}={getattr(self, name)!r}" for name in ("capacity", "backend") if getattr(self, name)]
        given += [f"offload={str(self.offload)!r}"] if self.offload is not None else []
        batch = "" if self._layout is None or not self._layout.lead else f" in {self._layout.batch} sequences"
        return f"KVCache({', '.join(given)}) of {len(self):,} tokens{batch}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        """copy.deepcopy: a cache of its own that goes on from the same tokens; not of one whose keys lie in files."""
        if self._layout is not None:
            for module in (self._layout.xp, self._layout.kernels):  # which are no part of it
                memo[id(module)] = module
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        with nullcontext() if self._store is None else self._store.memory.lasting():
            vars(twin).update({name: deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def append(self, k: Array, v: Array, *, key_mask: Array | None = None, check_finite: bool | None = None) -> None:
        """Put keys k (..., H_kv, m, d) and values v (..., H_kv, m, d_v) after those that are there; m may be 0.

        key_mask (..., m) bool, without the axis of heads, True = keep: padding, on any side, is left out and may hold
        anything; the mask is read back to the host, or NumPy's for arrays of any library. check_finite as in `attend`.

        Raises TypeError or ValueError where they do not fit what is held (heads, sizes, dtype, device, library), are
        not finite, or where a fixed capacity is passed.
        """
        layout, groups = self._checked(k, v, key_mask, check_finite)
        with self._changing(layout):
            for sequences, _, k, v in groups:
                for some in self._store.alike(sequences):
                    for rows in self._steps(some, k.shape[2]):
                        new = (self._rows(entries(layout, x, sequences, some), rows) for x in (k, v))
                        self._store.append(some, *new)

    def attend(self, q: Array, *, causal: bool = True, scale: float | None = None) -> Attention:
        """Attention of queries q (..., H, n_q, d) over what is held; H a multiple of H_kv.

        causal: the queries are those of the last n_q tokens of each sequence, the last of them sees every key; rows
        before the first token of a shorter sequence see none. Otherwise every query sees all. scale as in
        `opoch_xp.attend`. Returns out, lse and the report of what was read.

        Queries that reach back before the last block read chunks that were merged since: those are split anew, in this
        call alone. Raises ValueError before the first append, for more queries than tokens when causal, or sizes that
        do not fit; TypeError for another library or dtype.
        """
        return self._attended(q, causal, scale, told=causal)

    def _attended(self, q: Array, causal: bool, scale: float | None, told: bool) -> Attention:
        """`attend`; told: the queries are those of the tokens, and may tell a balance."""
        layout, scale = self._ready(q, scale)
        n_q = q.shape[-2]
        if causal and n_q > len(self):
            raise ValueError(
                f"causal attention is that of the last n_q tokens: the cache holds {len(self):,}, got {n_q:,} queries"
            )
        queries = arranged_queries(layout, q)
        found = []
        with np.errstate(all="ignore"):
            for some in self._store.alike(layout.everyone):
                part = entries(layout, queries, layout.everyone, some)
                found.append((some, self._solve(some, part, bool(causal), scale)))
                if told:
                    self._store.take_in(some, part, int(self._store.lengths[some[0]]) - n_q)
        return self._result(q, found, sum(len(some) * self._seen(some, n_q, bool(causal)) for some, _ in found))

    def prefill(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        key_mask: Array | None = None,
        scale: float | None = None,
        check_finite: bool | None = None,
    ) -> Attention:
        """Append k and v, and attend with the queries q (..., H, m, d) of the same tokens, some tens of thousands at a
        time: the output of every token over those up to its own, (..., H, m, d_v).

        Arguments as `append` and `attend`. Rows of tokens that the mask leaves out are zeros with lse -inf. With
        group=1 the result is that of any other chunking, to rounding; otherwise within the error of the method.
        """
        check_numbers(q=q)
        layout, groups = self._checked(k, v, key_mask, check_finite)
        check_queries(layout, q)
        scale = check_scale(scale, layout.dim)
        if q.shape[-2] != k.shape[-2]:
            raise ValueError(f"q and k must have the same tokens, got q {tuple(q.shape)}, k {tuple(k.shape)}")
        queries, found, seen = arranged_queries(layout, q), [], 0.0
        with self._changing(layout), np.errstate(all="ignore"):
            for sequences, columns, keys, values in groups:
                ours = of_columns(layout, entries(layout, queries, layout.everyone, sequences), columns, 3)
                for some in self._store.alike(sequences):
                    solutions = []
                    for rows in self._steps(some, keys.shape[2]):
                        new = (entries(layout, x, sequences, some)[:, :, rows, :] for x in (keys, values))
                        part = entries(layout, ours, sequences, some)[:, :, :, rows, :]
                        self._store.take_in(some, part, int(self._store.lengths[some[0]]))
                        self._store.append(some, *new)
                        solutions.append(self._solve(some, part, True, scale))
                        seen += len(some) * self._seen(some, rows.stop - rows.start, True)
                    whole = joined(layout, solutions, q.shape[-2], columns, len(some), ours.shape[2])
                    found.append((some, whole))
        return self._result(q, found, seen)

    def audit(self, q: Array, *, causal: bool = True, scale: float | None = None, seed: int = 0) -> Audit:
        """Error of `attend` on these queries, against exact attention over what is held, in the dtype that is summed.

        Arguments as `attend`; every query is a row of the audit. Cost: a pass over all keys, chunk by chunk.
        """
        check_rows(1, seed)
        layout, factor = self._ready(q, scale)
        if q.shape[-2] == 0:
            raise ValueError(f"q must hold at least one query, got q {tuple(q.shape)}")
        result = self._attended(q, causal, scale, told=False)
        xp, lead = layout.xp, (layout.batch, -1)
        queries = xp.astype(arranged_queries(layout, q), layout.summed, copy=False)
        found = []
        with np.errstate(all="ignore"):
            for some in self._store.alike(layout.everyone):
                part = entries(layout, queries, layout.everyone, some)
                found.append((some, self._exact(some, part, causal, factor)))
        exact = self._result(xp.astype(q, layout.summed, copy=False), found, 0.0)
        arrays = (result.out, result.lse, exact.out, exact.lse)
        out, lse, exact_out, exact_lse = (xp.reshape(x, (*lead, *x.shape[len(q.shape) - 2 :])) for x in arrays)
        return compared(out, lse, exact_out, exact_lse, self.method, tuple(q.shape[:-2]), seed=seed)

    def crop(self, n: int | np.ndarray) -> None:
        """Keep the first n tokens of every sequence; a negative n drops the last -n of each.

        NumPy's whole numbers in the shape of `lengths` say how many tokens of each sequence to keep. Chunks that
        were merged since are split anew. Raises ValueError beyond the length.
        """
        if isinstance(n, np.ndarray):
            self._crop_each(n)
            return
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise TypeError(f"n must be a whole number of tokens, got {n!r}")
        if n > len(self):
            raise ValueError(f"n must be at most the {len(self):,} tokens that the cache holds, got {n:,}")
        if self._store is None:
            if n < 0:
                raise ValueError(f"n must leave tokens to keep: the cache is empty, got {n}")
            return
        wanted = self._store.lengths + n if n < 0 else np.minimum(self._store.lengths, n)
        if (wanted < 0).any():
            raise ValueError(
                f"n must leave tokens to keep: the shortest sequence has {self._store.lengths.min():,}, got {n}"
            )
        self._crop(wanted)

    def _crop_each(self, n: np.ndarray) -> None:
        held = self.lengths
        if n.shape != held.shape or n.dtype.kind not in "iu":
            raise ValueError(f"n must be whole numbers in the shape {held.shape} of lengths, got {n.dtype} {n.shape}")
        if ((n < 0) | (n > held)).any():
            raise ValueError(f"n must be from 0 to the lengths {held.tolist()}, got {n.tolist()}")
        if self._store is not None:
            self._crop(n.reshape(-1).astype(np.int64))

    def select(self, indices: Any) -> None:
        """Keep the sequences named by `indices` (whole numbers, the host's or an array's), in that order.

        A sequence may be named again: complete chunks are then shared until one of the copies grows. Raises ValueError
        unless the cache has one axis of sequences and the indices are theirs.
        """
        self._select(self._batched("select"), sequence_numbers(indices))

    def reorder(self, indices: Any) -> None:
        """`select` with as many indices as there are sequences: what beams of a beam search go on from.

        Cost: the open block of each sequence is copied; complete chunks are not.
        """
        layout, numbers = self._batched("reorder"), sequence_numbers(indices)
        if len(numbers) != layout.batch:
            raise ValueError(f"indices must name {layout.batch} sequences, got {len(numbers)}: select changes how many")
        self._select(layout, numbers)

    def _select(self, layout: Layout, numbers: np.ndarray) -> None:
        if int(numbers.min()) < 0 or int(numbers.max()) >= layout.batch:
            raise ValueError(f"indices must be from 0 to {layout.batch - 1}, got {numbers.tolist()}")
        chosen = replace(layout, lead=(len(numbers),))
        self._store.select(numbers, chosen)
        self._layout = chosen

    def repeat(self, n: int) -> None:
        """Every sequence n times in a row: beams, or samples, of a prompt; complete chunks are shared."""
        check_whole("n", n, 1)
        layout = self._batched("repeat")
        self._select(layout, np.arange(layout.batch).repeat(n))

    def save(self, path: str | Path) -> None:
        """Write the cache to a .safetensors file, whole or not at all: keys and values in the order of tokens, and the
        order in which every chunk was split. Nothing is pickled; offload, capacity and backend are not kept."""
        if self._layout is None:
            raise ValueError("the cache is empty: there is nothing to save")
        file.write(Path(path), self.method, self._layout, self._store)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        like: Array | None = None,
        capacity: int | None = None,
        offload: str | Path | None = None,
        offload_finest: bool = False,
        backend: str | None = None,
    ) -> "KVCache":
        """Read a cache that `save` wrote: it goes on where that one was, with the same bits on the same backend.

        like: an array of the library and device that it is to be on, NumPy by default; the rest as for a new cache.
        Everything is read once and checked: the checksum, sizes, that keys and values are finite and every order is
        one. Raises FileNotFoundError, or ValueError for a file of another kind or a later version, damaged, truncated
        or with contents that do not fit, or longer than the capacity.
        """
        with file.opened(Path(path)) as saved:
            settings = saved.settings
            cache = cls(settings.method, capacity, offload=offload, offload_finest=offload_finest, backend=backend)
            longest = max(settings.lengths)
            if capacity is not None and longest > capacity:
                raise ValueError(f"{path}: holds {longest:,} tokens, more than capacity={capacity:,}")
            layout = saved.layout(like, backend, offload is not None)
            store = cache._new_store(layout)
            saved.restore(layout, store)
        cache._layout, cache._store = layout, store
        return cache

    def __reduce__(self) -> Any:
        """pickle, and copy.copy: what `save` writes, and where it was."""
        names = ("capacity", "offload", "offload_finest", "backend")
        options = {name: getattr(self, name) for name in names}
        if self._layout is None:
            return partial(type(self), self.method, **options), ()
        like = self._layout.xp.zeros((0,), device=self._layout.device)
        return from_bytes, (to_bytes(self.save), partial(type(self).load, like=like, **options))

    def _new_store(self, layout: Layout) -> Any:
        memory = Memory(layout.xp, layout.device, layout.host, self.offload)
        if memory.mapped:
            forked.leave_to_parent(self)
        if isinstance(self.method, Treecode):
            return Forest(layout, self.method, self.capacity, memory, self.offload_finest)
        return Rows(layout, self.method, self.capacity, memory)

    def _checked(
        self, k: Array, v: Array, key_mask: Array | None, finite: bool | None
    ) -> tuple[Layout, list[tuple[np.ndarray, Columns, Array, Array]]]:
        """The layout, and sequences with the columns they keep and their keys and values, once all is known to fit."""
        check_numbers(k=k, v=v)
        layout = self._layout
        if layout is None:
            layout = of_first(k, v, self.backend, self.offload is not None)
        else:
            check_same(layout, k, v)
        groups = []
        held = np.zeros(layout.batch, np.int64) if self._store is None else self._store.lengths
        keys, values = arranged(layout, k), arranged(layout, v)
        for sequences, columns in columns_kept(layout, key_mask, k):
            new = [keys, values]
            if columns is not None:
                new = [of_columns(layout, entries(layout, x, layout.everyone, sequences), columns, 2) for x in new]
            check_finite(layout, finite, *new)
            longest = int(held[0] if layout.batch == 1 else held[sequences].max())
            if self.capacity is not None and longest + new[0].shape[2] > self.capacity:
                raise ValueError(
                    f"the cache is full: capacity={self.capacity:,}, it holds {longest:,} tokens and"
                    f" {new[0].shape[2]:,} more were given; crop it, or make one of a larger capacity"
                )
            groups.append((sequences, columns, *new))
        return layout, groups

    def _changing(self, layout: Layout) -> "_Changing":
        """Whatever is raised inside, the cache is as it was before."""
        before = None if self._store is None else self._store.lengths.copy()
        if self._store is None:
            self._layout, self._store = layout, self._new_store(layout)
        return _Changing(self, before)

    def _undo(self, before: np.ndarray | None) -> None:
        if before is None:
            self._layout = self._store = None
        else:
            self._crop(before)
            self._store.forget(before)

    def _crop(self, lengths: np.ndarray) -> None:
        for some in list(self._store.alike(np.arange(len(lengths)))):
            for same in alike(some, lengths):
                if lengths[same[0]] < self._store.lengths[same[0]]:
                    self._store.crop(same, int(lengths[same[0]]))

    def _steps(self, sequences: np.ndarray, tokens: int) -> list[slice]:
        """Tokens to come, some at a time, cut where many chunks fill at once."""
        start, step = int(self._store.lengths[sequences[0]]), self._store.step
        cuts = [0, *range(step - start % step, tokens, step), tokens] if tokens > 1 else [0, tokens]
        return [slice(low, high) for low, high in pairwise(cuts) if low < high]

    def _rows(self, x: Array, rows: slice) -> Array:
        """Tokens of x (b, heads, m, ...)."""
        return x if rows.stop - rows.start == x.shape[2] else x[:, :, rows, :]

    def _ready(self, q: Array, scale: float | None) -> tuple[Layout, float]:
        if self._layout is None or len(self) == 0:
            raise ValueError("the cache is empty: append keys and values before attending")
        check_numbers(q=q)
        check_queries(self._layout, q)
        return self._layout, check_scale(scale, self._layout.dim)

    def _batched(self, name: str) -> Layout:
        if self._layout is None or len(self._layout.lead) != 1:
            shape = "nothing yet" if self._layout is None else f"axes {self._layout.lead} before heads"
            raise ValueError(
                f"{name} needs one axis of sequences, as in k (batch, H_kv, n, d): the cache holds {shape}"
            )
        return self._layout

    def _solve(self, sequences: np.ndarray, q: Array, causal: bool, scale: float) -> Solution:
        layout = self._layout
        assert layout is not None
        if q.shape[3] == 0 or not self._store.lengths[sequences[0]]:
            lead = (len(sequences) * layout.heads, *q.shape[2:4])
            return Solution(*nothing_seen(layout.xp, lead, layout.width, layout.summed, device(q)))
        return self._store.attend(sequences, q, causal, scale)

    def _exact(self, sequences: np.ndarray, q: Array, causal: bool, scale: float) -> Solution:
        """Exact attention of queries (b, heads, repeat, n_q, d), chunk by chunk of the keys."""
        layout = self._layout
        assert layout is not None
        xp, n = layout.xp, int(self._store.lengths[sequences[0]])
        q = xp.reshape(q, (-1, *q.shape[2:]))
        state = nothing_seen(xp, q.shape[:3], layout.width, layout.summed, device(q))
        last = last_seen(n, q.shape[2], causal)
        for start, k, v in self._store.parts(sequences, 0, n):
            k, v = (xp.astype(xp.reshape(x, (q.shape[0], *x.shape[2:])), layout.summed, copy=False) for x in (k, v))
            part = attend_exactly(xp, layout.kernels, q, k, v, last - start, scale)
            state = layout.kernels.merge_part(*state, *part, 0)
        return Solution(*state)

    def _seen(self, sequences: np.ndarray, n_q: int, causal: bool) -> float:
        """Keys that a query of these sequences may see, summed over queries."""
        return float(visible_pairs(n_q, int(self._store.lengths[sequences[0]]), causal))

    def _result(self, q: Array, found: list[tuple[np.ndarray, Solution]], seen: float) -> Attention:
        """Outputs of groups of sequences, in the caller's layout; seen: keys visible, over all queries of sequences."""
        layout = self._layout
        assert layout is not None
        xp = layout.xp
        out, lse = (together(layout, name, found) for name in ("out", "lse"))
        out = xp.astype(xp.reshape(out, (*q.shape[:-1], layout.width)), q.dtype, copy=False)
        lse = xp.reshape(lse, q.shape[:-1])
        read, bounded = figures([(one, len(some) / layout.batch) for some, one in found])
        queries = max(1, layout.batch * q.shape[-2])
        passes = (f"{self.method!r} over a cache of {len(self):,} tokens",)
        report = Report(self.method, "the cache's", read, seen / queries, passes, met_bound=bounded)
        return Attention(out, lse, report)


class _Changing:
    """A change of a cache, taken back where it raises; cheaper to enter than a generator, once for every token."""

    def __init__(self, cache: KVCache, before: np.ndarray | None) -> None:
        self.cache, self.before = cache, before

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is not None:
            self.cache._undo(self.before)
