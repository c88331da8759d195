"""The commands and their options."""

import functools
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import opoch_xp
from opoch_xp.text import printable

app = typer.Typer(
    help="Attention over sequences too long for exact attention, with its error measured.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Workload(StrEnum):
    """The names of `opoch_xp.workloads`."""

    topics = "topics"
    scattered = "scattered"
    heads = "heads"
    gaussian = "gaussian"
    needles = "needles"
    sinks = "sinks"
    identical = "identical"


class Vectors(StrEnum):
    """The names of `opoch_xp.vectors`."""

    random = "random"
    clustered = "clustered"
    embeddings = "embeddings"


class ByteModel(StrEnum):
    """Models that `decode` can run."""

    bytes = "bytes"


Causal = Annotated[
    bool, typer.Option("--causal/--no-causal", help="Whether a token sees only itself and those before.")
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write every figure to FILE as well (- is stdout).")
]
BackendName = Annotated[str, typer.Option("--backend", help="Array library to compute with, or generic.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all that is random.")]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What the library refuses becomes one line on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except typer.Exit:  # a RuntimeError too
            raise
        except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
            message = printable(" ".join(str(error).split())) or type(error).__name__
            typer.echo(f"opoch-xp: {message}", err=True)
            raise typer.Exit(2) from None

    return run


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opoch-xp {opoch_xp.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Attention over sequences too long for exact attention, with its error measured."""


@app.command()
@one_line_errors
def wall(
    workload: Annotated[Workload | None, typer.Option(help="One table of this input instead of the usual two.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Default: 1,000,000; 8,192 for heads.")] = None,
    dim: Annotated[int, typer.Option(min=1, help="Dimensions of a head.")] = 64,
    heads: Annotated[int | None, typer.Option(min=1, help="Default: 1; all 16 of the model for heads.")] = None,
    causal: Causal = True,
    backend: BackendName = "numpy",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Attention over a million tokens: every method's time, memory and measured error, beside exact attention.

    Without --workload two tables: clustered topics, then the heads of a small language model on real text.
    """
    from opoch_xp.cli.tables import Sink
    from opoch_xp.cli.wall import Setup, measure_wall

    chosen = workload.value if workload else None
    measure_wall(Setup(chosen, tokens, dim, heads, causal, backend, seed), Sink(json))


@app.command()
@one_line_errors
def audit(
    file: Annotated[Path, typer.Argument(help="A .npz or .safetensors file with arrays q, k and v.")],
    tol: Annotated[float, typer.Option(help="Largest error allowed, for the method it would choose.")] = 0.02,
    causal: Causal = True,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Every method on your own queries, keys and values: error against time, and the one to choose for --tol."""
    from opoch_xp.cli.audit import audit_file
    from opoch_xp.cli.tables import Sink

    audit_file(file, tol, causal, seed, Sink(json))


@app.command()
@one_line_errors
def decode(
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens before the new ones. Default: 1,000,000; 8,192 with --model.")
    ] = None,
    new: Annotated[int, typer.Option(min=1, help="Tokens to decode, one at a time.")] = 256,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads. Default: 8.")] = None,
    key_heads: Annotated[int | None, typer.Option(min=1, help="Key heads that they share. Default: 1.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Dimensions of a head. Default: 64.")] = None,
    model: Annotated[
        ByteModel | None, typer.Option(help="bytes: a small language model goes on with a text instead.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="The model's text: the end of this file. Default: held-out Python sources.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of the model's choices. Default: 0, the likeliest byte.")
    ] = None,
    backend: BackendName = "numpy",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """A token at a time over a long context: time, rows read and measured error, exact and treecode side by side.

    With --model bytes: bits per byte of a text for exact attention, a window and the treecode, and how it goes on.
    """
    from opoch_xp.cli.tables import Sink

    if model is None:
        from opoch_xp.cli.decode import TOKENS, Setup, measure_decode

        for name, value in (("--file", file), ("--temperature", temperature)):
            if value is not None:
                raise ValueError(f"{name} needs --model bytes, which reads text and writes it")
        setup = Setup(context or TOKENS, new, heads or 8, key_heads or 1, dim or 64, backend, seed)
        measure_decode(setup, Sink(json))
        return
    from opoch_xp.cli.generate import Text, measure_text

    for name, value in (("--heads", heads), ("--key-heads", key_heads), ("--dim", dim)):
        if value is not None:
            raise ValueError(f"{name} is for made keys: the byte model has heads of its own")
    measure_text(Text(file, context, new, temperature or 0.0, backend, seed), Sink(json))


@app.command()
@one_line_errors
def needle(
    workload: Annotated[Vectors, typer.Option(help="What is searched.")] = Vectors.random,
    n: Annotated[
        list[int] | None,
        typer.Option("--n", min=1, help="Vectors; may be given again. Default: 100,000 and 1,000,000."),
    ] = None,
    bits: Annotated[list[int] | None, typer.Option(min=0, max=62, help="Bits a table; with --tables, again.")] = None,
    tables: Annotated[list[int] | None, typer.Option(min=1, help="Tables, one for each --bits.")] = None,
    probes: Annotated[int, typer.Option(min=1, help="Buckets read a table.")] = 1,
    dim: Annotated[int, typer.Option(min=2, help="Numbers a vector; embeddings have their own.")] = 64,
    queries: Annotated[int, typer.Option(min=1, help="Queries, each with a needle.")] = 256,
    cosine: Annotated[float, typer.Option(min=-1, max=1, help="Of a query and its needle.")] = 0.9,
    seed: Seed = 0,
    json: Json = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write a line a row to FILE as well (- is stdout).")
    ] = None,
) -> None:
    """Random-hyperplane tables: what they find and at what cost, over a sweep of bits and tables.

    By default the settings of the published table: 12 x 16, 10 x 20, 8 x 32 and 6 x 50, with 4 bits more at a million.
    """
    from opoch_xp.cli.needle import Setup, measure_needles
    from opoch_xp.cli.tables import Sink

    if len(bits or []) != len(tables or []):
        raise ValueError(f"--bits and --tables go in pairs, got {len(bits or [])} and {len(tables or [])}")
    settings = tuple(zip(bits or [], tables or [], strict=True))
    setup = Setup(workload.value, tuple(n or ()), settings, probes, dim, queries, cosine, seed)
    measure_needles(setup, Sink(json, csv))


@app.command()
@one_line_errors
def report(
    file: Annotated[Path, typer.Argument(help="The page to write: one HTML file that loads nothing.")],
    tokens: Annotated[int, typer.Option(min=4096, help="Of the wall, and the most of the sweep.")] = 65_536,
    vectors: Annotated[int, typer.Option(min=1, help="That needles are planted among.")] = 100_000,
    seed: Seed = 0,
) -> None:
    """The wall, the needles and a scaling sweep on one page, with plots; about a minute at the sizes given.

    Needs matplotlib: pip install "opoch-xp[report]".
    """
    from opoch_xp.cli.report import Setup, write_report

    write_report(Setup(file, tokens, vectors, seed))


@app.command()
@one_line_errors
def model(
    path: Annotated[Path, typer.Argument(help="A folder of a model of transformers, or a .gguf file.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text to read; may be given again. Default: the language reference of this Python."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=64, help="Default: 4,096, or what model and text have.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="window, sinks, lsh or treecode; may be given again. Default: all.")
    ] = None,
    tol: Annotated[
        float, typer.Option(help="Largest KL from the exact model a token, nats; of an encoder 1 - cosine.")
    ] = 0.01,
    rtol: Annotated[
        list[float] | None, typer.Option(help="Of a treecode; may be given again. Default: .05, .1 and .2.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to replace, such as 0-5,12. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="Of PyTorch.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on a CPU, elsewhere the model's.")] = None,
    tasks: Annotated[bool, typer.Option("--tasks/--no-tasks", help="Whether questions are asked.")] = True,
    task_tokens: Annotated[int | None, typer.Option(min=512, help="Of a task, at most. Default: 2,048.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with maps of the heads.")] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the settings, for register(settings=FILE).")
    ] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """What it would do to your model: loss, heads, tasks and time of every method, and which setting to take.

    Some ten minutes for 135 million weights on two cores. Ctrl-C shows what is done.
    Needs PyTorch and transformers: pip install "opoch-xp[model]".
    """
    from opoch_xp.cli.model import Setup, evaluate_model
    from opoch_xp.cli.tables import Sink

    sink = Sink(json)
    setup = Setup(
        path, tuple(text or ()), tokens, tuple(methods or ()), tol, tuple(rtol or ()), layers, device, dtype, tasks,
        task_tokens, html, save, seed,
    )  # fmt: skip
    evaluate_model(setup, sink)


@app.command()
@one_line_errors
def backends(
    check: Annotated[
        str | None, typer.Option(metavar="NAME", help="Hold this backend to its contract: see docs/plugins.md.")
    ] = None,
    json: Json = None,
) -> None:
    """What is installed, from where, and whether it can be used."""
    from opoch_xp.cli.backends import check_one, list_backends
    from opoch_xp.cli.tables import Sink

    if check is None:
        list_backends(Sink(json))
    else:
        check_one(check, Sink(json))
