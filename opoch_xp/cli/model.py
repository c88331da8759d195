"""`opoch-xp model PATH`: what methods of attention do to a pretrained model, and which to take."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opoch_xp.cli import heads, tables
from opoch_xp.cli.tables import Sink, Table
from opoch_xp.measure import machine
from opoch_xp.text import first_line
from opoch_xp.writing import check_target, whole_file

DTYPES = ("float32", "bfloat16", "float16")
LANGUAGE = ("CausalLM", "LMHead")  # in the name of a model that goes on with a text, though others of its kind do not
METHODS = ("window", "sinks", "lsh", "treecode")
TOKENS, TASK_TOKENS = 4096, 2048
NEEDED = ("torch", "transformers")
REGISTER = "from opoch_xp.integrations.transformers import register"


@dataclass(frozen=True)
class Setup:
    """The options of the command."""

    path: Path
    text: tuple[Path, ...]
    tokens: int | None
    methods: tuple[str, ...]
    tol: float
    rtol: tuple[float, ...]
    layers: str | None
    device: str
    dtype: str | None
    tasks: bool
    task_tokens: int | None
    html: Path | None
    save: Path | None
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.tol < 1:
            raise ValueError(f"--tol must be a number between 0 and 1, both excluded; got {self.tol}")
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"--methods must be of {', '.join(METHODS)}; got {name!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for rtol in self.rtol:
            if not 0 < rtol < 1:
                raise ValueError(f"--rtol must be a number between 0 and 1, both excluded; got {rtol}")
        for option, path in (("--html", self.html), ("--save", self.save)):
            if path is not None:
                check_target(option, path)


def evaluate_model(setup: Setup, sink: Sink) -> None:
    """Evaluate the model and show, and write, what was found; on Ctrl-C what was found so far."""
    _check_installed("opoch-xp model", *NEEDED)
    if setup.html is not None:
        from opoch_xp.cli.page import check_plots

        check_plots("model")
    layers = None if setup.layers is None else numbers("--layers", setup.layers)
    text = _text(setup.text)
    with _quiet():
        tokenizer, model = _load(setup)
        ids = _tokens(setup, tokenizer, model, text)
        from opoch_xp.integrations.evaluation import Study

        study = Study(
            model, ids, _methods(setup, model.can_generate()), tol=setup.tol, layers=layers, text=text,
            tokenizer=tokenizer if setup.tasks else None, task_tokens=setup.task_tokens or TASK_TOKENS, seed=setup.seed,
        )  # fmt: skip
        stopped = False
        with tables.progress(study.work, weighed=True) as begin:
            study.begin = begin
            try:
                study.run()
            except KeyboardInterrupt:
                stopped = True
    if not study.begun:
        raise KeyboardInterrupt
    _tell(setup, study.result(), sink)
    if stopped:
        raise KeyboardInterrupt


def _check_installed(what: str, *names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ImportError(f'{what} needs {" and ".join(missing)}: pip install "opoch-xp[model]"')


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers of a list such as 0-5,12; ValueError for another text."""
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        try:
            found += range(int(low), int(high or low) + 1)
        except ValueError:
            raise ValueError(f"{option} must be numbers of layers such as 0-5,12; got {text!r}") from None
    return found


def _text(files: Sequence[Path]) -> str:
    """The files one after the other, or the reference of the language that this Python carries."""
    if files:
        return "\n".join(path.read_text(errors="replace") for path in files)
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says while it loads; what it raises is told."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # of files whose weights are converted
    from transformers.utils import logging as told

    level = told.get_verbosity()
    told.set_verbosity(logging.CRITICAL)
    told.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            told.set_verbosity(level)
            told.enable_progress_bar()


