"""Files that are there whole or not at all."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def check_target(name: str, path: Path) -> None:
    """Before anything is computed for it: an OSError in the caller's words (FileNotFoundError, IsADirectoryError,
    PermissionError) unless a file of this name can be written."""
    if not path.name:
        raise FileNotFoundError(f"{name}: expected the name of a file, got {str(path)!r}")
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # of a name that no file can have, or a folder that may not be read
        raise type(error)(f"{name}: {path} cannot be written: {error.strerror}") from None
    if path.is_dir():
        raise IsADirectoryError(f"{name}: {path} is a folder, expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{name}: no folder {path.absolute().parent}")
    if not replaceable(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{name}: {path} may not be written")
        return
    part = _part(path)
    try:
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        raise type(error)(f"{name}: {path} cannot be written: {error.strerror}") from None


def replaceable(path: Path) -> bool:
    """Whether what is written to `path` takes the place of a file, or of none; a pipe and a device are written to."""
    return not path.exists() or path.is_file()


def _part(path: Path) -> Path:
    """A name that nobody has, beside the file that `path` leads to, and no longer than any system takes."""
    return Path(os.path.realpath(path)).with_name(f".opoch-xp.{secrets.token_hex(8)}")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, under a name of its own beside `path`; it takes the place of `path`, and its mode, when the
    block ends, and is deleted when the block raises. A pipe or a device is written as it is."""
    if not replaceable(path):
        with path.open("wb") as file:
            yield file
        return
    part = _part(path)
    opened = part.open("xb")
    try:
        with opened as file:
            if path.exists():
                with suppress(OSError):  # of file systems without modes
                    os.chmod(part, stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(os.path.realpath(path))
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
