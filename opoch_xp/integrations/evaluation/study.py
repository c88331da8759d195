"""An evaluation, step by step: what is done stays, whatever ends it."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from opoch_xp.integrations.evaluation import tasks as asked
from opoch_xp.integrations.evaluation.answer import Question, fastest
from opoch_xp.integrations.evaluation.choice import BY_HEAD, by_key_head, next_rtol
from opoch_xp.integrations.evaluation.compared import Compared, Window, name_of, outputs, usual
from opoch_xp.integrations.evaluation.decoding import STEPS, decoded
from opoch_xp.integrations.evaluation.heads import Measured, Watch, out_of_memory, reason_of, wait
from opoch_xp.integrations.evaluation.results import Answered, Decoded, Evaluation, Head, Row, is_tree
from opoch_xp.integrations.evaluation.scores import Begin, Reference, reference, score
from opoch_xp.integrations.evaluation.subject import Attend, Call, Subject, most_tokens
from opoch_xp.integrations.registration import register
from opoch_xp.integrations.settings import Settings
from opoch_xp.methods import Treecode
from opoch_xp.solve import check_method
from opoch_xp.treecode.forest import tiers

LEAST = 64  # tokens: fewer tell nothing
TRIES = 3  # values of rtol that are tried for a tolerance, beside those that were named
EXACT = name_of(None)
REGISTERED = "opoch_evaluated_decoding"


def evaluate(
    model: Any,
    ids: Any,
    methods: Sequence[Compared] | None = None,
    *,
    tol: float = 0.01,
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    text: str = "",
    task_tokens: int = 4096,
    decode: bool = True,
    seed: int = 0,
    begin: Begin | None = None,
) -> Evaluation:
    """What methods of attention do to a pretrained model of transformers on a text, beside its exact attention.

    model: a causal language model or an encoder, on any device; it is left as it was. ids: its tokens, a tensor (n,) or
    (1, n), of an encoder (B, n) as well, without padding; the second half is scored. methods: Exact, LSH and Treecode
    values, a Window, or Settings; None: windows without and with the first keys, LSH, and treecodes of three values of
    rtol. tol: the largest KL divergence a token from the exact model, in nats, of an encoder 1 - cosine of the mean of
    its last states: the treecode of largest rtol that stays within it is looked for, and measured. layers: the numbers
    of the layers to replace, as the model numbers them; None: all that can be. tokenizer, text: where given, tasks of
    at most task_tokens tokens are asked of a language model too, with the text between the needles. decode: whether
    steps of a token are measured, of a language model. seed: of the tasks. begin: called as each step begins, with its
    name and its weight in tokens.

    Every figure is measured here. Cost: a pass of the model for each method, two more in which the methods attend
    beside the exact attention, and the tasks. Raises ValueError or TypeError for arguments that do not fit, and where
    no layer's attention can be replaced, MemoryError where memory runs out for the exact model. A method that fails is
    given up, and its row says why.

    >>> import torch
    >>> import opoch_xp as ox
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from opoch_xp.integrations.transformers import evaluate
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    >>> found = evaluate(model, torch.arange(128) % 64, [ox.Exact(), ox.Treecode(block=32, leaf=4)], decode=False)
    >>> [row.name for row in found.rows][:3], found.rows[1].scored.kl < 1e-6
    (['exact, SDPA', 'Exact()', 'Treecode(block=32, leaf=4)'], True)
    """
    study = Study(
        model, ids, methods, tol=tol, layers=layers, tokenizer=tokenizer, text=text, task_tokens=task_tokens,
        decode=decode, seed=seed, begin=begin,
    )  # fmt: skip
    study.run()
    return study.result()


class Study:
    """An evaluation that can be ended: `run` does it, `result` tells what is done so far; arguments as in evaluate."""

    def __init__(
        self, model: Any, ids: Any, methods: Sequence[Compared] | None = None, *, tol: float = 0.01,
        layers: Sequence[int] | None = None, tokenizer: Any = None, text: str = "", task_tokens: int = 4096,
        decode: bool = True, seed: int = 0, begin: Begin | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(tol, float) or not 0 < tol < 1:
            raise ValueError(f"tol must be a number between 0 and 1, both excluded; got {tol!r}")
        self.subject = Subject(model, layers)
        self.methods: list[Compared] = list(usual(self.subject.language) if methods is None else methods)
        for method in self.methods:
            if not isinstance(method, Window | Settings):
                check_method(method)
        names = [name_of(method) for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1 or name in (EXACT, BY_HEAD)})
        if twice:
            raise ValueError(f"methods must have names of their own, which Settings take; got {', '.join(twice)} twice")
        self.ids = _checked(ids, self.subject)
        self.tol = tol
        # with some layers alone a TreecodeCache would replace the others too
        self.decode = decode and self.subject.language and layers is None and self.ids.shape[1] > 4 * STEPS
        self.tasks: list[asked.Task] = []
        self.notes: list[str] = []
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        if self.decode and kinds != {"full_attention"}:
            self.decode = False
            self.notes.append("Decoding was not measured: a TreecodeCache is for models of full attention alone.")
        if tokenizer is not None and self.subject.language:
            self.tasks, left = asked.tasks(tokenizer, text, min(task_tokens, self.ids.shape[1]), seed)
            self.notes += left
        self.begin: Begin = begin or (lambda step, weight: None)
        self.exact: Reference | None = None
        self.rows: dict[str, Row] = {EXACT: Row(EXACT)}
        self.heads: dict[int, list[Head]] = {}
        self.chosen: Row | None = None
        self.key_heads: dict[int, int] = {}
        self.layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 12  # of the bar alone
        self.gain: float | None = None  # of an rtol for each key head: times faster than the chosen one for all
        self.whole = False  # whether treecodes read every key of so short a text
        self.stopped = ""

    def run(self) -> None:
        """All of it. KeyboardInterrupt passes through: `result` has what was done. What fails of one method is told in
        its row or in the notes, and the others go on; MemoryError where it is the exact model."""
        with self.subject.attending():
            try:
                states, measured = self._watch(self.methods)
                self.exact = reference(self.subject, self.ids, states, self.begin)
                for method in (None, *self.methods):
                    self._score(method)
                self._choose(measured)
                self._decode()
                self._ask()
            except KeyboardInterrupt:
                self.stopped = "interrupted"
                raise
            except (MemoryError, RuntimeError) as error:
                if out_of_memory(error):
                    raise MemoryError(
                        f"memory ran out for the exact model on {self.ids.numel():,} tokens: give fewer of them"
                    ) from None
                raise

    @property
    def work(self) -> float:
        """The weight of all steps, about, as `begin` is told them."""
        n, passes = self.ids.numel(), len(self.methods) + 2
        trees = sum(isinstance(method, Treecode) for method in self.methods) + 1
        work = n * (2 + len(self.methods) / 2 + passes + TRIES) + n
        work += 2 * n * trees if self.decode else 0
        work += sum(task.ids.shape[1] for task in self.tasks) * (passes + 1 - trees)
        return float(work)

    def _watch(self, methods: Sequence[Compared]) -> tuple[Tensor, list[Measured]]:
        """An exact pass with the methods beside: its states, and what was measured of those that did not fail."""
        watch, n = Watch(methods, self.heads), self.ids.numel()
        begun: set[int] = set()
        beside = (name_of(methods[0]) if methods else "nothing") + (" and others" if len(methods) > 1 else "")

        def attend(call: Call) -> Tensor:
            self.key_heads[call.layer] = call.key.shape[1]
            if call.layer not in begun:
                begun.add(call.layer)
                weight = n * (1 + len(methods) / 2) / self.layers
                self.begin(f"{beside} beside exact attention, layer {call.layer}", weight)
            return watch(call)

        states = self.subject.pass_over(self.ids, attend)
        if not watch.exact.seconds:
            raise ValueError(_nothing(self.subject))
        for one in (watch.exact, *watch.methods):
            row, failed = self._row(one.method), watch.failed.get(one.name, "")
            if row.attended is None:  # figures of one pass are compared: those of the first stay
                attended = None if failed else one.attended(watch.exact)
                self.rows[one.name] = replace(row, attended=attended, failed=failed)
        self.heads = watch.found()
        return states, [one for one in watch.methods if one.name not in watch.failed]

    def _row(self, method: Compared | None) -> Row:
        name = name_of(method)
        return self.rows.get(name, Row(name, None if isinstance(method, Window) else method))

    def _score(self, method: Compared | None) -> float | None:
        """The row of a method with its scores; its distance, None where it failed."""
        row = self._row(method)
        assert self.exact is not None
        if row.failed:
            return None
        if row.scored is None:
            self.begin(f"the model with {row.name}", self.ids.numel())
            try:
                start = perf_counter()
                states = self.subject.pass_over(self.ids, outputs(method))
                wait(self.subject.device)
                seconds = perf_counter() - start
                row = replace(row, scored=score(self.subject, self.exact, states), prefill=seconds)
            except Exception as error:
                if method is None:
                    raise
                row = replace(row, failed=reason_of(error))
            self.rows[row.name] = row
        return None if row.scored is None else row.scored.distance

    def _choose(self, measured: list[Measured]) -> None:
        """The treecode for the tolerance, and an rtol for each key head, both measured."""
        trees = [one for one in measured if isinstance(one.method, Treecode)]
        found: dict[float, float] = {}
        for one in trees:
            method: Any = one.method
            told = self.rows[one.name].scored
            if told is not None and isfinite(told.distance) and method.rtol > 0:
                found[method.rtol] = told.distance
        if not found:
            return
        like: Any = trees[0].method
        n = self.ids.shape[1]
        self.whole = not tiers(n, n, self.subject.language, like)
        if self.whole:
            return
        for _ in range(TRIES):
            rtol = next_rtol(found, self.tol)
            distance = None if rtol is None else self._score(replace(like, rtol=rtol))
            if rtol is None or distance is None:
                break
            found[rtol] = distance
        within = [rtol for rtol in found if found[rtol] <= self.tol]
        if not within:
            return
        largest: Treecode = replace(like, rtol=max(within))
        timed = trees
        if self._row(largest).attended is None:  # beside the others that are within, so that one pass compares them
            others: list[Any] = [one.method for one in trees if self.rows[one.name].within(self.tol)]
            timed = self._watch([largest, *others])[1]
            trees += timed[:1]
        self.chosen = fastest(
            {one.name: one.seconds_of_all for one in timed if self.rows[one.name].within(self.tol)}, self.rows
        )
        if self.chosen is None:
            return
        method = self.chosen.method
        settings = by_key_head(trees, self.key_heads, method)
        if settings is not None and self._score(settings) is not None:
            again = self._watch([method, settings])[1]
            if len(again) == 2:
                self.gain = again[0].seconds_of_all / again[1].seconds_of_all

    def _decode(self) -> None:
        """The rows of exact attention and the treecodes with steps of a token."""
        if not self.decode or self.exact is None:
            return
        n, base = self.ids.shape[1], None
        for row in [row for row in self.rows.values() if row.name == EXACT or is_tree(row)]:
            if row.failed or row.attended is None:
                continue
            register(REGISTERED)
            self.begin(f"decoding with {row.name}", 2 * n)
            method: Any = row.method
            try:
                seconds, kl = decoded(self.subject, self.exact, method, REGISTERED)
            except Exception as error:
                self.notes.append(f"Decoding with {row.name} was not measured: {reason_of(error)}.")
                if base is None or not out_of_memory(error):
                    break  # there is nothing to compare with, or the model is not for a TreecodeCache
                continue
            base = seconds if base is None else base
            self.rows[row.name] = replace(row, decoded=Decoded(seconds, base / seconds, kl))

    def _ask(self) -> None:
        """The rows with their tasks: of treecodes the chosen one alone, since they differ less than tasks can tell."""
        chosen = "" if self.chosen is None else self.chosen.name
        for name, row in list(self.rows.items()):
            if row.failed or row.attended is None or (is_tree(row) and chosen not in ("", name)):
                continue
            attend: Attend = outputs(self._compared(name))
            answers: dict[str, Answered] = {}
            for task in self.tasks:
                self.begin(f"{task.name}: {name}", task.ids.shape[1])
                try:
                    answers[task.name] = asked.answer(self.subject, task, attend)
                except Exception as error:
                    self.notes.append(f"{name} was not asked for {task.name}: {reason_of(error)}.")
                    break
                self.rows[name] = replace(row, tasks=dict(answers))

    def _compared(self, name: str) -> Compared | None:
        """What a row is of."""
        return next((method for method in self.methods if name_of(method) == name), self.rows[name].method)

    @property
    def begun(self) -> bool:
        """Whether there is something to tell: the first pass of the exact model."""
        return self.rows[EXACT].attended is not None

    def result(self) -> Evaluation:
        """What is done so far. Raises ValueError before the first pass of the exact model is."""
        if not self.begun:
            raise ValueError("nothing was measured yet: the first pass of the exact model did not end")
        chosen = "" if self.chosen is None else self.chosen.name
        told = Question(
            rows=self.rows,
            chosen=chosen,
            gain=self.gain,
            tol=self.tol,
            layers=self.subject.replaced,
            partly=bool(self.subject.refused) or self.subject.wanted is not None,
            what="KL" if self.subject.language else "1 - cosine",
            size=f"{self.ids.shape[1]:,} tokens",
            compared=any(isinstance(method, Treecode) for method in self.methods),
            whole=self.whole,
            stopped=self.stopped,
        ).answer()
        heads = tuple(head for some in self.heads.values() for head in some)
        exact = self.exact
        losses, long = (None, None) if exact is None else (exact.losses, exact.long)
        rows = tuple(row for row in self.rows.values() if row.attended is not None or row.failed)  # others were tried
        return Evaluation(
            model=self.subject.name, language=self.subject.language, tokens=self.ids.numel(),
            scored=0 if exact is None else exact.scored, layers=tuple(self.subject.replaced),
            refused=dict(self.subject.refused), loss=None if losses is None else float(losses.mean()),
            long_tokens=0 if long is None else len(long), tol=self.tol, rows=rows, heads=heads,
            chosen=chosen, answer=told.text, line=told.line, settings=told.settings, notes=tuple(self.notes),
            stopped=self.stopped,
        )  # fmt: skip


def _checked(ids: Any, subject: Subject) -> Tensor:
    """ids (B, n) on the model's device."""
    ids = torch.as_tensor(ids)
    if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        raise TypeError(f"ids must be whole numbers, (n,) or (1, n), got shape {tuple(ids.shape)} and {ids.dtype}")
    ids = ids[None] if ids.ndim == 1 else ids
    if subject.language and len(ids) != 1:
        raise ValueError(f"ids of a language model must be one text, (n,) or (1, n), got {tuple(ids.shape)}")
    if not len(ids) or ids.shape[1] < LEAST:
        raise ValueError(f"ids must hold at least {LEAST} tokens, got {ids.shape[1] if len(ids) else 0}")
    most = most_tokens(subject.model)
    if most is not None and ids.shape[1] > most:
        raise ValueError(
            f"ids must hold at most the {most:,} tokens that the model has positions for, got {ids.shape[1]:,}"
        )
    return ids.to(subject.device)


def _nothing(subject: Subject) -> str:
    reasons = sorted(set(subject.refused.values()))
    why = f": {reasons[0]}" if reasons else ", since the model does not attend through transformers' interface"
    if subject.wanted is not None and not reasons:
        why = f": it has no layer of the numbers {sorted(subject.wanted)}"
    return f"no attention of {subject.name} can be replaced{why}"
