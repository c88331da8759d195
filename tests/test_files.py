"""Files of a user's own: what is read back is what was written, and what cannot be trusted is refused in one line."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from opoch_xp.files import load_qkv


def arrays(dtype="float32"):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((2, 5, 4)).astype(dtype) for name in "qkv"}


def write(path, held):
    if path.suffix == ".npz":
        np.savez(path, **held)
    else:
        safetensors.numpy.save_file(held, path)
    return path


@pytest.fixture(params=[".npz", ".safetensors"])
def path(request, tmp_path):
    return tmp_path / f"heads{request.param}"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_reads_what_was_written(path, dtype):
    held = arrays(dtype)
    for name, array in zip("qkv", load_qkv(write(path, held | {"other": np.arange(3)})), strict=True):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, held[name])


def test_reads_compressed_fortran_and_foreign_byte_order(tmp_path):
    held = arrays()
    path = tmp_path / "heads.npz"
    np.savez_compressed(path, q=np.asfortranarray(held["q"]), k=held["k"].astype(">f4"), v=held["v"].astype(">f4"))
    for name, array in zip("qkv", load_qkv(path), strict=True):
        assert array.dtype.isnative
        np.testing.assert_array_equal(array, held[name])


def test_bfloat16_is_widened_to_float32(tmp_path):
    bits = np.arange(0x3F00, 0x3F00 + 12, dtype=np.uint16).reshape(3, 4)
    entries = {
        name: {"dtype": "BF16", "shape": [3, 4], "data_offsets": [24 * i, 24 * i + 24]} for i, name in enumerate("qkv")
    }
    path = _safetensors(tmp_path, entries, bits.tobytes() * 3)
    q, _, v = load_qkv(path)
    assert q.dtype == np.float32
    np.testing.assert_array_equal(q.view(np.uint32), bits.astype(np.uint32) << 16)
    np.testing.assert_array_equal(q, v)


def _safetensors(folder, header, data):
    text = json.dumps(header).encode()
    path = folder / "made.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_qkv(path)


@pytest.mark.parametrize("name", ["heads.pt", "heads"])
def test_unknown_ending(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a file ending in \.npz or \.safetensors"):
        load_qkv(tmp_path / name)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.99])
def test_truncated(path, share):
    whole = write(path, arrays()).read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="truncated|the file holds"):
        load_qkv(path)


def test_damaged_contents(tmp_path):
    path = tmp_path / "heads.npz"
    np.savez_compressed(path, **arrays())
    whole = bytearray(path.read_bytes())
    place = whole.index(b"q.npy") + 60
    whole[place : place + 40] = bytes(40)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="damaged|no array of NumPy"):
        load_qkv(path)


def test_other_names_are_listed(path):
    write(path, {"query": np.ones(3), "k": np.ones(3)})
    with pytest.raises(ValueError, match="q, v missing, the file holds k, query"):
        load_qkv(path)


def test_integers_are_refused(path):
    write(path, arrays() | {"k": np.ones((2, 5, 4), np.int32)})
    with pytest.raises(ValueError, match=r"k must be .*(int32|I32)"):
        load_qkv(path)


def test_mixed_dtypes_are_refused(path):
    write(path, arrays() | {"v": np.ones((2, 5, 4), np.float64)})
    with pytest.raises(ValueError, match="one dtype, got q: float32, k: float32, v: float64"):
        load_qkv(path)


def test_pickles_are_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    path = write(tmp_path / "heads.npz", arrays() | {"k": np.array([Trap()], dtype=object)})
    with pytest.raises(ValueError, match="k holds pickled Python objects"):
        load_qkv(path)


def test_a_size_that_is_not_there_is_refused_before_it_is_allocated(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)})
    path = tmp_path / "heads.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in "qkv":
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(16))
    with pytest.raises(ValueError, match="needs .* bytes, the file holds 16"):
        load_qkv(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}, "the file holds 16"),
        ({"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}, "needs 20 bytes, the file holds 16"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}, "whole numbers"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}, "the file holds 8"),
        ({"dtype": "F32", "shape": [4]}, "header"),
        ("F32", "header"),
    ],
)
def test_safetensors_headers_that_lie(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        load_qkv(_safetensors(tmp_path, dict.fromkeys("qkv", entry), bytes(16)))


@pytest.mark.parametrize("header", [[], 3, "q"])
def test_safetensors_headers_of_another_kind(tmp_path, header):
    with pytest.raises(ValueError, match="header|missing"):
        load_qkv(_safetensors(tmp_path, header, bytes(16)))


def test_names_and_dtypes_are_shown_without_what_a_terminal_obeys(tmp_path):
    many = {f"layer.{i}.\x1b[2J": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(3000)}
    with pytest.raises(ValueError, match="q, k, v missing") as error:
        load_qkv(_safetensors(tmp_path, many, b""))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    assert str(error.value).endswith("and 2,992 more")
    with pytest.raises(ValueError, match="q must be") as error:
        load_qkv(_safetensors(tmp_path, {n: {**many["layer.0.\x1b[2J"], "dtype": "\x1b[2J" * 99} for n in "qkv"}, b""))
    assert str(error.value).isprintable()
    np.savez(tmp_path / "heads.npz", **{"\x1b]0;title\x07": np.ones(3)})
    with pytest.raises(ValueError, match="missing") as error:
        load_qkv(tmp_path / "heads.npz")
    assert str(error.value).isprintable()


def test_what_is_no_file_is_told(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name, words in (("folder", "a folder, not a file"), ("pipe", "a pipe or a device, not a file")):
        with pytest.raises(FileNotFoundError, match=words):
            load_qkv(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("place", range(0, 22))
@pytest.mark.parametrize("bit", [0, 5, 7])
def test_damage_anywhere_in_an_archive_names_the_file(tmp_path, place, bit):
    """A bit of each byte of the first header and of the first entry of the directory: whatever zipfile says of it."""
    path = write(tmp_path / "heads.npz", arrays())
    whole = path.read_bytes()
    for start in (0, whole.index(b"PK\x01\x02"), whole.index(b"PK\x05\x06")):
        damaged = bytearray(whole)
        damaged[start + place] ^= 1 << bit
        path.write_bytes(damaged)
        told = ""
        try:
            load_qkv(path)
        except ValueError as error:
            told = str(error)
        assert not told or str(path) in told


@pytest.mark.parametrize("header", ["{'descr': (", "{[]: 1}", "{1: 2, 'a': 3}", "  x", "{'descr': '<f4'}", "3", ""])
def test_headers_that_are_made_up_name_the_file(tmp_path, header):
    path = tmp_path / "heads.npz"
    text = header.encode("latin1")
    with zipfile.ZipFile(path, "w") as archive:
        for name in "qkv":
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8))
    with pytest.raises(ValueError, match="damaged") as error:
        load_qkv(path)
    assert str(path) in str(error.value)


def test_archives_compressed_as_numpy_never_does(tmp_path):
    path = tmp_path / "heads.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays().items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
    with pytest.raises(ValueError, match="q is compressed as NumPy never does"):
        load_qkv(path)


def test_a_small_archive_that_asks_for_much(tmp_path):
    """Zeros compress a thousandfold and no more: what is claimed beyond that is not there."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 27,)})
    path = tmp_path / "heads.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "qkv":
            archive.writestr(f"{name}.npy", header.getvalue())
    whole = bytearray(path.read_bytes())
    size = len(header.getvalue())
    at = whole.index(b"PK\x01\x02")
    while at >= 0:  # the directory's sizes are those that are believed
        assert int.from_bytes(whole[at + 24 : at + 28], "little") == size
        whole[at + 24 : at + 28] = (size + (1 << 30)).to_bytes(4, "little")
        at = whole.find(b"PK\x01\x02", at + 4)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="needs 1,073,741,824 bytes, the file holds"):
        load_qkv(path)


def test_zeros_that_were_compressed_are_read(tmp_path):
    path = tmp_path / "heads.npz"
    np.savez_compressed(path, **{name: np.zeros((1, 4096, 64), np.float32) for name in "qkv"})
    assert all(not array.any() for array in load_qkv(path))
