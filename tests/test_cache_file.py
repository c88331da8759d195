"""Saved caches: they go on where they were; what is damaged or made to deceive is refused."""

import copy
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import safetensors.numpy
from conftest import Backend
from hostile import damaged, damaged_headers, entry, fill_disk, metadata, rewritten, with_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cache import ALONE, EVERY, METHODS, Caches, N, arrays, unequal

import opoch_xp as ox
from opoch_xp.testing import assert_close

SAVED = ox.Treecode(rtol=0.3, sinks=3, block=8, fan=2, leaf=4, branch=2, top=2, group=4, least=1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("name", EVERY)
def test_a_cache_goes_on_where_it_was(backend: Backend, tmp_path: Path, name: str, dtype: str) -> None:
    """The same bits, now and after more tokens, a crop and a choice of sequences."""
    if not backend.has(dtype):
        pytest.skip(f"no {dtype}")
    q, k, v = (x.astype(dtype) for x in unequal(*arrays()))
    mask = np.ones((2, N), bool)
    mask[0, :40] = False
    caches = Caches(backend, METHODS[name])
    caches.prefill(q[:, :, :50], k[:, :, :50], v[:, :, :50], mask=mask[:, :50])
    caches.append(k[:, :, 50:], v[:, :, 50:], mask[:, 50:])
    path = tmp_path / "prompt.safetensors"
    caches.cache.save(path)
    like = None if backend.library.xp.__name__ == "array_api_compat.numpy" else backend.array(k)
    other = Caches(backend, METHODS[name])
    other.cache = ox.KVCache.load(path, like=like, backend=backend.name)
    assert other.cache.method == METHODS[name]
    assert other.cache.lengths.tolist() == [N - 40, N]
    for step in range(5):
        for ours, theirs in zip(caches.attend(q[:, :, -5:]), other.attend(q[:, :, -5:]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for one in (caches, other):
            if step == 0:
                one.append(k[:, :, :100], v[:, :, :100])
                one.cache.crop(300)
            elif step == 1:
                one.cache.select([1, 0])
            elif step == 2:
                one.cache.crop(12)  # no chunk is left, but what the queries told
            elif step == 3:
                one.append(k[:, :, 12:], v[:, :, 12:])


@pytest.mark.parametrize("name", EVERY)
def test_a_pickle_and_a_copy_go_on_where_the_cache_was(backend: Backend, name: str) -> None:
    if backend.option == "strict":
        pytest.skip("arrays of the library cannot be pickled")
    q, k, v = unequal(*arrays())
    caches, other = Caches(backend, METHODS[name], capacity=N + 5), Caches(backend, METHODS[name])
    assert len(pickle.loads(pickle.dumps(caches.cache))) == 0
    caches.prefill(q[:, :, :50], k[:, :, :50], v[:, :, :50])
    for make in (copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
        other.cache = make(caches.cache)
        assert (other.cache.method, other.cache.capacity) == (METHODS[name], N + 5)
        other.append(k[:, :, 50:], v[:, :, 50:])
        caches.append(k[:, :, 50:], v[:, :, 50:])
        for ours, theirs in zip(caches.attend(q[:, :, -5:]), other.attend(q[:, :, -5:]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        caches.cache.crop(50)


def test_what_is_in_a_file(tmp_path: Path) -> None:
    """Anybody's library reads it: keys and values in the order of tokens, and what the first queries told."""
    q, k, v = unequal(*arrays(batch=1))
    cache = ox.KVCache(ALONE)
    cache.prefill(q, k, v)
    path = tmp_path / "prompt.safetensors"
    cache.save(path)
    held = safetensors.numpy.load_file(path)
    pieces = sorted({int(name.split(".")[1]) for name in held if name.endswith(".k")})
    for name, whole in (("k", k), ("v", v)):
        joined = np.concatenate([held[f"0.{piece}.{name}"] for piece in pieces], axis=1)
        np.testing.assert_array_equal(joined, whole[0])
    assert held["0.0.order"].shape == (2, 256)
    asked = q[0].reshape(2, 2, N, 8)[:, :, :16]  # of two query heads a key head, at the positions of the first block
    assert_close(held["0.asked"], np.sqrt((asked**2).mean(1)), 1e-12, "asked")
    share = (asked**2).mean((1, 2))
    assert_close(held["0.balance"], (share / share.max(-1, keepdims=True)) ** 0.25, 1e-12, "balance")


def test_an_accuracy_that_is_numpy_s_number_is_saved(tmp_path: Path) -> None:
    _, k, v = arrays(20, batch=1)
    cache = ox.KVCache(replace(SAVED, rtol=np.float32(0.1)))
    cache.append(k, v)
    cache.save(tmp_path / "cache.safetensors")
    assert ox.KVCache.load(tmp_path / "cache.safetensors").method == cache.method


def small() -> ox.KVCache:
    rng = np.random.default_rng(0)
    cache = ox.KVCache(SAVED)
    cache.prefill(*rng.standard_normal((3, 1, 2, 45, 3)).astype(np.float32))
    return cache


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    small().save(path)
    return path.read_bytes()


def refused(folder: Path, contents: bytes, words: str | None = None) -> None:
    hostile.refused(folder, contents, words, ox.KVCache.load)


def test_names_and_capacity(tmp_path: Path, saved: bytes) -> None:
    path = tmp_path / "cache.safetensors"
    path.write_bytes(saved)
    assert len(ox.KVCache.load(path, capacity=45, offload="host")) == 45
    with pytest.raises(ValueError, match="holds 45 tokens, more than capacity=44"):
        ox.KVCache.load(path, capacity=44)
    with pytest.raises(FileNotFoundError, match="no such file"):
        ox.KVCache.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="a folder, not a file"):
        ox.KVCache.load(tmp_path)
    with pytest.raises(ValueError, match=r"expected a name ending in .safetensors, got '\.npz'"):
        small().save(tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="nothing to save"):
        ox.KVCache().save(path)
    assert path.read_bytes() == saved


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, saved: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.safetensors"
    path.write_bytes(saved)
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="no space left"):
        small().save(path)
    assert path.read_bytes() == saved
    assert os.listdir(tmp_path) == [path.name]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_any_flipped_bit_and_any_truncation_is_refused(tmp_path: Path, saved: bytes, data: st.DataObject) -> None:
    refused(tmp_path, damaged(data, saved))


def test_every_flipped_bit_of_the_header_is_refused(tmp_path: Path, saved: bytes) -> None:
    for contents in damaged_headers(saved):
        refused(tmp_path, contents)


TREE = {"name": "Treecode", **asdict(SAVED)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (metadata(version="1"), "written in version 1 of the format; this opoch_xp reads version 2"),
        (metadata(version="3"), "written in version 3 of the format; this opoch_xp reads version 2"),
        (metadata(format="opoch_xp.LSHIndex"), "no cache: its format is 'opoch_xp.LSHIndex'"),
        (lambda header: header.update(__metadata__={"checksum": "0"}), "no cache: its format is None"),
        (metadata(settings="[]"), "settings cannot be used"),
        (metadata(settings="{"), "settings cannot be used"),
        (with_settings(method=None), "settings cannot be used"),
        (with_settings(method={"name": "eval"}), "settings cannot be used"),
        (with_settings(method={**TREE, "other": 1}), "settings cannot be used"),
        (with_settings(method={**TREE, "open": 2}), "settings cannot be used"),
        (with_settings(method={**TREE, "rtol": 1.0}), "rtol must be a number"),
        (with_settings(method={**TREE, "block": 7}), "settings cannot be used"),
        (with_settings(method={**TREE, "block": 16}), "settings do not fit|0.0.k has shape"),
        (with_settings(method={"name": "Exact"}), "settings do not fit"),
        (with_settings(dtype="int8"), "settings do not fit"),
        (with_settings(dtype="float64"), "0.0.k must be F64|got F32"),
        (with_settings(lengths=[-1]), "lengths must be a whole number"),
        (with_settings(lengths=[2**47], done=[2**47]), "tokens do not fit"),
        (with_settings(lengths=[45, 45]), "settings do not fit"),
        (with_settings(lengths=[44]), "has shape"),
        (with_settings(done=[32]), "settings do not fit"),
        (with_settings(done=[41]), "settings do not fit"),
        (with_settings(asked=None), "settings cannot be used"),
        (with_settings(asked=[-1]), "asked must be a whole number"),
        (with_settings(asked=[9]), "settings do not fit"),
        (with_settings(asked=[8, 8]), "settings do not fit"),
        (with_settings(asked=[7]), r"0.asked has shape \(2, 8, 3\), expected \(2, 7, 3\)"),
        (with_settings(heads=10**12), "has shape"),
        (with_settings(dim=4), r"0.0.k has shape \(2, 32, 3\), expected \(2, 32, 4\)"),
        (with_settings(width=0), "width must be a whole number"),
        (with_settings(axes=3), "settings do not fit"),
        (with_settings(lead=[1, 1]), "settings do not fit"),
        (with_settings(lengths=[0], done=[0], asked=[0], heads=10**9), "open blocks of .* bytes do not fit 0 bytes"),
        (with_settings(method={**TREE, "sinks": 10**12}), "open blocks of .* bytes do not fit"),
        (entry("0.0.k", shape=[1 << 40, 5]), "needs .* bytes, the file holds"),
        (entry("0.0.k", dtype="I32"), "got I32"),
        (entry("0.0.order", dtype="F32"), "got F32"),
        (entry("0.1.v", data_offsets=[0]), "header is not that"),
        (lambda header: header.pop("0.1.order"), "no cache: 0.1.order missing"),
        (lambda header: header.pop("0.balance"), "no cache: 0.balance missing"),
        (entry("0.0.order", data_offsets=[0, 256]), "order must name every row"),  # the keys, read as places
    ],
)
def test_hostile_headers(tmp_path: Path, saved: bytes, change: Any, words: str) -> None:
    refused(tmp_path, rewritten(saved, change), words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("0.0.k", np.nan, "must be finite"),
        ("0.1.v", np.inf, "must be finite"),
        ("0.asked", np.inf, "must be finite"),
        ("0.asked", -1, "0.asked must be from 0 to inf"),
        ("0.balance", np.nan, "must be finite"),
        ("0.balance", 0, "0.balance must be from 0.099 to 1"),
        ("0.balance", 2, "0.balance must be from 0.099 to 1"),
        ("0.0.order", 32, "must name every row"),
        ("0.1.order", -1, "must name every row"),
    ],
)
def test_contents_that_were_written_wrong(tmp_path: Path, saved: bytes, name: str, value: float, words: str) -> None:
    start = 8 + int.from_bytes(saved[:8], "little")
    held = {}
    rewritten(saved, lambda header: held.update(header))
    begin, end = held[name]["data_offsets"]
    array = np.frombuffer(saved[start:][begin:end], {"F32": np.float32, "I32": np.int32}[held[name]["dtype"]]).copy()
    array[5] = value
    data = saved[start:][:begin] + array.tobytes() + saved[start:][end:]
    refused(tmp_path, rewritten(saved, lambda header: None, data), words)


def test_the_checksum_can_be_made_right(tmp_path: Path, saved: bytes) -> None:
    """Or the tests above would show nothing."""
    path = tmp_path / "same.safetensors"
    path.write_bytes(rewritten(saved, lambda header: None))
    assert len(ox.KVCache.load(path)) == 45


def test_an_order_that_names_a_row_twice(tmp_path: Path, saved: bytes) -> None:
    start, held = 8 + int.from_bytes(saved[:8], "little"), {}
    rewritten(saved, lambda header: held.update(header))
    data = bytearray(saved[start:])
    begin = held["0.0.order"]["data_offsets"][0]
    data[begin : begin + 4] = data[begin + 4 : begin + 8]
    refused(tmp_path, rewritten(saved, lambda header: None, bytes(data)), "must name every row of its chunk once")
