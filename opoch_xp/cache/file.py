"""Saved caches: .safetensors with keys and values in the order of tokens, and how every chunk was split.

Arrays are named `sequence.piece.what`: k and v (H_kv, m, ...) of a piece, and `order` (H_kv, m) where it is a chunk
that is in a tree; `sequence.asked` (H_kv, positions, d) and `sequence.balance` (H_kv, d), what its queries told: see
`opoch_xp.cache.balances`. Settings and a checksum are in the metadata. Summaries are not kept: they are made from the
rest. Nothing is trusted: kinds and sizes are checked before memory is taken, contents before they are used.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from array_api_compat import array_namespace, device

from opoch_xp import tensors
from opoch_xp.arguments import DTYPES, name_of, on_host, to_host
from opoch_xp.backends import kernels_for
from opoch_xp.cache import balances, forest, rows
from opoch_xp.cache.layout import Layout, stored_dtype
from opoch_xp.methods import LSH, Exact, Method, Treecode, check_whole
from opoch_xp.treecode.balance import SMALLEST

Array = Any
FORMAT = "opoch_xp.KVCache"
VERSION = 2
METHODS: dict[str, type] = {kind.__name__: kind for kind in (Exact, LSH, Treecode)}
SMALL = 1 << 34  # bytes of open blocks that a cache may need whatever it holds,
TIMES = 1 << 10  # or so many times what it holds
LEAST_BALANCE = 0.99 * SMALLEST**0.25  # to rounding
Span = tuple[int | None, int, int]


def spans_of(method: Method, length: int, done: int) -> list[Span]:
    """The pieces that a sequence is held in."""
    return forest.spans(method, length, done) if isinstance(method, Treecode) else [*rows.spans(length)]


def write(path: Path, method: Method, layout: Layout, store: Any) -> None:
    """Write a cache, whole or not at all, a piece at a time."""
    tensors.check_ending(path)
    none = np.zeros_like(store.lengths)
    done, asked = (store.done, store.balances.known) if isinstance(method, Treecode) else (none, none)
    settings = {
        "method": {"name": type(method).__name__, **asdict(method)},
        "dtype": name_of(layout.dtype),
        **{name: getattr(layout, name) for name in ("axes", "lead", "heads", "dim", "width")},
        "lengths": store.lengths.tolist(),
        "done": done.tolist(),
        "asked": asked.tolist(),
    }
    text = json.dumps(settings, default=lambda number: number.item())  # NumPy's, in a method
    metadata = {"format": FORMAT, "version": str(VERSION), "settings": text}
    checked = Settings(path, text)
    tensors.write(path, checked.entries(), metadata, _arrays(method, store, done, tensors.DTYPES[checked.kind]))


def _arrays(method: Method, store: Any, done: np.ndarray, kind: str) -> Iterator[np.ndarray]:
    for sequence, length in enumerate(store.lengths.tolist()):
        for tier, start, stop in spans_of(method, length, int(done[sequence])):
            [(_, k, v)] = store.parts(np.array([sequence]), start, stop)
            for x in (k, v):
                yield np.ascontiguousarray(to_host(x)[0].astype(kind, copy=False))
            if tier is not None:
                yield np.ascontiguousarray(to_host(store.order(sequence, tier, start)).astype("<i4", copy=False))
        for x in store.told(sequence).values():
            yield np.ascontiguousarray(to_host(x).astype(kind, copy=False))


class Settings:
    """What the metadata of a file says, checked; ValueError where it cannot be."""

    def __init__(self, path: Path, text: str) -> None:
        try:
            given = json.loads(text)
            method = dict(given["method"])
            self.method: Method = METHODS[method.pop("name")](**method)
            self.dtype, self.lead = given["dtype"], tuple(given["lead"])
            self.axes, self.heads, self.dim, self.width = (given[name] for name in ("axes", "heads", "dim", "width"))
            self.lengths, self.done, self.asked = given["lengths"], given["done"], given["asked"]
            for name in ("axes", "heads", "dim", "width"):
                check_whole(name, getattr(self, name), 1)
            for name in ("lead", "lengths", "done", "asked"):
                for number in getattr(self, name):
                    check_whole(name, number, 0, 2**48)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged: its settings cannot be used ({error})") from None
        self._check(path)

    def _check(self, path: Path) -> None:
        fits = self.dtype in DTYPES and self.axes == max(self.axes, 2 if self.heads == 1 else 3)
        fits = fits and len(self.lead) == max(0, self.axes - 3)
        fits = fits and prod(self.lead) == len(self.lengths) == len(self.done) == len(self.asked) > 0
        block = self.method.block if isinstance(self.method, Treecode) else 1
        for length, done, asked in zip(self.lengths, self.done, self.asked, strict=False):
            if isinstance(self.method, Treecode):
                fits = fits and done % block == 0 and max(0, length - 1) // block * block <= done <= length
                fits = fits and asked <= min(length, balances.positions(self.method))
            else:
                fits = fits and done == asked == 0
        if not fits:
            raise ValueError(f"{path}: damaged: its settings do not fit one another")

    @property
    def kind(self) -> str:
        """The format's name for the dtype of keys and values in a file: 16 bits are written as they are kept."""
        return "F64" if self.dtype == "float64" else "F32"

    @property
    def row(self) -> int:
        """Numbers of a key and its value."""
        return self.dim + self.width

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of every array, by name, in their order."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for sequence, (length, done, asked) in enumerate(zip(self.lengths, self.done, self.asked, strict=True)):
            for number, (tier, start, stop) in enumerate(spans_of(self.method, length, done)):
                name, size = f"{sequence}.{number}", stop - start
                found[f"{name}.k"] = (self.kind, (self.heads, size, self.dim))
                found[f"{name}.v"] = (self.kind, (self.heads, size, self.width))
                if tier is not None:
                    found[f"{name}.order"] = ("I32", (self.heads, size))
            if asked:
                found[f"{sequence}.asked"] = (self.kind, (self.heads, asked, self.dim))
            if done:
                found[f"{sequence}.balance"] = (self.kind, (self.heads, self.dim))
        return found