def _load(setup: Setup) -> tuple[Any, Any]:
    """Tokenizer and model of a folder of transformers or a .gguf file."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    path, more = setup.path, {}
    if path.is_file() and path.suffix == ".gguf":
        _check_installed("a .gguf file", "gguf", "accelerate")
        path, more = path.parent, {"gguf_file": path.name}
    elif not path.is_dir():
        what = "no .gguf file" if path.exists() else "not there"
        raise FileNotFoundError(f"PATH must be a folder of a model of transformers, or a .gguf file; {path} is {what}")
    elif not (path / "config.json").is_file():
        raise FileNotFoundError(f"PATH must be a folder of a model of transformers; {path} holds no config.json")
    dtype: Any = torch.float32 if setup.device == "cpu" else "auto"
    if setup.dtype is not None:
        dtype = getattr(torch, setup.dtype)
    config = _read("configuration", AutoConfig, path, **more)
    if config.is_encoder_decoder:
        raise ValueError(f"{setup.path} is an encoder with a decoder: give a model that is one of them")
    tokenizer = _read("tokenizer", AutoTokenizer, path, **more)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{setup.path} holds no fast tokenizer, tokenizer.json, which tells where tokens stand")
    written = " ".join(config.architectures or [])
    masked = type(config) in AutoModelForMaskedLM._model_mapping and not any(word in written for word in LANGUAGE)
    language = bool(more) or (not masked and type(config) in AutoModelForCausalLM._model_mapping)
    model = _read("model", AutoModelForCausalLM if language else AutoModel, path, dtype=dtype, **more)
    try:
        return tokenizer, model.to(setup.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {setup.device} cannot take the model: {first_line(error)}") from None


def _read(what: str, kind: Any, path: Path, **more: Any) -> Any:
    """What a class of transformers reads; ValueError in a line for whatever it raises, which is of many kinds."""
    try:
        return kind.from_pretrained(path, **more)
    except Exception as error:
        raise ValueError(f"{path} holds no {what} that transformers can read: {first_line(error)}") from None


def _tokens(setup: Setup, tokenizer: Any, model: Any, text: str) -> Any:
    """The tokens of the text, (1, n), or of an encoder as many full rows as it has positions, (B, n)."""
    import torch

    from opoch_xp.integrations.evaluation.subject import most_tokens

    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise ValueError("the text is empty")
    most, language = most_tokens(model) or len(ids), model.can_generate()
    wanted = setup.tokens or min(TOKENS, len(ids), most if language else TOKENS)
    if len(ids) < wanted:
        raise ValueError(f"the text has {len(ids):,} tokens, fewer than --tokens {wanted:,}")
    if language:
        first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return torch.tensor((first + ids)[:wanted])[None]
    begin, end = ([] if one is None else [one] for one in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    size = min(most - len(begin) - len(end), wanted)
    return torch.tensor([begin + ids[low : low + size] + end for low in range(0, wanted - size + 1, size)])


def _methods(setup: Setup, causal: bool) -> list[Any]:
    """What is compared, by the names of --methods."""
    from opoch_xp.integrations.evaluation.compared import RTOLS, Window, usual

    names = setup.methods or METHODS
    rtols = tuple(sorted(set(setup.rtol or RTOLS), reverse=True))
    kinds: dict[str, Callable[[Any], bool]] = {
        "window": lambda one: isinstance(one, Window) and not one.sinks,
        "sinks": lambda one: isinstance(one, Window) and one.sinks > 0,
        "lsh": lambda one: type(one).__name__ == "LSH",
        "treecode": lambda one: type(one).__name__ == "Treecode",
    }
    return [one for one in usual(causal, rtols) if any(kinds[name](one) for name in names)]


def _tell(setup: Setup, found: Any, sink: Sink) -> None:
    """Write the files, figures first, then show."""
    sink.write_json({"file": setup.path.name, "machine": machine(), "seed": setup.seed, **found.as_dict()})
    if setup.save is not None and found.settings is not None:
        found.settings.save(setup.save)
    parts = [_table(setup, found)]
    asked = _tasks(found)
    parts += [] if asked is None else [asked]
    if setup.html is not None:
        with whole_file(setup.html) as file:
            file.write(heads.page(found, parts, answer(setup, found)).encode())
    for part in parts:
        sink.show(part)
    if heads.compared(found):
        sink.show_text("Heads", heads.maps(found))
    sink.show_text("What to take", "\n".join(answer(setup, found)))


def answer(setup: Setup, found: Any) -> list[str]:
    """The sentence, and the lines to paste."""
    lines = [found.answer]
    if found.line:
        name = "settings.json" if setup.save is None else str(setup.save)
        lines += ["", *(["import opoch_xp as ox"] if "ox." in found.line else []), REGISTER, ""]
        lines += [found.line.replace("settings.json", name)]
        if "settings=" in found.line and setup.save is None:
            lines += ["", f"The settings are written with --save {name}."]
    if setup.save is not None and found.settings is None:
        lines += ["", f"Nothing was written to {setup.save}: there is no setting to take."]
    return lines


def _table(setup: Setup, found: Any) -> Table:
    language = found.language
    scores = ["loss added", "KL", "top-1", "long tokens"] if language else ["1 - cosine"]
    columns = [
        "method", *scores, "error", "worst head", "p99", "rows", "attention", "speed-up", "memory",
        "whole model", *(["decode a token", "speed-up", "KL"] if language else []),
    ]  # fmt: skip
    cells = [[row.name + (f" ({row.failed})" if row.failed else ""), *_cells(row, language)] for row in found.rows]
    count = f"{len(found.layers)} layer{'s' if len(found.layers) > 1 else ''}"
    exact = "" if found.loss is None else f"; the exact model's loss is {found.loss:.4f} nats a token"
    about = [
        f"{found.model}, {count} replaced, {found.tokens:,} tokens, {_texts(setup)}; "
        f"{found.scored:,} scored{' of each' if not language else ''}{exact}",
        machine(),
    ]
    if found.refused:
        why = next(iter(found.refused.values())).split(";")[0]
        stay = "layer stays as it is" if len(found.refused) == 1 else "layers stay as they are"
        about.append(f"{len(found.refused)} {stay}, {_spans(list(found.refused))}: {why}")
    return Table(f"What it does to {setup.path.name}", about, columns, cells, _notes(found, language))


def _texts(setup: Setup) -> str:
    return ", ".join(path.name for path in setup.text) or "the language reference of this Python"


def _spans(layers: list[int]) -> str:
    """0-5, 12: numbers of layers in few words."""
    found: list[list[int]] = []
    for number in sorted(layers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def _cells(row: Any, language: bool) -> list[str]:
    scored, attended, decoded = row.scored, row.attended, row.decoded
    if language:
        cells = [""] * 4 if scored is None else [
            f"{scored.loss_added:+.4f}", f"{scored.kl:.4f}", tables.percent(scored.agrees),
            "" if scored.long_loss_added is None else f"{scored.long_loss_added:+.3f}",
        ]  # fmt: skip
    else:
        cells = [""] if scored is None else [f"{scored.apart:.2g}"]
    cells += [""] * 7 if attended is None else [
        tables.percent(attended.error), tables.percent(attended.worst), tables.percent(attended.p99),
        f"{attended.rows:,.0f}", tables.seconds(attended.seconds), tables.factor(attended.speedup),
        tables.size(attended.extra_bytes),
    ]  # fmt: skip
    cells.append("" if row.prefill is None else tables.seconds(row.prefill))
    if language:
        cells += [""] * 3 if decoded is None else [
            tables.seconds(decoded.seconds), tables.factor(decoded.speedup), f"{abs(decoded.kl):.4f}",
        ]  # fmt: skip
    return cells


def _later(found: Any) -> list[str]:
    """What must be said of rows that were measured in another pass than the first."""
    first = found.rows[0].attended.seconds
    late = [
        f"{row.name} ({tables.seconds(row.attended.exact_seconds)})"
        for row in found.rows
        if row.attended is not None and row.attended.exact_seconds != first
    ]
    if not late:
        return []
    return [f"Measured in a later pass, beside exact attention's time in it: {', '.join(late)}."]


def _notes(found: Any, language: bool) -> list[str]:
    notes = [
        "error: Frobenius norm of (approximate - exact) over that of exact, mean over heads, with the exact model's q, "
        "k and v; p99: of single queries. rows: read by a query. attention: of all replaced layers, one pass, beside "
        "scaled_dot_product_attention in the same pass; memory: peak of one layer; whole model: "
        "one pass over the tokens.",
        *_later(found),
        *found.notes,
    ]
    if not language:
        return ["1 - cosine: of the mean of the last states, mean over the texts.", *notes]
    long = (
        f"long tokens: loss added on the {found.long_tokens:,} scored tokens that lose most where they see 1,024 to "
        "2,047 tokens alone."
        if found.long_tokens
        else "long tokens: the text is too short to tell which need more than 1,024 tokens of context."
    )
    scores = "loss added and KL: nats a token, the attention of all replaced layers replaced; top-1: how often the "
    decode = "decode: a step of the whole model through a TreecodeCache, beside a DynamicCache, and its KL."
    return [scores + "likeliest token is the exact model's.", long, *notes, decode]


def _tasks(found: Any) -> Table | None:
    """Right answers, and the loss of a token of an answer; the exact model's first."""
    rows = [row for row in found.rows if row.tasks]
    if not rows:
        return None
    names = list(rows[0].tasks)
    cells = [
        [row.name, *(f"{one.right:.0%} ({one.loss:.2f})" if (one := row.tasks.get(name)) else "" for name in names)]
        for row in rows
    ]
    notes = ["Right answers, and in brackets the loss of a token of an answer, nats."]
    if found.chosen:
        notes = [f"{notes[0]} Of treecodes the chosen one."]
    failing = [name for name in names if rows[0].tasks[name].right < 0.5]
    if failing:
        notes.append(f"The exact model itself fails at {', '.join(failing)}: there the losses alone tell anything.")
    return Table("Tasks", [], ["method", *names], cells, notes)
