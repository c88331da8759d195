"""Files that lie: headers changed, their checksums made right again."""

import json
import zlib
from typing import Any


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
