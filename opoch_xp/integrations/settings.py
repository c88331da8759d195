"""Settings: how each layer of a model attends, key head by key head, and the file that they are kept in."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from opoch_xp.attention import attention
from opoch_xp.methods import Exact, Method
from opoch_xp.solve import check_method
from opoch_xp.writing import whole_file

FORMAT = "opoch_xp settings 1"
KINDS: dict[str, type[Method]] = {kind.__name__: kind for kind in get_args(Method)}


@dataclass(frozen=True)
class Settings:
    """layers[i]: the methods of layer i, one for each key head and the query heads that share it, or one for all.

    Layers that are left out attend as the model did. name: of their row in an evaluation. Raises TypeError or
    ValueError for what is no such mapping.
    """

    layers: Mapping[int, tuple[Method, ...]]
    name: str = field(default="settings", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise TypeError(f"layers must map numbers of layers to methods, got {self.layers!r}")
        for number, methods in self.layers.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"layers must be named by whole numbers from 0 on, got {number!r}")
            if not isinstance(methods, tuple) or not methods:
                raise TypeError(f"layer {number} must have a tuple of methods, got {methods!r}")
            for method in methods:
                check_method(method)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention of a layer, (B, H, n_q, d_v): query (B, H, n_q, d), key and value (B, H_kv, n_k, ...), on all or
        some of the layer's heads in their order; options of opoch_xp.attention. A single query reads every key."""
        methods = self.layers[layer]
        if query.shape[2] == 1:
            methods = (Exact(),)
        return attend_heads(query, key, value, methods, f"layer {layer}", **options)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the settings as JSON, whole or not at all."""
        with whole_file(Path(path)) as file:
            file.write(json.dumps(self.as_dict(), indent=1).encode() + b"\n")

    def as_dict(self) -> dict[str, Any]:
        """The same in types that JSON has."""
        layers = {str(number): [_told(one) for one in methods] for number, methods in sorted(self.layers.items())}
        return {"format": FORMAT, "layers": layers}

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Settings":
        """What `save` wrote; ValueError where the file is no such settings, OSError where it cannot be read."""
        text = Path(path).read_text()
        try:
            held = json.loads(text)
            if held["format"] != FORMAT:
                raise ValueError(f"its format is {held['format']!r}, not {FORMAT!r}")
            return cls({int(n): tuple(map(_method, methods)) for n, methods in held["layers"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} must hold settings that opoch-xp model --save wrote: {error}") from None


def attend_heads(
    query: Tensor, key: Tensor, value: Tensor, methods: Sequence[Method], where: str, **options: Any
) -> Tensor:
    """Attention with a method for each key head and the query heads that share it, or one for all. Raises ValueError,
    with `where` in front, for another number of methods."""
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    for method, heads, arrays in by_method(query, key, value, methods, where):
        out[:, heads] = attention(*arrays, method=method, check=False, **options)
    return out


def by_method(
    query: Tensor, key: Tensor, value: Tensor, methods: Sequence[Method], where: str
) -> Iterator[tuple[Method, Any, tuple[Tensor, Tensor, Tensor]]]:
    """Each method once, the query heads that it is for, and query, key and value of those heads. Arguments and errors
    of `attend_heads`."""
    if len(set(methods)) == 1:
        yield methods[0], slice(None), (query, key, value)
        return
    heads, repeat = key.shape[1], query.shape[1] // max(1, key.shape[1])
    if len(methods) != heads:
        raise ValueError(f"{where} has {heads} key heads, and settings for {len(methods)}: they are of another model")
    for method in dict.fromkeys(methods):
        some = [number for number, one in enumerate(methods) if one == method]
        shared = [repeat * number + r for number in some for r in range(repeat)]
        yield method, shared, (query[:, shared], key[:, some], value[:, some])


def _told(method: Method) -> dict[str, Any]:
    """A method as its kind and the fields that are not at their defaults."""
    given = asdict(method)
    return {"method": type(method).__name__} | {
        one.name: given[one.name] for one in fields(method) if given[one.name] != one.default
    }


def _method(told: dict[str, Any]) -> Method:
    told = dict(told)
    kind = told.pop("method")
    if kind not in KINDS:
        raise ValueError(f"method must be one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](**told)
