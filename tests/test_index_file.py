"""Files of an index: what was saved comes back; whatever is done to a file, it is refused whole."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from test_index import lists, made, normal

import opoch_xp as ox
from opoch_xp import index_file, tensors

pytestmark = pytest.mark.dynamic_shapes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "index.safetensors"
    index = ox.LSHIndex(5, bits=7, tables=3, probes=2, metric="inner", seed=3, max_candidates=40)
    index.add(normal(0, 20, 5), np.arange(20) * 3)
    index.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("bits", [0, 7, 20, 40])
@pytest.mark.parametrize("mmap", [False, True])
def test_what_was_saved_comes_back(backend: Backend, tmp_path: Path, bits: int, mmap: bool) -> None:
    path, x = tmp_path / "index.safetensors", normal(0, 90, 5)
    index = made(backend, x, np.arange(90)[::-1] * 7, bits=bits, tables=3, metric="euclidean", seed=4)
    index.remove([7, 14])
    index.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    q = backend.array(normal(1, 12, 5))
    like = None if backend.option in ("numpy", "generic") else q
    if mmap and like is not None:
        with pytest.raises(ValueError, match="choose one"):
            ox.LSHIndex.load(path, mmap=mmap, like=like)
        return
    loaded = ox.LSHIndex.load(path, mmap=mmap, like=like, backend=backend.name)
    assert loaded.settings == index.settings
    assert lists(backend, loaded.candidates(q)) == lists(backend, index.candidates(q))
    assert backend.numpy(loaded.search(q, 4).ids).tolist() == backend.numpy(index.search(q, 4).ids).tolist()
    assert backend.numpy(loaded.add(backend.array(x[:1]))).tolist() == [7 * 89 + 1]


def test_a_pickle_and_a_copy_are_the_index(backend: Backend) -> None:
    if backend.option == "strict":
        pytest.skip("arrays of the library cannot be pickled")
    x, q = normal(0, 90, 5), backend.array(normal(1, 12, 5))
    index = made(backend, x, np.arange(90)[::-1] * 7, bits=7, tables=3, metric="euclidean", seed=4)
    for make in (copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))):
        other = make(index)
        assert other.settings == index.settings
        assert lists(backend, other.candidates(q)) == lists(backend, index.candidates(q))
        assert type(other.vectors) is type(index.vectors)
        other.remove([7])
        assert len(other) == len(index) - 1
        empty = make(ox.LSHIndex(5, bits=3))
        assert (len(empty), empty.settings) == (0, ox.LSHIndex(5, bits=3).settings)


def test_a_mapped_index_stays_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    made_of = ox.LSHIndex(5)
    made_of.add(normal(0, 30, 5))
    made_of.save(path)
    loaded = ox.LSHIndex.load(path, mmap=True)
    assert isinstance(loaded.vectors, np.memmap)
    assert not loaded.vectors.flags.writeable
    assert loaded.vectors.ctypes.data % tensors.ALIGN == 0


def test_the_file_is_what_the_formats_own_library_reads(tmp_path: Path, saved: bytes) -> None:
    path = tmp_path / "index.safetensors"
    path.write_bytes(saved)
    held = safetensors.numpy.load_file(path)
    assert {name: array.shape for name, array in held.items()} == {
        "x": (20, 5), "ids": (20,), "codes": (3, 20), "order": (3, 20),
    }  # fmt: skip
    np.testing.assert_array_equal(held["x"], normal(0, 20, 5))


def test_empty_but_once_filled(tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    index = ox.LSHIndex(5)
    with pytest.raises(ValueError, match="nothing was added"):
        index.save(path)
    index.remove(index.add(normal(0, 2, 5)))
    index.save(path)
    for mmap in (False, True):
        loaded = ox.LSHIndex.load(path, mmap=mmap)
        assert len(loaded) == 0
        assert loaded.search(normal(0, 1, 5), 1).ids.tolist() == [[-1]]
        assert loaded.add(normal(0, 1, 5)).tolist() == [2]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, saved: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.safetensors"
    path.write_bytes(saved)
    fill_disk(monkeypatch)
    index = ox.LSHIndex(5)
    index.add(normal(0, 4, 5))
    with pytest.raises(OSError, match="no space left"):
        index.save(path)
    assert path.read_bytes() == saved
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="expected a name ending in .safetensors, got '.npz'"):
        index.save(tmp_path / "index.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        ox.LSHIndex.load(tmp_path / "other.safetensors")


def test_a_file_that_is_replaced_while_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is used, whatever stands under the name by then."""
    path, mapped = tmp_path / "index.safetensors", tensors.mapped
    first, second = ox.LSHIndex(5), ox.LSHIndex(5)
    first.add(normal(0, 20, 5))
    second.add(normal(1, 30, 5))
    first.save(path)

    def replaced(file: Any, entry: tensors.Entry) -> np.ndarray:
        second.save(path)
        return mapped(file, entry)

    monkeypatch.setattr(tensors, "mapped", replaced)
    loaded = ox.LSHIndex.load(path, mmap=True)
    np.testing.assert_array_equal(loaded.vectors, first.vectors)


