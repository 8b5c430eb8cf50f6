"""Files that were made to harm: they are refused by a ConversionError, whatever is in them, and nothing is run.

Pickles that name functions are in test_torch_pickle.py.
"""

import contextlib
import json
import random
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from converters import ConversionError
from converters.files import msgpack, open_tensors, orbax, write_tensors
from tests.converters.files.torch_files import save_legacy, save_zip, state_dict

TENSORS = {
    "a/w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a/h": np.arange(5).astype(ml_dtypes.bfloat16),
    "s": np.array(7, np.int64),
    "none": np.zeros((0, 3), np.float16),
}


def read(file) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in open_tensors(file).tensors.items()}


ORDERED = b"\x80\x02ccollections\nOrderedDict\n)R"
PICKLES = {
    "a place far away in a table": b"\x80\x02Nr\x00\x00\x00\x20.",
    "a far place as text": b"Np999999999\n.",
    "a mapping in itself": b"\x80\x02}q\x00U\x05modelh\x00s.",
    "other methods of a mapping": ORDERED + b"}U\x05itemsctorch._utils\n_rebuild_parameter\nsb.",
    "another method to look up": ORDERED + b"}U\x03getctorch._utils\n_rebuild_parameter\nsb.",
    "a reference as text": b"\x80\x02Pabc\n.",
    "a reference to a text": b"\x80\x02U\x03abcQ.",
    "a dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__reduce__\x93.",
    "a bytearray": b"\x80\x05\x96\xff\xff\x00\x00\x00\x00\x00\x00A.",
    "a buffer from elsewhere": b"\x80\x05\x97.",
    "a storage called by a tree": b"\x80\x02(U\x07storagectorch\nFloatStorage\nU\x01x\x85\x85U\x03cpuK\x01tQ.",
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles(what, tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("m/data.pkl", PICKLES[what])
        archive.writestr("m/data/x", b"AAAA")
    with pytest.raises(ConversionError, match=r"m\.pth"):
        read(tmp_path / "m.pth")


@pytest.mark.parametrize("program", [b"cos\nsystem\n}\x92.", b"\x80\x04cos\nsystem\nU\x01x\x85}\x92."])
def test_a_call_with_named_arguments(program, tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("m/data.pkl", program)
    with pytest.raises(ConversionError, match=r"holds code: it asks for os\.system"):
        read(tmp_path / "m.pth")


def test_storages_do_not_leave_the_archive(tmp_path):
    """A key is a name in the archive, whatever it looks like."""
    (tmp_path / "secret").write_bytes(b"AAAA")
    program = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x09../secretU\x03cpuK\x01tQ"
    )
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}U\x01w" + program[2:] + b"K\x00(t(t\x89NtRs.")
    with pytest.raises(ConversionError, match=r"storage '\.\./secret' is missing"):
        read(tmp_path / "m.pth")


def test_a_bomb_in_an_archive_is_unpacked_as_far_as_needed(tmp_path, monkeypatch):
    """A storage of a gigabyte of zeros packs into one megabyte; the tensor has four entries of it."""
    save_zip(tmp_path / "m.pth", state_dict({"w": np.zeros(4, np.float32)}), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        program = archive.read("archive/data.pkl")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", bytes(1 << 24))
    taken = []
    real = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: taken.append(n) or real(self, n))
    np.testing.assert_array_equal(read(tmp_path / "bomb.pth")["w"], np.zeros(4))
    assert taken[-1] == 16
    monkeypatch.setattr("converters.files.torch_pickle._MAX_PICKLE", 10)
    with pytest.raises(ConversionError, match="it is not of weights"):
        read(tmp_path / "bomb.pth")


def msgpack_array(file, dtype: bytes, shape: bytes, data: bytes):
    body = b"\x93" + shape + bytes([0xA0 | len(dtype)]) + dtype + b"\xc4" + bytes([len(data)]) + data
    file.write_bytes(b"\x81\xa1w\xc8" + struct.pack(">Hb", len(body), 1) + body)
    return file


def npz_array(file, head: str, version: bytes = b"\x01\x00"):
    data = head.encode() + b"\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY" + version + struct.pack("<H", len(data)) + data + b"A" * 8)
    return file


@pytest.mark.parametrize("dtype", ["O", "object", "i4,i4", "S8", "(2,)f4", "M8[s]", "datetime64", "1+", "void"])
def test_an_array_of_addresses_or_of_no_numbers_is_not_read(dtype, tmp_path):
    with pytest.raises(ConversionError, match=r"m\.msgpack"):
        read(msgpack_array(tmp_path / "m.msgpack", dtype.encode(), b"\x91\x01", b"A" * 8))
    with pytest.raises(ConversionError, match=r"m\.npz"):
        read(npz_array(tmp_path / "m.npz", f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': (1,)}}"))


@pytest.mark.parametrize(
    "head",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -8)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 1208925819614629174706176)}",
        "__import__('os').system('touch executed')",
        "{'descr': [('a', '<i4'), ('b', '<i4')], 'fortran_order': False, 'shape': (1,)}",
    ],
)
def test_heads_of_arrays(head, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for version in (b"\x01\x00", b"\x02\x00"):
        with pytest.raises(ConversionError, match=r"m\.npz"):
            read(npz_array(tmp_path / "m.npz", head, version))
    assert not (tmp_path / "executed").exists()


def test_shapes_that_no_array_has(tmp_path):
    with pytest.raises(ConversionError, match="no array of shape"):
        read(msgpack_array(tmp_path / "m.msgpack", b"uint8", b"\x92\xff\xf8", b"A" * 8))
    head = json.dumps({"w": {"dtype": "F32", "shape": [0, 1 << 80], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(ConversionError, match="no array of shape"):
        read(tmp_path / "m.safetensors")


def test_arrays_nested_in_arrays(tmp_path):
    nest = b"\x01"
    for _ in range(3000):
        nest = b"\xc9" + struct.pack(">Ib", len(nest), 1) + nest
    (tmp_path / "m.msgpack").write_bytes(b"\x81\xa1w" + nest)
    with pytest.raises(ConversionError, match="nested deeper"):
        read(tmp_path / "m.msgpack")


@pytest.mark.parametrize("key", [["../outside"], ["", "", "/outside"], ["", "", ""], [".."], ["a\0b"]])
def test_orbax_does_not_leave_its_directory(key, tmp_path):
    (tmp_path / "outside").mkdir()
    zarr = {"chunks": [1], "compressor": None, "dtype": "<f4", "fill_value": 7.0, "filters": None, "order": "C"}
    (tmp_path / "outside" / ".zarray").write_text(json.dumps(zarr | {"shape": [1], "zarr_format": 2}))
    (tmp_path / ".zarray").write_text(json.dumps(zarr | {"shape": [1], "zarr_format": 2}))
    entry = {"key_metadata": [{"key": part} for part in key], "value_metadata": {"value_type": "jax.Array"}}
    for ocdbt in (False, True):
        (tmp_path / "in").mkdir(exist_ok=True)
        described = {"use_ocdbt": ocdbt, "use_zarr3": False, "tree_metadata": {"x": entry}}
        (tmp_path / "in" / "_METADATA").write_text(json.dumps(described))
        with pytest.raises(ConversionError, match=r"in(/_METADATA)?: "):
            read(tmp_path / "in")


def test_orbax_below_a_directory_with_an_odd_name(tmp_path):
    folder = tmp_path / "we ird%41#x?"
    folder.mkdir()
    orbax.write(folder, {"a/b": np.ones(3, np.float32)})
    np.testing.assert_array_equal(read(folder)["a/b"], np.ones(3))


@pytest.mark.parametrize("shard", ["../m.safetensors", "a/../../m.safetensors", "/etc/passwd", "..", "", "."])
def test_an_index_does_not_leave_its_directory(shard, tmp_path):
    (tmp_path / "in").mkdir()
    write_tensors(tmp_path, TENSORS, "safetensors", 1 << 30)
    (tmp_path / "model.safetensors").rename(tmp_path / "m.safetensors")
    index = {"weight_map": dict.fromkeys(TENSORS, shard)}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / "in" / name).write_text(json.dumps(index))
        with pytest.raises(ConversionError, match=r"lies outside|does not exist"):
            read(tmp_path / "in")
        (tmp_path / "in" / name).unlink()


def write_all(folder) -> list:
    for format in ("safetensors", "msgpack", "npz"):
        write_tensors(folder, TENSORS, format, 1 << 30)
    msgpack.write(folder / "chunked.msgpack", TENSORS, chunk_bytes=16)
    np.savez_compressed(folder / "compressed.npz", **{n: a for n, a in TENSORS.items() if a.dtype.kind != "V"})
    save_zip(folder / "zip.pth", state_dict(TENSORS))
    save_zip(folder / "compressed.pth", state_dict(TENSORS), zipfile.ZIP_DEFLATED)
    save_legacy(folder / "legacy.pth", state_dict(TENSORS))
    return sorted(folder.iterdir())


def test_damaged_bytes_give_a_conversion_error_or_tensors(tmp_path):
    """Every format, bytes changed, lost and added at random: no other exception."""
    (tmp_path / "whole").mkdir()
    rng = random.Random(0)
    for file in write_all(tmp_path / "whole"):
        whole = file.read_bytes()
        for _ in range(120):
            data = bytearray(whole)
            for _ in range(rng.choice([1, 1, 2, 4])):
                at = rng.randrange(len(data))
                data[at : at + rng.choice([0, 1, 1, 1, 3])] = rng.choice(
                    [b"", b"\0", b"\x7f", b"\xff", rng.randbytes(1), rng.randbytes(1), rng.randbytes(3)]
                )
            damaged = tmp_path / f"damaged{file.suffix}"
            damaged.write_bytes(data)
            with contextlib.suppress(ConversionError):
                read(damaged)
