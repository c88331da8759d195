"""Files that are there whole or not at all."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def check_target(name: str, path: Path) -> None:
    """Before anything is computed for it: FileNotFoundError or IsADirectoryError, in the caller's words, unless a file
    of this name can stand there."""
    if not path.name:
        raise FileNotFoundError(f"{name}: expected the name of a file, got {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{name}: {path} is a folder, expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{name}: no folder {path.absolute().parent}")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, under a name of this thread's own beside `path`; it takes the place of `path` when the block
    ends, and is deleted when the block raises."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
