"""LSHIndex: nearest vectors by random-hyperplane tables, for arrays of any library."""

from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import device

from opoch_xp import index_file
from opoch_xp.arguments import DTYPES, dtype_name, namespace_of, to_host
from opoch_xp.backends import kernels_for, library
from opoch_xp.buckets import Tables
from opoch_xp.hashing import random_hyperplanes
from opoch_xp.index_settings import Settings
from opoch_xp.methods import check_whole
from opoch_xp.probing import probe_codes
from opoch_xp.suggest import Suggestion, tuned

Array = Any


class Candidates(NamedTuple):
    """offsets (m + 1,) and ids (total,) int64: those of query i are ids[offsets[i] : offsets[i + 1]]."""

    offsets: Array
    ids: Array


class Neighbours(NamedTuple):
    """ids (m, k) int64 and scores (m, k), best first; -1 and -inf where fewer than k were found."""

    ids: Array
    scores: Array


class InRange(NamedTuple):
    """offsets (m + 1,), ids (total,) int64 and scores (total,): those of query i are at offsets[i] : offsets[i + 1]."""

    offsets: Array
    ids: Array
    scores: Array


@dataclass(frozen=True)
class Contents:
    """The vectors of an index at one moment: never changed, only replaced, so that a reader sees all of it or none.

    x (n, dim), of unit length where the metric is cosine; ids (n,) int64; next_id is above every id there ever was.
    """

    x: Array
    ids: Array
    tables: Tables
    next_id: int


