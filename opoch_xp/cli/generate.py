"""`opoch-xp decode --model bytes`: the byte model reads a text and goes on with it, exact and treecode side by side."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from opoch_xp.arguments import to_host
from opoch_xp.cache import KVCache
from opoch_xp.cli import tables
from opoch_xp.cli.decode import PRODUCT, facts, named, where, writable
from opoch_xp.cli.product import Product
from opoch_xp.cli.rows import library_of
from opoch_xp.cli.tables import Sink, Table
from opoch_xp.cli.wall import WINDOW
from opoch_xp.data import byte_model
from opoch_xp.methods import Exact, Method, Treecode, method_name
from opoch_xp.text import printable as escaped
from opoch_xp.workloads import HEADS_LIMIT

Array = Any
Begin = Callable[[str], None]

TREECODE = Treecode(block=512, group=1, rtol=0.3)  # reads fewer rows than the window at 8,192
EXACT = (method_name(Exact()), PRODUCT)
SHOWN = 200  # bytes of the text that are shown before what was written


@dataclass(frozen=True)
class Text:
    """The options of the command, of those that are the model's."""

    file: Path | None
    context: int | None
    new: int
    temperature: float
    backend: str
    seed: int

    def __post_init__(self) -> None:
        if not np.isfinite(self.temperature):
            raise ValueError(f"--temperature must be a finite number, got {self.temperature}")
        if self.context is not None and not 2 <= self.context <= HEADS_LIMIT:
            raise ValueError(
                f"--context must be from 2 to {HEADS_LIMIT:,} with --model, whose exact reading of the text costs its "
                f"square; got {self.context:,}"
            )


@dataclass(frozen=True)
class Row:
    """One line of the table. bits: per byte; rows: read by a query, mean over the positions of the bits; seconds: a new
    byte, median, and attention_seconds of it; error: of its attention on the new bytes, mean over layers and heads of
    the Frobenius error; p99: of single queries; written: the new bytes, as text."""

    method: str
    bits: float
    rows: float
    seconds: float
    attention_seconds: float
    speedup: float
    error: float
    p99: float
    written: str


