"""Files that are damaged, or lie: headers changed, their checksums made right again."""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from opoch_xp import writing


def refused(folder: Path, contents: bytes, words: str | None, *loads: Callable[[Path], Any]) -> None:
    """Every way to load the contents raises ValueError with these words and the file's name."""
    path = folder / "bad.safetensors"
    path.write_bytes(contents)
    for load in loads:
        with pytest.raises(ValueError, match=words) as error:
            load(path)
        assert str(path) in str(error.value)


def flipped(saved: bytes, place: int, bit: int = 0) -> bytes:
    return saved[:place] + bytes([saved[place] ^ 1 << bit]) + saved[place + 1 :]


def damaged(data: st.DataObject, saved: bytes) -> bytes:
    """The file cut short, or with a flipped bit."""
    if data.draw(st.booleans()):
        return saved[: data.draw(st.integers(0, len(saved) - 1))]
    return flipped(saved, data.draw(st.integers(0, len(saved) - 1)), data.draw(st.integers(0, 7)))


def damaged_headers(saved: bytes) -> Iterator[bytes]:
    """The file with a flipped bit in each byte of its header."""
    return (flipped(saved, place) for place in range(8 + int.from_bytes(saved[:8], "little")))


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written from now on finds no space."""

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(writing.os, "fsync", full)


def rewritten(saved: bytes, change: Any, data: bytes | None = None) -> bytes:
    """The file with a header changed by `change(header)` and, if given, other data, its checksum made right again."""
    length = int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8 : 8 + length])
    change(header)
    header["__metadata__"]["checksum"] = "0" * 8
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    rest = saved[8 + length :] if data is None else data
    total = zlib.crc32(rest, zlib.crc32(text))
    text = text.replace(b'"checksum":"00000000"', b'"checksum":"%08x"' % total)
    return len(text).to_bytes(8, "little") + text + rest


def with_settings(**values: Any) -> Any:
    def change(header: dict[str, Any]) -> None:
        held = json.loads(header["__metadata__"]["settings"])
        header["__metadata__"]["settings"] = json.dumps({**held, **values})

    return change


def entry(name: str, **values: Any) -> Any:
    return lambda header: header[name].update(values)


def metadata(**values: Any) -> Any:
    return lambda header: header["__metadata__"].update(values)