@dataclass(frozen=True)
class Saved:
    """An open file of a cache, its settings and where its arrays lie; all of it checked but what the arrays hold."""

    path: Path
    file: BinaryIO
    settings: Settings
    entries: dict[str, tensors.Entry]

    def layout(self, like: Array | None, backend: str | None, offload: bool) -> Layout:
        """The layout of the cache that is to be: on the library and device of `like`."""
        given, example = self.settings, np.zeros(0) if like is None else like
        xp = array_namespace(example)
        kernels = kernels_for(xp, backend)
        stored = xp.zeros(0, dtype=stored_dtype(xp, kernels, given.dtype, offload and not on_host(xp, example))).dtype
        dtype = getattr(xp, given.dtype, None)
        if dtype is None:
            raise ValueError(f"{self.path}: its dtype {given.dtype} is not one of {xp.__name__}'s: give like=")
        kind, where = type(example), device(example)
        sizes = given.axes, given.lead, given.heads, given.dim, given.width
        dtype = xp.zeros(0, dtype=dtype).dtype
        return Layout(xp, kernels, kind, where, dtype, stored, on_host(xp, example), *sizes)

    def restore(self, layout: Layout, store: Any) -> None:
        """Fill an empty store. ValueError where keys or values are not finite, or an order is none."""
        for sequence, (length, done) in enumerate(zip(self.settings.lengths, self.settings.done, strict=True)):
            pieces = self._pieces(layout, sequence, spans_of(self.settings.method, length, done))
            store.restore(sequence, done, pieces, self._told(layout, sequence))

    def _told(self, layout: Layout, sequence: int) -> dict[str, Array]:
        """What the store told of its queries; numbers that those can have."""
        found = {}
        for what, low, high in (("asked", 0.0, np.inf), ("balance", LEAST_BALANCE, 1.0)):
            name = f"{sequence}.{what}"
            if name in self.entries:
                array = self._read(name)
                if not ((array >= low) & (array <= high)).all():
                    raise ValueError(f"{self.path}: {name} must be from {low:g} to {high:g}")
                found[what] = layout.xp.asarray(array, device=layout.device)
        return found

    def _pieces(
        self, layout: Layout, sequence: int, spans: list[Span]
    ) -> Iterator[tuple[int | None, Array, Array, Any]]:
        xp = layout.xp
        for number, (tier, _, _) in enumerate(spans):
            name = f"{sequence}.{number}"
            arrays = [self._read(f"{name}.{what}") for what in ("k", "v")]
            order = None if tier is None else self._order(f"{name}.order")
            k, v = (xp.astype(xp.asarray(x[None], device=layout.device), layout.stored, copy=False) for x in arrays)
            yield tier, k, v, None if order is None else xp.asarray(order, device=layout.device)

    def _read(self, name: str) -> np.ndarray:
        array = tensors.read(self.file, self.entries[name])
        if not np.isfinite(array.sum(dtype=np.float64)) and not np.isfinite(array).all():
            raise ValueError(f"{self.path}: {name} must be finite")
        return array

    def _order(self, name: str) -> np.ndarray:
        order = tensors.read(self.file, self.entries[name]).astype(np.int64)
        size = order.shape[1]
        for row in order:
            if int(row.min()) < 0 or int(row.max()) >= size or (np.bincount(row, minlength=size) != 1).any():
                raise ValueError(f"{self.path}: {name} must name every row of its chunk once")
        return order


@contextmanager
def opened(path: Path) -> Iterator[Saved]:
    """A file of a cache, checked; ValueError where anything does not fit."""
    with tensors.opened(path) as file:
        header = tensors.read_header(path, file)
        tensors.check_format(path, header, "cache", FORMAT, VERSION)
        settings = Settings(path, header.metadata("settings") or "")
        if sum(settings.lengths) > header.size:
            raise ValueError(f"{path}: {sum(settings.lengths):,} tokens do not fit {header.size:,} bytes")
        entries = {}
        for name, (dtype, shape) in settings.entries().items():
            if name not in header.names:
                raise ValueError(f"{path}: no cache: {name} missing")
            entries[name] = header.entry(name, (dtype,))
            if entries[name].shape != shape:
                raise ValueError(f"{path}: {name} has shape {entries[name].shape}, expected {shape}")
        _check_room(path, settings, sum(entry.bytes for entry in entries.values()))
        tensors.check_sum(path, header, file)
        yield Saved(path, file, settings, entries)


def _check_room(path: Path, settings: Settings, held: int) -> None:
    """ValueError where the arrays of an empty cache would take more memory than the file accounts for."""
    room, method = rows.FIRST, settings.method
    if isinstance(method, Treecode):
        room = method.sinks + method.block + balances.positions(method)
    needed = 8 * len(settings.lengths) * settings.heads * room * settings.row
    if needed > max(SMALL, TIMES * held):
        raise ValueError(f"{path}: open blocks of {needed:,} bytes do not fit {held:,} bytes of cache")
