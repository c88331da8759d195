"""`opoch-xp backends`: what is installed, from where, and whether it can be used."""

from dataclasses import asdict

from opoch_xp.backends import KERNELS, Backend, installed
from opoch_xp.cli.tables import Sink, Table


def list_backends(sink: Sink) -> None:
    """One line a backend, a broken one with its reason; then whose kernels each of them runs."""
    found = installed()
    rows = [
        [entry.name, entry.source, entry.version, "yes" if entry.available else f"no: {entry.reason}"]
        for entry in found
    ]
    columns = ["name", "from", "version", "available"]
    sink.show(Table("Backends", [], columns, rows, text_columns=len(columns)))
    kernels = [[kernel, *(_whose(kernel, entry) for entry in found)] for kernel in KERNELS]
    columns = ["kernel", *(entry.name for entry in found)]
    sink.show(Table("Kernels", [], columns, kernels, text_columns=len(columns)))
    sink.write_json([asdict(entry) for entry in found])


def _whose(kernel: str, entry: Backend) -> str:
    if kernel in entry.native:
        return "own"
    return "generic" if kernel in entry.generic else "-"