@dataclass(frozen=True)
class Stats:
    """What an index holds.

    size: vectors; occupied: buckets that hold any, over all tables; largest: vectors in the largest; histogram[i]:
    buckets of 2**i to 2**(i + 1) - 1 vectors. expected: chance that two random directions share a bucket of one table,
    2**-bits; observed: share of the pairs of vectors held that do, mean over tables. bytes: vectors, ids and tables.
    """

    size: int
    occupied: int
    largest: int
    histogram: tuple[int, ...]
    expected: float
    observed: float
    bytes: int


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
        self._writing = Lock()

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
        with self._writing:
            held = self._contents
            xp, x = self._vectors("x", x, held)
            next_id = held.next_id if held else 0
            if ids is None:
                if next_id + x.shape[0] > MOST_IDS:
                    raise ValueError(f"ids must be given: there are none left above the highest, {next_id - 1}")
                numbers = np.arange(next_id, next_id + x.shape[0], dtype=np.int64)
            else:
                numbers = self._new_ids(ids, x.shape[0], held)
            codes = self._codes(xp, x)
            next_id = max(next_id, int(numbers.max(initial=-1)) + 1)
            where = device(x)
            kept = xp.asarray(x, copy=True) if held is None else x  # joining copies
            more = Contents(kept, xp.asarray(numbers, device=where), self._sorted(xp, codes), next_id)
            self._contents = self._joined(xp, held, more)
            return xp.asarray(numbers, device=where, copy=True)

    def remove(self, ids: Array) -> None:
        """Remove vectors by id. Raises ValueError for an id that is not held or given twice."""
        with self._writing:
            numbers = _ids(ids)
            held = self._contents
            known = np.zeros(0, np.int64) if held is None else to_host(held.ids)
            unknown = np.setdiff1d(numbers, known)
            if len(unknown):
                raise ValueError(f"ids must be held by the index; {_few(unknown)} {_are(unknown)} not")
            _check_different(numbers)
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
        with self._writing:
            held = self._contents
            xp, _ = self._vectors("other", more.x, held)
            if held is not None:
                self._check_free(to_host(more.ids), held)
            self._contents = self._joined(xp, held, more)

    def candidates(self, q: Array) -> Candidates:
        """The vectors that share a bucket with each query q (m, dim), each once, in the order of addition.

        Cost: hashing and a look-up in every table, and a sort of the entries of the buckets. Raises as `search`.
        """
        contents = self._contents
        xp, q = self._vectors("q", q, contents)
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
        xp, q = self._vectors("q", q, contents)
        allowed = self._allowed(xp, filter, contents)
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
        xp, q = self._vectors("q", q, contents)
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
        settings, contents = self.settings, self._contents
        expected = 2.0**-settings.bits
        n = 0 if contents is None else contents.x.shape[0]
        if contents is None or n == 0:
            return Stats(0, 0, 0, (), expected, 0.0, 0)
        sizes = np.concatenate([_run_lengths(to_host(contents.tables.codes[t, :])) for t in range(settings.tables)])
        pairs = float(np.sum(sizes.astype(np.float64) * (sizes - 1))) / settings.tables
        arrays = (contents.x, contents.ids, contents.tables.codes, contents.tables.order, contents.tables.offsets)
        return Stats(
            size=n,
            occupied=len(sizes),
            largest=int(sizes.max()),
            histogram=tuple(np.bincount(np.log2(sizes).astype(np.int64)).tolist()),
            expected=expected,
            observed=pairs / (n * (n - 1)) if n > 1 else 0.0,
            bytes=sum(_bytes(array) for array in arrays if array is not None),
        )

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
        xp, q = self._vectors("queries", queries, contents)
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

    def _vectors(self, name: str, x: Array, held: Contents | None) -> tuple[Any, Array]:
        """The namespace of x, and x as it is hashed and compared; errors in the caller's words."""
        xp = namespace_of(**{name: x})
        if dtype_name(x) not in DTYPES:
            raise TypeError(f"{name} must have dtype {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype_name(x)}")
        if x.ndim != 2 or x.shape[1] != self.settings.dim:
            raise ValueError(f"{name} must be (m, dim) with dim = {self.settings.dim}, got shape {tuple(x.shape)}")
        if hasattr(x, "detach"):  # PyTorch's: an index has no gradient
            x = x.detach()
        if xp.finfo(x.dtype).bits < 32:
            x = xp.astype(x, xp.float32)
        if held is not None:
            ours = namespace_of(x=held.x)
            if ours is not xp:
                raise TypeError(f"{name} must be of {library(ours)}, as what the index holds, got {library(xp)}")
            if x.dtype != held.x.dtype:
                raise TypeError(
                    f"{name} must have dtype {dtype_name(held.x)}, as what the index holds, got {dtype_name(x)}"
                )
            if str(device(x)) != str(device(held.x)):
                raise ValueError(f"{name} must be on {device(held.x)}, as what the index holds, got {device(x)}")
        with np.errstate(over="ignore", invalid="ignore"):
            squares = xp.vecdot(x, x)  # a row that is not finite has none that is
        if not bool(xp.all(xp.isfinite(squares))) and not bool(xp.all(xp.isfinite(x))):
            row = int(xp.argmin(xp.astype(xp.all(xp.isfinite(x), axis=1), xp.int8)))
            raise ValueError(f"{name} must be finite; row {row} is not")
        if self.settings.metric == "cosine":
            return xp, _unit(xp, x, squares)
        most = float(xp.finfo(x.dtype).max) / 4
        if not bool(xp.all(squares <= most)):
            row = int(xp.argmax(squares))
            raise ValueError(
                f"{name} must have squared lengths below {most:.2g}, or scores overflow {dtype_name(x)}; row {row} has "
                "not: scale the vectors, or use the metric 'cosine'"
            )
        return xp, x

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

    def _allowed(self, xp: Any, filter: Array | None, held: Contents | None) -> Array | None:
        if filter is None:
            return None
        n = 0 if held is None else held.x.shape[0]
        ours = namespace_of(filter=filter)
        if ours is not xp or dtype_name(filter) != "bool":
            given = f"{dtype_name(filter)} of {library(ours)}"
            raise TypeError(f"filter must be a bool array of {library(xp)}, as q is, got {given}")
        if tuple(filter.shape) != (n,):
            raise ValueError(f"filter must have shape ({n},), one entry a vector held, got {tuple(filter.shape)}")
        return filter

    def _new_ids(self, ids: Array, count: int, held: Contents | None) -> np.ndarray:
        numbers = _ids(ids)
        if len(numbers) != count:
            raise ValueError(f"ids must be one for each of the {count} vectors, got {len(numbers)}")
        if numbers.min(initial=0) < 0:
            raise ValueError(f"ids must be at least 0, got {int(numbers.min())}")
        _check_different(numbers)
        if held is not None:
            self._check_free(numbers, held)
        return numbers

    def _check_free(self, numbers: np.ndarray, held: Contents) -> None:
        taken = np.intersect1d(numbers, to_host(held.ids))
        if len(taken):
            raise ValueError(f"ids must be new to the index; {_few(taken)} {_are(taken)} held already")