def test_threads_that_save_to_one_name_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    indexes = [ox.LSHIndex(5, seed=seed) for seed in range(4)]
    for seed, index in enumerate(indexes):
        index.add(normal(seed, 20 + seed, 5))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            list(pool.map(lambda index: index.save(path), indexes))
            assert len(ox.LSHIndex.load(path)) in (20, 21, 22, 23)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def refused(folder: Path, contents: bytes, words: str | None = None) -> None:
    hostile.refused(folder, contents, words, ox.LSHIndex.load, partial(ox.LSHIndex.load, mmap=True))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_any_flipped_bit_and_any_truncation_is_refused(tmp_path: Path, saved: bytes, data: st.DataObject) -> None:
    refused(tmp_path, damaged(data, saved))


def test_every_flipped_bit_of_the_header_is_refused(tmp_path: Path, saved: bytes) -> None:
    for contents in damaged_headers(saved):
        refused(tmp_path, contents)


def test_the_checksum_can_be_made_right(tmp_path: Path, saved: bytes) -> None:
    """Or the tests below would show nothing."""
    path = tmp_path / "same.safetensors"
    path.write_bytes(rewritten(saved, lambda header: None))
    assert len(ox.LSHIndex.load(path)) == 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (metadata(version="2"), "written in version 2 of the format; this opoch_xp reads version 1"),
        (metadata(format="other"), "no index: its format is 'other'"),
        (lambda header: header.update(__metadata__={"checksum": "0"}), "no index: its format is None"),
        (metadata(settings="[]"), "settings cannot be used"),
        (metadata(settings="{"), "settings cannot be used"),
        (with_settings(other=1), "settings cannot be used"),
        (with_settings(next_id="x"), "next_id must be a whole number"),
        (with_settings(dim=6), r"x has shape \(20, 5\), expected \(20, 6\)"),
        (with_settings(tables=10**12), "expected"),
        (with_settings(tables=10**9, dim=10**9), "expected"),
        (with_settings(bits=6), "codes of table 0 do not ascend from 0 to 63"),
        (with_settings(bits=10**15), "bits must be a whole number from 0 to 62"),
        (with_settings(bits="many"), "bits must be a whole number from 0 to 62"),
        (with_settings(metric="dot"), "metric must be one of"),
        (with_settings(probes=0), "probes must be"),
        (with_settings(next_id=4), "ids must differ and be from 0 to 3"),
        (entry("x", shape=[1 << 40, 5]), "needs .* bytes, the file holds"),
        (entry("x", shape=[-20, -5]), "must be whole numbers from 0 to 2\\*\\*63"),
        (entry("x", shape=[True, 100]), "must be whole numbers from 0 to 2\\*\\*63"),
        (entry("x", dtype="F16", shape=[20, 10]), "x must be F32 or F64, got F16"),
        (entry("x", dtype="I32"), "x must be F32 or F64, got I32"),
        (entry("ids", shape=[4, 5]), "ids has shape"),
        (entry("order", data_offsets=[0, 1 << 62]), "the file holds"),
        (entry("order", data_offsets=[0]), "header is not that"),
        (lambda header: header.pop("codes"), "no index: codes missing"),
        (lambda header: header.update(codes=3), "header is not that"),
        (entry("order", data_offsets=[0, 240]), "order of table"),  # the vectors, read as places
    ],
)
def test_hostile_headers(tmp_path: Path, saved: bytes, change: Any, words: str) -> None:
    refused(tmp_path, rewritten(saved, change), words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", np.inf, "x must be finite"),
        ("ids", 3, "ids must differ"),
        ("ids", -1, "ids must differ and be from 0"),
        ("order", 20, "names vectors that are not there"),
        ("order", -1, "names vectors that are not there"),
        ("codes", 9999, "do not ascend"),
    ],
)
def test_contents_that_were_written_wrong(tmp_path: Path, name: str, value: float, words: str) -> None:
    index = ox.LSHIndex(5, bits=7, tables=3)
    index.add(normal(0, 20, 5), np.arange(20) * 3)
    tables = index._contents.tables
    held = {"x": index.vectors, "ids": index.ids, "codes": tables.codes, "order": tables.order}
    held = {key: array.copy() for key, array in held.items()}
    held[name].reshape(-1)[5] = value
    path = tmp_path / "bad.safetensors"
    index_file.write(path, index.settings, 60, held)
    with pytest.raises(ValueError, match=words):
        ox.LSHIndex.load(path)


def test_a_table_that_lacks_a_vector(tmp_path: Path) -> None:
    index = ox.LSHIndex(5, bits=7, tables=3)
    index.add(normal(0, 20, 5))
    tables = index._contents.tables
    order = tables.order.copy()
    order[1, 3] = order[1, 4]
    held = {"x": index.vectors, "ids": index.ids, "codes": tables.codes, "order": order}
    index_file.write(tmp_path / "bad.safetensors", index.settings, 20, held)
    with pytest.raises(ValueError, match="order of table 1 lacks vectors"):
        ox.LSHIndex.load(tmp_path / "bad.safetensors")
