"""Files of an index: .safetensors with the arrays x, ids, codes and order, settings and a checksum in the metadata.

Nothing is trusted: kinds and sizes are checked before memory is taken, contents before they are used.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from opoch_xp import tensors
from opoch_xp.index_settings import Settings
from opoch_xp.methods import check_whole

FORMAT = "opoch_xp.LSHIndex"
VERSION = 1
SMALL = 1 << 26  # bytes of hyperplanes that an index may need whatever it holds,
TABLES = 1 << 12  # and tables
KINDS = {"x": ("F32", "F64"), "ids": ("I64",), "codes": ("U16", "U32", "I64"), "order": ("I32", "I64")}


def write(path: Path, settings: Settings, next_id: int, arrays: dict[str, np.ndarray]) -> None:
    """Write an index, whole or not at all."""
    tensors.check_ending(path)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "settings": json.dumps({**asdict(settings), "next_id": next_id}),
    }
    entries = {name: (tensors.kind_of(array.dtype), array.shape) for name, array in arrays.items()}
    tensors.write(path, entries, metadata, arrays.values())


def read(path: Path, mmap: bool) -> tuple[Settings, int, dict[str, np.ndarray]]:
    """(settings, next_id, arrays) of an index, checked; ValueError where anything does not fit."""
    with tensors.opened(path) as file:
        header = tensors.read_header(path, file)
        settings, next_id = _settings(path, header)
        missing = [name for name in KINDS if name not in header.names]
        if missing:
            raise ValueError(f"{path}: no index: {', '.join(missing)} missing")
        entries = {name: header.entry(name, kinds) for name, kinds in KINDS.items()}
        _check_shapes(path, settings, entries)
        tensors.check_sum(path, header, file)
        arrays = {n: tensors.mapped(file, e) if mmap else tensors.read(file, e) for n, e in entries.items()}
    _check_contents(path, settings, next_id, arrays)
    return settings, next_id, arrays


def _settings(path: Path, header: tensors.Header) -> tuple[Settings, int]:
    tensors.check_format(path, header, "index", FORMAT, VERSION)
    try:
        given = json.loads(header.metadata("settings") or "")
        next_id = given.pop("next_id")
        check_whole("next_id", next_id, 0)
        return Settings(**given), next_id
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: its settings cannot be used ({error})") from None


def _check_shapes(path: Path, settings: Settings, entries: dict[str, tensors.Entry]) -> None:
    """Sizes that fit the settings and one another: making an index of the settings costs what the file holds."""
    n = entries["ids"].shape[0] if entries["ids"].shape else 0
    tables = settings.tables
    expected = {"ids": (n,), "x": (n, settings.dim), "codes": (tables, n), "order": (tables, n)}
    for name, shape in expected.items():
        if entries[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {entries[name].shape}, expected {shape}")
    held, planes = sum(entry.bytes for entry in entries.values()), 4 * settings.dim * settings.bits * tables
    if planes > max(SMALL, held) or tables > max(TABLES, held):
        raise ValueError(
            f"{path}: {tables:,} tables with {planes:,} bytes of hyperplanes do not fit {held:,} bytes of index"
        )


def _check_contents(path: Path, settings: Settings, next_id: int, arrays: dict[str, np.ndarray]) -> None:
    """What a checksum cannot tell: contents that were written wrong."""
    codes, order, ids, x = (arrays[name] for name in ("codes", "order", "ids", "x"))
    n, most = len(ids), 2**settings.bits - 1
    for table in range(settings.tables):
        there = np.zeros(n, bool)
        numbers = order[table]
        if n and not 0 <= int(numbers.min()) <= int(numbers.max()) < n:
            raise ValueError(f"{path}: order of table {table} names vectors that are not there")
        there[numbers] = True
        if not there.all():
            raise ValueError(f"{path}: order of table {table} lacks vectors")
        table_codes = codes[table]
        if n and not (
            int(table_codes[0]) >= 0 and int(table_codes[-1]) <= most and (table_codes[1:] >= table_codes[:-1]).all()
        ):
            raise ValueError(f"{path}: codes of table {table} do not ascend from 0 to {most}")
    if n and (int(ids.min()) < 0 or int(ids.max()) >= next_id or len(np.unique(ids)) < n):
        raise ValueError(f"{path}: ids must differ and be from 0 to {next_id - 1}")
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: x must be finite")
