"""The .safetensors format: arrays behind a JSON header, read without trust and written whole or not at all.

8 bytes little-endian, the length of the header; the header, {name: {dtype, shape, data_offsets}, "__metadata__": {text:
text}}; the data. Source: https://github.com/huggingface/safetensors#format. Every size is checked against the bytes
that are there before memory is taken.

Files written here have a checksum: CRC-32 of the header, its own digits as zeros, and of all that follows it.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TypeVar

import numpy as np

from opoch_xp import text
from opoch_xp.writing import replaceable, whole_file

Held = TypeVar("Held")
HEADER_LIMIT = 100_000_000  # bytes of a header: the limit of the format's own library
ALIGN = 64  # bytes: where data begins in files written here, so that mapped rows lie on cache lines
LARGEST = 1 << 63
SUFFIX = ".safetensors"
LENGTH = 8  # bytes of the number before the header
CHUNK = 1 << 22  # bytes read at once for the checksum
CHECKSUM_KEY, NO_SUM = b'"checksum":"', b"0" * 8
CHECKSUM = re.compile(CHECKSUM_KEY + rb'([0-9a-f]{8})"')
# bfloat16 is read as its bits
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "U32": "<u4", "U16": "<u2",
}  # fmt: skip
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items() if name != "BF16"}


@dataclass(frozen=True)
class Entry:
    """One array of a file: its dtype's name, its shape, and the byte of the file at which it begins."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def kind(self) -> np.dtype:
        return np.dtype(DTYPES[self.dtype])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.kind.itemsize


@dataclass(frozen=True)
class Header:
    """What a file says that it holds; `raw` is the header as it stands in the file, `size` the file's bytes."""

    path: Path
    held: dict[str, Any]
    raw: bytes
    size: int

    @property
    def names(self) -> list[str]:
        return [name for name in self.held if name != "__metadata__"]

    def metadata(self, key: str) -> str | None:
        """A text of the metadata; None where there is none of this name."""
        metadata = self.held.get("__metadata__")
        found = metadata.get(key) if isinstance(metadata, dict) else None
        return found if isinstance(found, str) else None

    def entry(self, name: str, dtypes: tuple[str, ...]) -> Entry:
        """One array's entry, checked against the bytes of the file; ValueError when it lies."""
        path, first = self.path, LENGTH + len(self.raw)
        try:
            given = self.held[name]
            dtype, shape, (begin, end) = given["dtype"], tuple(given["shape"]), given["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: the header is not that of a .safetensors file ({error})") from None
        if dtype not in dtypes:
            raise ValueError(f"{path}: {name} must be {', '.join(dtypes[:-1])} or {dtypes[-1]}, got {text.name(dtype)}")
        whole = (isinstance(number, int) and not isinstance(number, bool) for number in (*shape, begin, end))
        if not all(whole) or not all(0 <= number < LARGEST for number in (*shape, begin, end)):
            raise ValueError(f"{path}: the shape and offsets of {name} must be whole numbers from 0 to 2**63 - 1")
        entry = Entry(dtype, shape, first + begin)
        if end - begin != entry.bytes or first + end > self.size:
            there = max(0, min(end, self.size - first) - begin)
            raise ValueError(f"{path}: {name} of shape {shape} needs {entry.bytes:,} bytes, the file holds {there:,}")
        return entry


def read_header(path: Path, file: BinaryIO) -> Header:
    """The header of an open file; ValueError for a file of another kind, damaged or truncated."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(LENGTH), "little")
    if size < LENGTH or length > min(size - LENGTH, HEADER_LIMIT):
        raise ValueError(f"{path}: damaged or truncated, or no .safetensors file (header of {length:,} bytes)")
    raw = file.read(length)
    try:
        held = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not that of a .safetensors file ({error})") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path}: the header is not that of a .safetensors file (it holds no names)")
    return Header(path, held, raw, size)


def read(file: BinaryIO, entry: Entry) -> np.ndarray:
    """The array of an entry, in memory, as it lies in the file."""
    file.seek(entry.start)
    return np.fromfile(file, entry.kind, math.prod(entry.shape)).reshape(entry.shape)


def mapped(file: BinaryIO, entry: Entry) -> np.ndarray:
    """The array of an entry, read-only, where it lies in the open file: this file, whatever its name is given to."""
    if entry.bytes == 0:  # which no system maps
        return np.empty(entry.shape, entry.kind)
    return np.memmap(file, entry.kind, "r", entry.start, entry.shape)


def bytes_of(array: np.ndarray) -> memoryview:
    """The array's numbers as they are written, without a copy where they lie in order."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def kind_of(dtype: np.dtype) -> str:
    """The name that the format gives to a dtype."""
    return NAMES[np.dtype(dtype)]