GATHERED = 1 << 22  # numbers of vectors fetched at once
TRIED = 8  # settings that tune measures by searching, where max_candidates cuts searches short
MOST_IDS = 2**63 - 1


def _unit(xp: Any, x: Array, squares: Array) -> Array:
    """Rows at unit length, given their squared lengths; zero rows stay zero."""
    limits = xp.finfo(x.dtype)
    if bool(xp.all((squares > limits.smallest_normal / limits.eps) & (squares < limits.max))):
        return x / xp.sqrt(squares)[:, None]
    top = xp.max(xp.abs(x), axis=1, keepdims=True)  # first, so that squares neither vanish nor overflow
    x = x / xp.where(top > 0, top, 1.0)
    length = xp.sqrt(xp.vecdot(x, x))[:, None]
    return x / xp.where(length > 0, length, 1.0)


def _read_only(array: Array) -> Array:
    if not isinstance(array, np.ndarray):
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def _length(xp: Any, x: Array) -> Array:
    return xp.sqrt(xp.vecdot(x, x))


def _ids(ids: Array) -> np.ndarray:
    """Ids on the host, (m,) int64."""
    numbers = to_host(ids) if hasattr(ids, "shape") else np.asarray(ids)
    if numbers.size == 0 and numbers.ndim == 1:
        return np.zeros(0, np.int64)
    large = numbers.dtype.kind == "O" and numbers.ndim == 1 and all(isinstance(number, int) for number in numbers)
    if numbers.ndim != 1 or not (large or numbers.dtype.kind in "iu"):
        given = f"{numbers.dtype} of shape {numbers.shape}" if numbers.ndim else repr(ids)
        raise ValueError(f"ids must be a list of whole numbers, got {given}")
    if large or (numbers.dtype.kind == "u" and numbers.max() > np.iinfo(np.int64).max):
        raise ValueError(f"ids must be below 2**63, got {max(numbers.tolist(), key=abs)}")
    return numbers.astype(np.int64)


def _check_different(numbers: np.ndarray) -> None:
    values, counts = np.unique(numbers, return_counts=True)
    if len(values) < len(numbers):
        raise ValueError(f"ids must differ; {_few(values[counts > 1])} given more than once")


def _few(numbers: np.ndarray) -> str:
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return ", ".join(map(str, numbers[:3].tolist())) + more


def _are(numbers: np.ndarray) -> str:
    return "is" if len(numbers) == 1 else "are"


def _run_lengths(codes: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal codes."""
    begin = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    return np.diff(np.append(begin, len(codes)))


def _bytes(array: Array) -> int:
    return int(np.prod(array.shape)) * np.dtype(dtype_name(array)).itemsize


def _moved(xp: Any, array: np.ndarray, where: Any) -> Array:
    wide = array if array.dtype.kind == "f" else array.astype(np.int64)  # unsigned integers are not every library's
    return xp.asarray(np.ascontiguousarray(wide), device=where)
