"""`opoch-xp backends`: what is installed, from where, whether it can be used, and whether it keeps its contract."""

from dataclasses import asdict

import typer

from opoch_xp.backends import KERNELS, Backend, installed
from opoch_xp.cli.tables import Sink, Table
from opoch_xp.testing import BackendError, check_backend
from opoch_xp.text import printable


def list_backends(sink: Sink) -> None:
    """One line a backend, a broken one with its reason; then whose kernels each of them runs."""
    found = installed()
    sink.write_json([asdict(entry) for entry in found])
    rows = [[*map(printable, (entry.name, entry.source, entry.version)), _usable(entry)] for entry in found]
    columns = ["name", "from", "version", "available"]
    sink.show(Table("Backends", [], columns, rows, text_columns=len(columns)))
    kernels = [[kernel, *(_whose(kernel, entry) for entry in found)] for kernel in KERNELS]
    columns = ["kernel", *(entry.name for entry in found)]
    sink.show(Table("Kernels", [], columns, kernels, text_columns=len(columns)))


def check_one(name: str, sink: Sink) -> None:
    """What check_backend finds: a table of what was checked, or every fault and exit code 1."""
    try:
        report = check_backend(name)
        checks, text = report.checks, str(report)
    except BackendError as broken:
        checks, text = broken.checks, str(broken)
    failed = any(check.fault for check in checks)
    sink.write_json([asdict(check) for check in checks])
    typer.echo(text, err=failed or sink.console.stderr)
    if failed:
        raise typer.Exit(1)


def _usable(entry: Backend) -> str:
    return "yes" if entry.available else f"no: {printable(' '.join(entry.reason.split()))}"


def _whose(kernel: str, entry: Backend) -> str:
    if kernel in entry.native:
        return "own"
    return "generic" if kernel in entry.generic else "-"