def header_of(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The header of a file of arrays, dtype's name and shape by name, one after another; filled up so that the data
    begin on ALIGN bytes."""
    held: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        held[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    line = json.dumps(held, separators=(",", ":")).encode()
    return line + b" " * (-(LENGTH + len(line)) % ALIGN)


def write(
    path: Path,
    entries: dict[str, tuple[str, tuple[int, ...]]],
    metadata: dict[str, str],
    arrays: Iterable[np.ndarray],
) -> None:
    """Write a file, whole or not at all, with a checksum in its metadata; `arrays` in the order of the entries, each
    taken when those before it are written."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, expected the name of a file")
    if not replaceable(path):
        raise OSError(f"{path}: a pipe or a device, expected the name of a file")
    header = header_of(entries, {**metadata, "checksum": NO_SUM.decode()})
    total = zlib.crc32(header)
    with whole_file(path) as file:
        file.write(len(header).to_bytes(LENGTH, "little") + header)
        for (name, (dtype, shape)), array in zip(entries.items(), arrays, strict=True):
            assert (NAMES[array.dtype], array.shape) == (dtype, shape), name
            data = bytes_of(array)
            file.write(data)
            total = zlib.crc32(data, total)
        file.seek(LENGTH + header.index(CHECKSUM_KEY + NO_SUM) + len(CHECKSUM_KEY))
        file.write(b"%08x" % total)


def to_bytes(save: Callable[[Path], None]) -> bytes:
    """The file that `save` writes, for pickles."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"held{SUFFIX}"
        save(path)
        return path.read_bytes()


def from_bytes(data: bytes, load: Callable[[Path], Held]) -> Held:
    """What `load` reads from a file of these bytes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"held{SUFFIX}"
        path.write_bytes(data)
        return load(path)


def check_ending(path: Path) -> None:
    """ValueError unless a name has the ending of the format."""
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: expected a name ending in {SUFFIX}, got {path.suffix or 'no ending'!r}")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read; FileNotFoundError where there is none."""
    check_file(path)
    with path.open("rb") as file:
        yield file


def check_file(path: Path) -> None:
    """FileNotFoundError unless there is a file of this name, which says what else there is."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else None
        raise FileNotFoundError(f"{path}: {f'{kind}, not a file' if kind else 'no such file'}")


def check_format(path: Path, header: Header, what: str, name: str, version: int) -> None:
    """ValueError unless a file says that it is `what`, of the format and version named."""
    if header.metadata("format") != name:
        raise ValueError(f"{path}: no {what}: its format is {header.metadata('format')!r}, expected {name!r}")
    found = header.metadata("version")
    if found != str(version):
        raise ValueError(f"{path}: written in version {found} of the format; this opoch_xp reads version {version}")


def check_sum(path: Path, header: Header, file: BinaryIO) -> None:
    """ValueError unless the contents of an open file are those that its checksum was made of."""
    found = CHECKSUM.findall(header.raw)
    if len(found) != 1:
        raise ValueError(f"{path}: damaged: no checksum")
    total = zlib.crc32(CHECKSUM.sub(CHECKSUM_KEY + NO_SUM + b'"', header.raw))
    file.seek(LENGTH + len(header.raw))
    while part := file.read(CHUNK):
        total = zlib.crc32(part, total)
    if b"%08x" % total != found[0]:
        raise ValueError(f"{path}: damaged: the checksum is {found[0].decode()}, the contents give {total:08x}")
