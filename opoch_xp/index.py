"""LSHIndex: nearest vectors by random-hyperplane tables, for arrays of any library."""

from dataclasses import asdict, replace
from functools import partial
from numbers import Real
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from array_api_compat import device

from opoch_xp import index_file
from opoch_xp.arguments import namespace_of, to_host
from opoch_xp.backends import kernels_for
from opoch_xp.buckets import Tables
from opoch_xp.hashing import random_hyperplanes
from opoch_xp.index_arguments import allowed_by, are, check_different, check_free, few, new_ids, numbers_of, vectors
from opoch_xp.index_settings import Settings
from opoch_xp.index_values import Candidates, Contents, InRange, Neighbours, Stats, stats_of
from opoch_xp.methods import check_whole
from opoch_xp.probing import probe_codes
from opoch_xp.suggest import Suggestion, tuned
from opoch_xp.tensors import from_bytes, to_bytes
from opoch_xp.threads import call

Array = Any


class LSHIndex:
    """Nearest vectors by random hyperplanes: sorted codes in several tables, exact scores of what shares a bucket.

    Two vectors at angle theta share a bucket of one table with probability `(1 - theta / pi) ** bits`; a candidate is a
    vector that shares one with the query in at least one of `tables`. With `probes` > 1 the query's next likeliest
    buckets of every table are read too. Hyperplanes go through the origin: subtract the mean of data that lie far
    from it, which distances need as well: they are ranked by q . x - |x|**2 / 2 in the dtype given, and those found are
    then computed by differences. `suggest` and `tune` choose the settings.

    dim: numbers a vector; bits 0 to 62; probes up to 2**bits; metric "cosine", "inner" (q . x) or "euclidean" (its
    score is -distance); max_candidates: most entries of buckets read a query, own buckets of all tables first, an entry
    counted in every table that holds it; backend as in `attention`. The first vectors added fix the array library,
    device and dtype (16 bits are widened to float32). Cosine keeps vectors at unit length; a zero vector stays zero:
    all its bits are set and its scores are 0.

    Any number of threads may read while one writes: a reader sees the index before or after a change, never between;
    writers wait for one another. Nothing is changed by a call that raises.

    Memory: the vectors, 8 bytes an id and, with NumPy, 6 to 12 bytes a vector and table (elsewhere 16). Cost of a
    change: hashing what is new, bits * tables dot products a vector, and one sort of every table: add in batches.
    Source: Charikar, Similarity estimation techniques from rounding algorithms, 2002.

    Raises ValueError for settings out of range.

    >>> import numpy as np, opoch_xp as ox
    >>> x = np.random.default_rng(0).standard_normal((1000, 32), dtype=np.float32)
    >>> index = ox.LSHIndex(32, bits=8, tables=16)
    >>> ids = index.add(x)
    >>> index.search(x[:3], k=1).ids
    array([[0],
           [1],
           [2]])
    >>> offsets, found = index.candidates(x[:3])  # of query i: found[offsets[i] : offsets[i + 1]]
    >>> index.remove(ids[:10])
    >>> len(index)
    990
    """

    def __init__(
        self,
        dim: int,
        bits: int = 16,
        tables: int = 8,
        probes: int = 1,
        metric: str = "cosine",
        seed: int = 0,
        *,
        max_candidates: int | None = None,
        backend: str | None = None,
    ) -> None:
        self.settings = Settings(dim, bits, tables, probes, metric, seed, max_candidates)
        self.backend = backend
        self._planes = random_hyperplanes(dim, bits, tables, seed)
        self._contents: Contents | None = None
        self._writing = Lock()  # taken inside of a call, which a fork waits for

    def __len__(self) -> int:
        contents = self._contents
        return 0 if contents is None else contents.x.shape[0]

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in asdict(self.settings).items() if value is not None)
        return f"LSHIndex({', '.join(given)}) of {len(self):,} vectors"

    @property
    def ids(self) -> Array:
        """The ids (n,) int64 in the order of addition, the order of `search`'s filter; None before the first add.

        The index's own array, as is that of `vectors`: copy it before you change it. NumPy's are read-only."""
        return None if self._contents is None else _read_only(self._contents.ids)

    @property
    def vectors(self) -> Array:
        """The vectors (n, dim) in the order of `ids`, of unit length with cosine; None before the first add."""
        return None if self._contents is None else _read_only(self._contents.x)

    def add(self, x: Array, ids: Array | None = None) -> Array:
        """Add vectors x (m, dim); returns their ids (m,) int64.

        ids: m different whole numbers of at least 0 that the index does not hold; by default those that follow the
        highest it ever held. Raises ValueError for another dim, entries that are not finite, ids that are taken, given
        twice or negative; TypeError for an array of another library or dtype than what is held.
        """
        with call(), self._writing:
            held = self._contents
            xp, x = vectors("x", x, self.settings, held)
            next_id = held.next_id if held else 0
            if ids is None:
                if next_id + x.shape[0] > MOST_IDS:
                    raise ValueError(f"ids must be given: there are none left above the highest, {next_id - 1}")
                numbers = np.arange(next_id, next_id + x.shape[0], dtype=np.int64)
            else:
                numbers = new_ids(ids, x.shape[0], held)
            codes = self._codes(xp, x)
            next_id = max(next_id, int(numbers.max(initial=-1)) + 1)
            where = device(x)
            kept = xp.asarray(x, copy=True) if held is None else x  # joining copies
            more = Contents(kept, xp.asarray(numbers, device=where), self._sorted(xp, codes), next_id)
            self._contents = self._joined(xp, held, more)
            return xp.asarray(numbers, device=where, copy=True)

    def remove(self, ids: Array) -> None:
        """Remove vectors by id. Raises ValueError for an id that is not held or given twice."""
        with call(), self._writing:
            numbers = numbers_of(ids)
            held = self._contents
            known = np.zeros(0, np.int64) if held is None else to_host(held.ids)
            unknown = np.setdiff1d(numbers, known)
            if len(unknown):
                raise ValueError(f"ids must be held by the index; {few(unknown)} {are(unknown)} not")
            check_different(numbers)
            if held is None or len(numbers) == 0:
                return
            xp = namespace_of(x=held.x)
            gone = np.isin(known, numbers)
            kept, where = np.flatnonzero(~gone), device(held.x)
            rows = xp.asarray(kept, device=where)
            number = xp.asarray(np.cumsum(~gone) - 1, device=where)  # of those that stay
            order = held.tables.order
            stays = xp.take(xp.asarray(~gone, device=where), xp.reshape(order, (-1,)))
            places = xp.nonzero(stays)[0]
            shape = (order.shape[0], len(kept))
            codes = xp.reshape(xp.take(xp.reshape(held.tables.codes, (-1,)), places), shape)
            order = xp.reshape(xp.take(number, xp.take(xp.reshape(order, (-1,)), places)), shape)
            self._contents = Contents(
                xp.take(held.x, rows, axis=0), xp.take(held.ids, rows), self._sorted(xp, codes, order), held.next_id
            )

    def merge(self, other: "LSHIndex") -> None:
        """Add all that another index holds. Raises ValueError when its dim, bits, tables, metric or seed differ, or for
        an id that both hold; TypeError when its vectors are of another library or dtype."""
        if not isinstance(other, LSHIndex):
            raise TypeError(f"other must be an LSHIndex, got {type(other).__name__}")
        for name in ("dim", "bits", "tables", "metric", "seed"):
            ours, theirs = getattr(self.settings, name), getattr(other.settings, name)
            if ours != theirs:
                raise ValueError(f"other must have {name}={ours!r}, got {name}={theirs!r}")
        more = other._contents
        if more is None:
            return
        with call(), self._writing:
            held = self._contents
            xp, _ = vectors("other", more.x, self.settings, held)
            if held is not None:
                check_free(to_host(more.ids), held)
            self._contents = self._joined(xp, held, more)

    def candidates(self, q: Array) -> Candidates:
        """The vectors that share a bucket with each query q (m, dim), each once, in the order of addition.

        Cost: hashing and a look-up in every table, and a sort of the entries of the buckets. Raises as `search`.
        """
        contents = self._contents
        xp, q = vectors("q", q, self.settings, contents)
        if contents is None:
            nothing = xp.zeros((q.shape[0] + 1,), dtype=xp.int64, device=device(q))
            return Candidates(nothing, nothing[:0])
        offsets, places = self._kernels(xp).find_candidates(
            contents.tables, self._probes(xp, q), self.settings.max_candidates
        )
        return Candidates(offsets, xp.take(contents.ids, places))

    def search(self, q: Array, k: int, *, filter: Array | None = None, exact: bool = False) -> Neighbours:
        """The k best candidates of each query q (m, dim) by their exact score, best first.

        filter (n,) bool in the order of `ids`: True may be found. exact: every vector is a candidate, which is what
        recall is measured against. Where fewer than k are found the id is -1 and the score -inf; an empty index finds
        none. Equal scores come in the order of addition; equal vectors may score a rounding apart. Cost: as
        `candidates`, and a dot product a candidate, by fetching its vector or, where many of all are candidates, in
        one product with all.

        Raises ValueError for another dim, a query that is not finite, k < 1 or a filter of another length; TypeError
        for another library or dtype than what is held.
        """
        check_whole("k", k, 1)
        contents = self._contents
        xp, q = vectors("q", q, self.settings, contents)
        allowed = allowed_by(xp, filter, contents)
        if contents is None:
            shape = (q.shape[0], k)
            return Neighbours(
                xp.full(shape, -1, dtype=xp.int64, device=device(q)),
                xp.full(shape, -xp.inf, dtype=q.dtype, device=device(q)),
            )
        x, bias = contents.x, self._bias(xp, contents.x)
        codes = None if exact else self._probes(xp, q)
        places, scores = self._kernels(xp).search_buckets(
            q, x, bias, contents.tables, codes, k, allowed, self.settings.max_candidates
        )
        if x.shape[0] == 0:
            return Neighbours(places, scores)
        there = places >= 0
        flat = xp.reshape(xp.where(there, places, 0), (-1,))
        found = xp.reshape(xp.take(contents.ids, flat), there.shape)
        if self.settings.metric == "euclidean":  # by differences: |q|**2 - 2 q . x + |x|**2 loses near ones
            scores = xp.where(there, -xp.reshape(self._distances(xp, q, x, flat, k), there.shape), -xp.inf)
            order = xp.argsort(xp.where(there, places, x.shape[0]), axis=1)  # so that ties come by place
            by_score = xp.argsort(-xp.take_along_axis(scores, order, axis=1), axis=1, stable=True)
            order = xp.take_along_axis(order, by_score, axis=1)
            scores, found, there = (xp.take_along_axis(a, order, axis=1) for a in (scores, found, there))
        return Neighbours(xp.where(there, found, -1), scores)

    def range_search(self, q: Array, least: float) -> InRange:
        """Every candidate of each query q (m, dim) whose exact score is at least `least`, in the order of addition.

        With "euclidean" scores are -distance, so least=-r finds what lies within r. Cost: as `candidates`, and a dot
        product of fetched vectors a candidate. Raises as `search`, and ValueError when `least` is not a number.
        """
        if isinstance(least, bool) or not isinstance(least, Real) or np.isnan(least):
            raise ValueError(f"least must be a score, got {least!r}")
        least = float(least)
        contents = self._contents
        xp, q = vectors("q", q, self.settings, contents)
        m = q.shape[0]
        if contents is None:
            nothing = xp.zeros((m + 1,), dtype=xp.int64, device=device(q))
            return InRange(nothing, nothing[:0], xp.zeros((0,), dtype=q.dtype, device=device(q)))
        offsets, places = self._kernels(xp).find_candidates(
            contents.tables, self._probes(xp, q), self.settings.max_candidates
        )
        owner = xp.repeat(xp.arange(m, dtype=xp.int64, device=device(q)), offsets[1:] - offsets[:-1])
        step = max(1, GATHERED // self.settings.dim)
        kept, scores = [places[:0]], [xp.zeros((0,), dtype=q.dtype, device=device(q))]
        for low in range(0, places.shape[0], step):
            rows = slice(low, min(low + step, places.shape[0]))
            a, b = xp.take(q, owner[rows], axis=0), xp.take(contents.x, places[rows], axis=0)
            score = -_length(xp, a - b) if self.settings.metric == "euclidean" else xp.vecdot(a, b)
            near = xp.nonzero(score >= least)[0]
            kept.append(near + low)
            scores.append(xp.take(score, near))
        near = xp.concat(kept)
        edges = xp.searchsorted(xp.take(owner, near), xp.arange(m + 1, dtype=xp.int64, device=device(q)))
        return InRange(xp.astype(edges, xp.int64), xp.take(contents.ids, xp.take(places, near)), xp.concat(scores))

    def stats(self) -> Stats:
        """Sizes of the buckets, how often vectors share one, and memory. Cost: a pass over the tables."""
        return stats_of(self.settings, self._contents)

    def tune(self, queries: Array, k: int, recall: float) -> Suggestion:
        """Settings that find the share `recall` of the k true neighbours of these queries (m, dim), by measurement.

        True neighbours come from an exact search. Which tables and buckets hold them is measured for every number of
        bits tried, with this index's seed, and what would be read besides, on a sample of the vectors; the cheapest
        that reaches `recall` is returned. `index.rebuilt(**found.settings)` applies it. The queries must be none of the
        vectors held: each of those is a neighbour of its own, which any settings find. With max_candidates the cheapest
        settings are built and searched until one reaches `recall`. Cost: an exact search of the queries, and hashing
        them, their neighbours and 65,536 vectors a few times.

        Raises ValueError for an empty index, k < 1 or more than it holds, no query, recall outside (0, 1], or where
        max_candidates lets no settings reach it.
        """
        contents = self._contents
        if contents is None or contents.x.shape[0] == 0:
            raise ValueError("tune needs vectors to measure on: the index is empty")
        check_whole("k", k, 1, contents.x.shape[0])
        xp, q = vectors("queries", queries, self.settings, contents)
        if q.shape[0] == 0:
            raise ValueError("queries must hold at least one query")
        truth = self._kernels(xp).search_buckets(
            q, contents.x, self._bias(xp, contents.x), contents.tables, None, k, None, None
        )[0]
        found = tuned(xp, self._kernels(xp), q, contents.x, truth, recall, self.settings.seed)
        if self.settings.max_candidates is None:
            return found[0]
        best = 0.0
        for suggestion in found[:TRIED]:
            reached = self.rebuilt(**suggestion.settings)._recall(xp, q, truth)
            if reached >= recall:
                return replace(suggestion, recall=reached)
            best = max(best, reached)
        raise ValueError(
            f"no settings tried find the share {recall:g} with max_candidates={self.settings.max_candidates}: the best "
            f"found {best:.3f}"
        )

    def _recall(self, xp: Any, q: Array, truth: Array) -> float:
        """Share of the neighbours `truth` (m, k), places, that a search finds."""
        contents = self._contents
        assert contents is not None
        found = self._kernels(xp).search_buckets(
            q, contents.x, self._bias(xp, contents.x), contents.tables, self._probes(xp, q), truth.shape[1], None,
            self.settings.max_candidates,
        )[0]  # fmt: skip
        hits = (np.isin(a, b).sum() for a, b in zip(to_host(truth), to_host(found), strict=True))
        return float(sum(hits)) / float(np.prod(truth.shape))

    def rebuilt(
        self, bits: int | None = None, tables: int | None = None, probes: int | None = None, seed: int | None = None
    ) -> "LSHIndex":
        """An index of the same vectors and ids with other settings; this one stays as it is."""
        given = {"bits": bits, "tables": tables, "probes": probes, "seed": seed}
        settings = Settings(
            **{**asdict(self.settings), **{n: value for n, value in given.items() if value is not None}}
        )
        index = LSHIndex(**asdict(settings), backend=self.backend)
        held = self._contents
        if held is not None:
            same = all(getattr(settings, name) == getattr(self.settings, name) for name in ("bits", "tables", "seed"))
            index._contents = held if same else index._of(held)
        return index

    def _of(self, held: Contents) -> Contents:
        """What another index holds, in tables of this one's settings."""
        xp = namespace_of(x=held.x)
        return replace(held, tables=self._sorted(xp, self._codes(xp, held.x)))

    def save(self, path: str | Path) -> None:
        """Write the index to a .safetensors file, whole or not at all: a temporary file is renamed at the end.

        Settings and a checksum stand in the metadata. Raises ValueError for another ending or an index that nothing was
        ever added to, OSError where the file cannot be written.
        """
        contents = self._contents
        if contents is None:
            raise ValueError("an index needs vectors to be saved: nothing was added to this one")
        tables = contents.tables
        arrays = {"x": contents.x, "ids": contents.ids, "codes": tables.codes, "order": tables.order}
        held = {name: to_host(array) for name, array in arrays.items()}
        index_file.write(Path(path), self.settings, contents.next_id, held)

    def __reduce__(self) -> Any:
        """pickle and copy: what `save` writes, on the device where it was."""
        held = self._contents
        if held is None:
            return partial(type(self), **asdict(self.settings), backend=self.backend), ()
        like = namespace_of(x=held.x).zeros((0,), device=device(held.x))
        return from_bytes, (to_bytes(self.save), partial(type(self).load, like=like, backend=self.backend))

    @classmethod
    def load(
        cls, path: str | Path, *, mmap: bool = False, like: Array | None = None, backend: str | None = None
    ) -> "LSHIndex":
        """Read an index that `save` wrote.

        mmap: vectors and ids stay in the file and are read where they are used (NumPy); otherwise they are read into
        memory, or moved to the library and device of the array `like`. The tables are always in memory. Everything is
        read once and checked: the checksum, that codes ascend, that each table holds every vector once, that ids
        differ.

        Raises FileNotFoundError, or ValueError for a file of another kind or a later version, damaged, truncated, or
        with sizes or contents that do not fit one another, or mmap together with `like`. Nothing is allocated for sizes
        that are not there.
        """
        if mmap and like is not None:
            raise ValueError("mmap=True keeps vectors in the file, like= moves them: choose one")
        settings, next_id, held = index_file.read(Path(path), mmap)
        index = cls(**asdict(settings), backend=backend)
        x = held["x"] if like is None else held["x"][:0]
        xp, where = namespace_of(x=x if like is None else like), None if like is None else device(like)
        moved = {name: array if like is None else _moved(xp, array, where) for name, array in held.items()}
        tables = index._sorted(xp, moved["codes"], moved["order"], resort=False)
        index._contents = Contents(moved["x"], moved["ids"], tables, next_id)
        return index

    def _kernels(self, xp: Any) -> Any:
        return kernels_for(xp, self.backend)

    def _codes(self, xp: Any, x: Array) -> Array:
        return self._kernels(xp).hash_codes(x, self._planes)

    def _probes(self, xp: Any, q: Array) -> Array:
        return probe_codes(q, self._planes, self._codes(xp, q), self.settings.probes)

    def _sorted(self, xp: Any, codes: Array, order: Array | None = None, resort: bool = True) -> Tables:
        """Tables of codes (tables, n); `order` says which vector each is, by default the n in turn."""
        tables = self._kernels(xp).sort_tables(codes, self.settings.bits)
        if order is None:
            return tables
        if resort:
            order = xp.take_along_axis(order, xp.astype(tables.order, xp.int64), axis=-1)
        return replace(tables, order=xp.astype(order, tables.order.dtype))

    def _joined(self, xp: Any, held: Contents | None, more: Contents) -> Contents:
        """Both, `more` after `held`. A stable sort of the sorted codes, one after the other, keeps ties in order."""
        if held is None:
            return more
        codes = xp.concat([held.tables.codes, more.tables.codes], axis=1)
        order = xp.concat(
            [xp.astype(held.tables.order, xp.int64), xp.astype(more.tables.order, xp.int64) + held.x.shape[0]], axis=1
        )
        return Contents(
            xp.concat([held.x, more.x]),
            xp.concat([held.ids, more.ids]),
            self._sorted(xp, codes, order),
            max(held.next_id, more.next_id),
        )

    def _distances(self, xp: Any, q: Array, x: Array, places: Array, each: int) -> Array:
        """|q - x[places]| for `each` places a query, (m * each,), some rows at a time."""
        step = max(1, GATHERED // self.settings.dim)
        parts = [xp.zeros((0,), dtype=q.dtype, device=device(q))]
        for low in range(0, places.shape[0], step):
            some = places[low : min(low + step, places.shape[0])]
            owner = xp.arange(low, low + some.shape[0], dtype=xp.int64, device=device(q)) // each
            parts.append(_length(xp, xp.take(x, some, axis=0) - xp.take(q, owner, axis=0)))
        return xp.concat(parts)

    def _bias(self, xp: Any, x: Array) -> Array | None:
        """What is added to q . x so that the nearest scores highest."""
        return -0.5 * xp.vecdot(x, x) if self.settings.metric == "euclidean" else None


GATHERED = 1 << 22  # numbers of vectors fetched at once
TRIED = 8  # settings that tune measures by searching, where max_candidates cuts searches short
MOST_IDS = 2**63 - 1


def _read_only(array: Array) -> Array:
    if not isinstance(array, np.ndarray):
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def _length(xp: Any, x: Array) -> Array:
    return xp.sqrt(xp.vecdot(x, x))


def _moved(xp: Any, array: np.ndarray, where: Any) -> Array:
    wide = array if array.dtype.kind == "f" else array.astype(np.int64)  # unsigned integers are not every library's
    return xp.asarray(np.ascontiguousarray(wide), device=where)
