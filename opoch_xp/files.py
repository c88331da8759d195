"""Queries, keys and values from a user's own file: .npz or .safetensors, arrays named q, k and v.

Nothing in a file is trusted: no pickles, and every size is checked against the bytes that are there before memory is
taken. Errors name the file and what was expected.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from opoch_xp import tensors, text

NAMES = ("q", "k", "v")
SHOWN = 200  # characters of what another library says
SUFFIXES = (".npz", ".safetensors")
# what the standard library raises for archives that are damaged, encrypted or made up
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, LookupError, ValueError, TypeError,
    OverflowError, SyntaxError, tokenize.TokenError,
)  # fmt: skip
LARGEST = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # bytes that one byte of an archive may become
FLOATS = ("F16", "BF16", "F32", "F64")  # of .safetensors; bfloat16 is widened to float32

QKV = tuple[np.ndarray, np.ndarray, np.ndarray]


def load_qkv(path: str | Path) -> QKV:
    """The arrays q, k and v of an .npz or .safetensors file, as float16, float32 or float64.

    bfloat16 (safetensors) becomes float32, which holds it exactly. Shapes are the caller's: `opoch_xp.attention` checks
    that they fit one another. Raises FileNotFoundError, or ValueError for a file of another kind, damaged or truncated,
    without arrays of these names, with pickled objects or with dtypes that are not floating point.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: expected a file ending in {' or '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}"
        )
    tensors.check_file(path)
    arrays = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        given = ", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{path}: q, k and v must have one dtype, got {given}")
    return arrays["q"], arrays["k"], arrays["v"]


def _check_names(path: Path, held: list[str]) -> None:
    missing = [name for name in NAMES if name not in held]
    if missing:
        raise ValueError(
            f"{path}: expected arrays named q, k and v; {', '.join(missing)} missing, the file holds {text.names(held)}"
        )


def _check_float(path: Path, name: str, dtype: np.dtype) -> None:
    if dtype.kind == "O":
        raise ValueError(
            f"{path}: {name} holds pickled Python objects, which are never loaded; save it as a float array"
        )
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"{path}: {name} must be float16, float32 or float64, got {dtype}")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with _readable(path):
        archive = zipfile.ZipFile(path)
    with archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        _check_names(path, list(members))
        for name in NAMES:  # all of them, before any is read
            _check_npy(path, name, archive, members[name])
        with _readable(path):
            return {name: _native(_read_npy(archive, members[name])) for name in NAMES}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """ValueError that names the file, for whatever the standard library says of an archive."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(
            f"{path}: damaged or truncated, or no .npz file ({text.printable(str(error))[:SHOWN]})"
        ) from None


def _check_npy(path: Path, name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """One array's header against the bytes that the archive says it has, and these against those that are there."""
    if member.compress_type not in LARGEST:
        raise ValueError(f"{path}: {name} is compressed as NumPy never does; save it by numpy.savez")
    with _readable(path):
        shape, dtype, begin = _header(archive, member)
    _check_float(path, name, dtype)
    expected, held = math.prod(shape) * dtype.itemsize, member.file_size - begin
    held = min(held, member.compress_size * LARGEST[member.compress_type])
    if expected != held:
        raise ValueError(f"{path}: {name} of shape {shape} needs {expected:,} bytes, the file holds {held:,}")


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype, and the byte of the member at which the numbers begin."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(file)
        return shape, dtype, file.tell()


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _native(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        header = tensors.read_header(path, file)
        _check_names(path, header.names)
        entries = {name: header.entry(name, FLOATS) for name in NAMES}
        return {name: _widened(tensors.read(file, entry), entry.dtype) for name, entry in entries.items()}


def _widened(array: np.ndarray, dtype: str) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else _native(array)