@dataclass
class Decoder:
    """The byte model with a cache in every layer: what it reads comes after what it has read."""

    weights: byte_model.Weights
    caches: list[KVCache | Product]
    xp: Any  # the library of the caches' arrays
    attention_seconds: float = 0.0  # of the last reading
    rows: float = 0.0  # read by a query in the last reading, mean
    read_heads: list[list[tuple[np.ndarray, ...]]] = field(default_factory=list)  # q, k, v by layer of each reading
    outs: list[np.ndarray] = field(default_factory=list)  # of the last reading, layer by layer

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Logits of the byte after each of these (n, 256)."""
        caches, rows, self.attention_seconds, self.outs = iter(self.caches), [], 0.0, []

        def attention(*heads: np.ndarray) -> np.ndarray:
            start = perf_counter()
            found = next(caches).prefill(*map(self.xp.asarray, heads))
            self.outs.append(to_host(found.out))
            self.attention_seconds += perf_counter() - start
            rows.append(sum(found.report.rows.values()))
            return self.outs[-1]

        logits, heads = byte_model.forward(self.weights, tokens, attention, start=len(self.caches[0]))
        self.read_heads.append([*heads])
        self.rows = float(np.mean(rows))
        return logits


@dataclass
class Writer:
    """A decoder that has read a text, and what it writes: each byte is read before the next is chosen."""

    name: str
    decoder: Decoder
    bits: float  # per byte of the text
    rows: float  # read by a query of those
    logits: np.ndarray  # of the next byte (256,)
    written: bytearray = field(default_factory=bytearray)
    seconds: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    outs: list[list[np.ndarray]] = field(default_factory=list)

    def step(self, temperature: float, chance: float) -> None:
        start = perf_counter()
        byte = choice(self.logits, temperature, chance)
        self.logits = self.decoder.read(np.array([byte], np.uint8))[-1]
        self.seconds.append(perf_counter() - start)
        self.attention.append(self.decoder.attention_seconds)
        self.outs.append(self.decoder.outs)
        self.written.append(byte)

    def row(self, exact_seconds: float) -> Row:
        seconds, attention = float(np.median(self.seconds)), float(np.median(self.attention))
        error, p99 = self.errors()
        speedup, written = exact_seconds / seconds, printable(bytes(self.written))
        return Row(self.name, self.bits, self.rows, seconds, attention, speedup, error, p99, written)

    def errors(self) -> tuple[float, float]:
        """Of the attention of the new bytes, against exact attention in float64: mean over layers and heads, p99."""
        mean, single = [], []
        for layer, outs in enumerate(zip(*self.outs, strict=True)):
            q, k, v = (
                np.concatenate(x, axis=1, dtype=np.float64)
                for x in zip(*(reading[layer] for reading in self.decoder.read_heads), strict=True)
            )
            truth = Product(k.shape[1])
            truth.append(k, v)
            exact = truth.attend(q[:, -len(outs) :, :]).out  # (heads, new, head_dim)
            wrong, right = (np.linalg.norm(x, axis=2) for x in (np.concatenate(outs, axis=1) - exact, exact))
            mean.append(np.linalg.norm(wrong, axis=1) / np.linalg.norm(right, axis=1))
            single.append(wrong / right)
        return float(np.mean(mean)), float(np.percentile(single, 99))


def choice(logits: np.ndarray, temperature: float, chance: float) -> int:
    """The likeliest byte at temperature 0, else the one that `chance`, uniform in [0, 1), falls on."""
    if temperature == 0:
        return int(np.argmax(logits))
    z = logits.astype(np.float64) / temperature
    sums = np.cumsum(np.exp(z - z.max()))
    return min(int(np.searchsorted(sums, chance * sums[-1], side="right")), len(sums) - 1)


def measure_text(setup: Text, sink: Sink) -> None:
    """Measure and show the table and what was written; write the figures where the sink wants them."""
    about = facts(setup.backend, setup.seed)  # an unknown backend is refused before the text is read
    tokens, source = text(setup)
    with tables.progress(len(ways(setup, 1)) + setup.new + 1) as begin:
        writers = run(setup, tokens, begin)
        begin("the errors")
        exact = [writer for writer in writers if writer.name in EXACT]
        fastest = min(float(np.median(writer.seconds)) for writer in exact)
        rows = [writer.row(fastest) for writer in writers]
    about |= {
        "context": len(tokens),
        "new": setup.new,
        "temperature": setup.temperature,
        "source": source,
        "text": byte_model.text_hash(tokens),
        "agree": agreement(bytes(writers[0].written), bytes(writers[-1].written)),
    }
    sink.write_json({**about, "rows": [asdict(row) for row in rows]})
    sink.show(table(rows, about))
    sink.show_text("The end of the text", printable(tokens[-SHOWN:].tobytes()))
    for row in rows:
        if row.method != PRODUCT:  # which is Exact(), to rounding
            sink.show_text(f"How it goes on, {row.method}", row.written)


def text(setup: Text) -> tuple[np.ndarray, str]:
    """The bytes that are read, and where they are from."""
    wanted = setup.context or byte_model.CONTEXT
    if setup.file is None:
        held_out = f"from byte {byte_model.OFFSET:,} of this Python's held-out sources"
        return byte_model.text(wanted, byte_model.OFFSET), f"{wanted:,} bytes {held_out}"
    if not setup.file.exists():
        raise FileNotFoundError(f"--file: no such file {setup.file}")
    with setup.file.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - wanted))
        tokens = np.frombuffer(file.read(wanted), np.uint8)
    if len(tokens) < 2:
        raise ValueError(f"--file must hold at least 2 bytes, got {len(tokens)} in {setup.file}")
    return tokens, f"the last {len(tokens):,} of {size:,} bytes of {setup.file}"


def ways(setup: Text, capacity: int) -> list[tuple[str, Any, Callable[[], KVCache | Product]]]:
    """Exact twice, the window and the treecode: the name, the library of the arrays, and what makes a cache."""
    xp = library_of(setup.backend)
    host = xp if writable(xp) else np

    def cache(method: Method) -> tuple[str, Any, Callable[[], KVCache]]:
        return method_name(method), xp, partial(KVCache, method, capacity, backend=named(setup.backend))

    return [
        cache(Exact()),
        (PRODUCT, host, partial(Product, capacity)),
        (f"window of {WINDOW:,} only", host, partial(Product, capacity, WINDOW)),
        cache(replace(TREECODE, seed=setup.seed)),
    ]


def run(setup: Text, tokens: np.ndarray, begin: Begin) -> list[Writer]:
    """Every way reads the text, then all write, a byte each in turn."""
    weights, first, writers = byte_model.load(), max(1, len(tokens) // 2), []
    for name, xp, cache in ways(setup, len(tokens) + setup.new):
        begin(f"reading {len(tokens):,} bytes, {name}")
        decoder = Decoder(weights, [cache() for _ in range(byte_model.LAYERS)], xp)
        logits = np.concatenate([decoder.read(tokens[:first]), decoder.read(tokens[first:])])
        bits = byte_model.bits_per_byte(logits, tokens, first)
        writers.append(Writer(name, decoder, bits, decoder.rows, logits[-1]))
    for number, chance in enumerate(np.random.default_rng(setup.seed).random(setup.new)):
        begin(f"byte {number + 1:,} of {setup.new:,}")
        for writer in writers:
            writer.step(setup.temperature, float(chance))
    return writers


def agreement(a: bytes, b: bytes) -> int:
    """On how many bytes from the start the two agree."""
    different = (number for number, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return next(different, len(a))


def printable(data: bytes) -> str:
    """Bytes as text; those that are no UTF-8, and what a terminal might obey, as escapes."""
    return escaped(data.decode("utf-8", "backslashreplace"), kept="\n\t")


COLUMNS = ["method", "bits/byte", "rows read", "time", "of it attention", "speed-up", "error", "p99"]


def table(rows: list[Row], about: dict[str, Any]) -> Table:
    cells = [
        [
            row.method,
            f"{row.bits:.4f}",
            f"{row.rows:,.0f}",
            tables.micro(row.seconds),
            tables.micro(row.attention_seconds),
            tables.factor(row.speedup),
            tables.percent(row.error),
            tables.percent(row.p99),
        ]
        for row in rows
    ]
    chosen = "the likeliest byte" if about["temperature"] == 0 else f"temperature {about['temperature']:g}"
    lines = [
        f"{about['source']}, {about['text']} (SHA-256); {about['new']:,} new bytes, {chosen}, seed {about['seed']}",
        f"{byte_model.LAYERS} layers of {byte_model.HEADS} heads of {byte_model.HEAD_DIM}, {about['dtype']}",
        where(about),
    ]
    return Table("Decoding: the byte model", lines, COLUMNS, cells, _notes(rows, about))


def _notes(rows: list[Row], about: dict[str, Any]) -> list[str]:
    context, new = about["context"], about["new"]
    fastest = max((row for row in rows if row.method in EXACT), key=lambda row: row.speedup).method
    notes = [
        f"bits/byte: the model's, on positions {max(1, context // 2):,} to {context - 1:,}, its attention replaced in "
        "every layer from the first byte on; with group=1 the treecode reads a text as it would byte by byte.",
        "rows read: by a query, mean over the positions of bits/byte; a summary of many keys is a row.",
        "time: of a new byte, the whole model, median; the rows of the table take turns. speed-up: of it, over "
        f"{fastest}, the faster exact row.",
        "error: of the attention of all new bytes, Frobenius norm of the difference from exact attention in float64, "
        "over that, mean over layers and heads; p99: of single queries.",
        f"Exact() and the treecode agree on {'all' if about['agree'] == new else 'the first'} {about['agree']:,} bytes "
        "that they wrote" + (", drawn with the same random numbers." if about["temperature"] else "."),
    ]
    if context + new > byte_model.CONTEXT:
        notes.append(f"The model was trained on {byte_model.CONTEXT:,} positions: later ones are new to it.")
    return notes
