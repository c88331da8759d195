"""Where the arrays of a cache lie: on the device, in host memory, or in files that are mapped into memory."""

import errno
import math
import mmap
import os
import tempfile
import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from opoch_xp.arguments import name_of
from opoch_xp.backends import library
from opoch_xp.treecode.tree import HostRows

Array = Any
HOST = "host"
RELEASE = 1 << 23  # bytes read of mapped files between givings back; a system may map 8 times as much around them


def folder(offload: str | Path | None) -> str | Path | None:
    """None, "host", or a folder that is there."""
    if offload is None or offload == HOST:
        return offload
    if not isinstance(offload, str | Path):
        raise TypeError(f'offload must be None, "{HOST}" or a folder, got {offload!r}')
    path = Path(offload)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"offload: {path} is a file, expected a folder")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"offload: no folder {path.absolute().parent}")
    path.mkdir(exist_ok=True)
    return path


class Memory:
    """Allocates arrays of zeros; those that are `cold` lie where `offload` says: None the device, "host", or a folder.

    on_host: whether kernels read host memory as it is. Mapped files have no name: they go when the arrays do, and with
    the process whatever happens to it. Pages that were read stay resident until `release`; the system may keep them in
    its cache of files, and takes them back when it needs them.
    """

    def __init__(self, xp: Any, where: Any, on_host: bool, offload: str | Path | None) -> None:
        self.xp, self.where, self.on_host, self.offload = xp, where, on_host, offload
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._read = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Memory":
        if self.mapped:
            raise ValueError(
                f"a cache whose keys lie in files of {self.offload} is not copied into memory: save and load"
            )
        return Memory(self.xp, self.where, self.on_host, self.offload)

    @property
    def mapped(self) -> bool:
        return self.offload not in (None, HOST)

    def lasting(self) -> AbstractContextManager[Any]:
        """Arrays made inside may be written to later: PyTorch's of torch.inference_mode only inside of it."""
        return self.xp.inference_mode(False) if library(self.xp) == "torch" else nullcontext()

    def zeros(self, shape: tuple[int, ...], dtype: Any, cold: bool) -> Array:
        with self.lasting():
            return self._zeros(shape, dtype, cold)

    def _zeros(self, shape: tuple[int, ...], dtype: Any, cold: bool) -> Array:
        if not cold or self.offload is None or (self.offload == HOST and self.on_host):
            return self.xp.zeros(shape, dtype=dtype, device=self.where)
        kind = np.dtype(name_of(dtype))
        data = self._map(shape, kind) if self.mapped else np.zeros(shape, kind)
        if not self.on_host:
            return HostRows(data, self.xp, self.where)
        return self.xp.asarray(data)  # the same memory, in NumPy and PyTorch

    def _map(self, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
        size = math.prod(shape) * kind.itemsize
        with tempfile.TemporaryFile(dir=self.offload) as file:
            self._take(file.fileno(), size)
            held = mmap.mmap(file.fileno(), size)
        self._maps.add(held)
        return np.frombuffer(held, kind).reshape(shape)

    def _take(self, file: int, size: int) -> None:
        """Blocks of the disk for a whole file, now: without them a write to what is mapped ends the process."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)
                return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of file systems that cannot
                raise OSError(error.errno, f"{error.strerror}, for {size:,} bytes", str(self.offload)) from None
        os.truncate(file, size)

    def read(self, size: int) -> None:
        """Notes that about `size` bytes of mapped files were read; their pages are given back from time to time."""
        self._read += size
        if self._read > RELEASE:
            self.release()

    def release(self) -> None:
        """Give the pages of mapped files back: they are read from the files when they are needed again."""
        self._read = 0
        for held in self._maps:
            if hasattr(held, "madvise"):  # not on Windows
                held.madvise(mmap.MADV_DONTNEED)
