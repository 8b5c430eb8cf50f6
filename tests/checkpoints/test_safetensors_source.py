"""Reading safetensors: against the reference library, and every refusal on a real file."""

import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tadrop_jax.checkpoints.safetensors import open_source
from tadrop_jax.errors import CheckpointError

DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
DTYPES += ["float16", "bfloat16", "float32", "float64", "complex64"]
DTYPES += ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


def raw_file(path: Path, table: dict | bytes, data: bytes) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index."""
    weights = {f"layer.{i}": np.arange(i, i + 6, dtype=np.float32).reshape(2, 3) for i in range(4)}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        part = dict(list(weights.items())[2 * number : 2 * number + 2])
        safetensors.numpy.save_file(part, tmp_path / name)
    write_index(tmp_path, {f"layer.{i}": names[i // 2] for i in range(4)})
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 96}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_the_reference_library_writes(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    tensors = {"x": array, "first": np.frombuffer(b"abc", np.uint8)}
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "np"})
    with open_source(tmp_path / "m.safetensors") as source:
        info = source.tensors["x"]
        assert (info.dtype, info.shape, info.size, info.nbytes) == (dtype, shape, array.size, array.nbytes)
        assert source.read("x", 0, info.size).tobytes() == array.tobytes()
        assert source.read("first", 1, 3).tobytes() == b"bc"
        assert source.metadata == {"format": "np"}
        assert source.size_bytes == (tmp_path / "m.safetensors").stat().st_size


def test_order_is_by_file_then_offset(sharded):
    with open_source(sharded) as source:
        assert list(source.tensors) == [f"layer.{i}" for i in range(4)]
        assert [file.name for file in source.files] == sorted(p.name for p in sharded.glob("*.safetensors"))
        for i in range(4):
            np.testing.assert_array_equal(source.read(f"layer.{i}", 0, 6), np.arange(i, i + 6))


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_model.safetensors"])
def test_directory_of_one_file(tmp_path, name):
    safetensors.numpy.save_file({"w": np.ones(3, np.float32)}, tmp_path / name)
    with open_source(tmp_path) as source:
        assert source.path == tmp_path
        assert source.files == (tmp_path / name,)


def test_directory_of_many_files_without_an_index(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"v": np.ones(3, np.float32)}, tmp_path / "b.safetensors")
    with open_source(tmp_path) as source:
        assert list(source.tensors) == ["w", "v"]
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"'w' is in both .*a\.safetensors and .*c\.safetensors"):
        open_source(tmp_path)


def test_snapshot_of_links_into_blobs(sharded, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("cache") / "snapshot"
    snapshot.mkdir()
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(file)
    with open_source(snapshot) as source:
        assert len(source.tensors) == 4


@given(data=st.data())
def test_any_block_equals_the_slice(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "blocks.safetensors"
    array = np.arange(1000, dtype=np.float32).reshape(10, 100).astype(ml_dtypes.bfloat16)
    if not file.exists():
        safetensors.numpy.save_file({"x": array, "y": np.zeros(3, np.int8)}, file)
    start = data.draw(st.integers(0, 1000))
    stop = data.draw(st.integers(start, 1000))
    with open_source(file) as source:
        new = source.read("x", start, stop)
        out = np.zeros(1000, array.dtype)
        given_back = source.read("x", start, stop, out)
    np.testing.assert_array_equal(new, array.ravel()[start:stop])
    np.testing.assert_array_equal(given_back, new)
    assert given_back.base is out
    assert not out[stop - start :].any()
    assert new.ctypes.data % 64 == 0 or not new.size


def test_jax_takes_blocks_without_a_copy(tmp_path):
    jax = pytest.importorskip("jax")
    safetensors.numpy.save_file({"x": np.arange(4096, dtype=np.float32)}, tmp_path / "m.safetensors")
    with open_source(tmp_path) as source:
        block = source.read("x", 1, 4001)
    shared = jax.device_put(block, jax.devices("cpu")[0])
    assert shared.unsafe_buffer_pointer() == block.ctypes.data


def test_threads_share_a_source(tmp_path):
    array = np.arange(100_000, dtype=np.int32)
    safetensors.numpy.save_file({"x": array}, tmp_path / "m.safetensors")
    with open_source(tmp_path) as source, ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(lambda start: source.read("x", start, start + 100), range(0, 100_000, 100)))
    np.testing.assert_array_equal(np.concatenate(blocks), array)


@pytest.mark.parametrize("block", [(-1, 2), (2, 1), (0, 7)])
def test_a_block_outside_the_tensor_is_an_index_error(sharded, block):
    with open_source(sharded) as source, pytest.raises(IndexError, match=r"layer\.0"):
        source.read("layer.0", *block)


@pytest.mark.parametrize("out", [np.zeros(5, np.float32), np.zeros(6), np.zeros(12, np.float32)[::2]])
def test_an_unsuitable_out_is_refused(sharded, out):
    with open_source(sharded) as source, pytest.raises(ValueError, match="contiguous"):
        source.read("layer.0", 0, 6, out)


def test_digests(tmp_path):
    for name, value in {"a": 1.0, "b": 2.0}.items():
        (tmp_path / name).mkdir()
        array = np.full(4, value, np.float32)
        safetensors.numpy.save_file({"w": array}, tmp_path / name / "model.safetensors")
    with open_source(tmp_path / "a") as a, open_source(tmp_path / "b") as b:
        assert a.header_digest == b.header_digest
        assert a.full_digest() != b.full_digest()
        assert a.full_digest() == a.full_digest()


DAMAGED = {
    "gap": (
        {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},
        12,
        r"'b' leaves a gap after tensor 'a'.* 8 .* 4",
    ),
    "gap at the start": ({"a": entry(4, 8, [1])}, 8, r"'a' leaves a gap after the header"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, r"'b' overlaps tensor 'a'.* 4 .* 8"),
    "same bytes": ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, 4, r"'b' overlaps tensor 'a'"),
    "truncated": ({"a": entry(0, 16, [4])}, 12, r"truncated: .* 16 bytes of tensors, the file holds 12"),
    "trailing bytes": ({"a": entry(0, 4, [1])}, 9, r"5 bytes belong to no tensor"),
    "span": ({"a": entry(0, 12, [4])}, 12, r"'a': .* span 12 bytes, but shape \[4\] of F32 takes 16"),
    "huge shape": ({"a": entry(0, 4, [2**62, 4])}, 4, r"'a': .* span 4 bytes"),
    "backwards": ({"a": entry(4, 0, [1])}, 4, r"'a' has data_offsets \[4, 0\]"),
    "negative offset": ({"a": entry(-4, 0, [1])}, 4, r"'a' has data_offsets \[-4, 0\]"),
    "one offset": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        4,
        r"'a' has data_offsets \[0\]",
    ),
    "negative shape": ({"a": entry(0, 4, [-1])}, 4, r"'a' has shape \[-1\]"),
    "fraction": ({"a": entry(0, 4, [1.0])}, 4, r"'a' has shape \[1.0\]"),
    "boolean": ({"a": entry(0, 4, [True])}, 4, r"'a' has shape \[True\]"),
    "dtype": ({"a": entry(0, 4, [1], "F31")}, 4, r"'a' has dtype 'F31'"),
    "dtype of half bytes": ({"a": entry(0, 4, [8], "F4")}, 4, r"'a' has dtype 'F4'"),
    "dtype no string": ({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, 4, r"'a' has dtype \[\]"),
    "field": ({"a": {"dtype": "F32", "shape": [1]}}, 4, r"'a': its header lacks"),
    "not a table": ({"a": 3}, 4, r"'a': its header lacks"),
    "metadata": ({"__metadata__": {"a": 3}}, 0, r"__metadata__ .* not a table of strings"),
    "twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', 0, r"names 'a' twice"),
    "not JSON": (b'{"a":', 0, r"not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', 0, r"not valid JSON"),
    "deep": (b'{"a":' + b"[" * 200_000, 0, r"not valid JSON"),
    "not a header": (b"[1, 2, 3]", 0, r"not a safetensors file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused(tmp_path, case):
    table, size, message = DAMAGED[case]
    file = raw_file(tmp_path / "model.safetensors", table, bytes(size))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(file)
    assert str(file) in str(caught.value)


NOT_SAFETENSORS = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x10\0\0", "not a safetensors file"),
    "text": (b"hello, this is a text file", "not a safetensors file"),
    "announces 1 TB": (struct.pack("<Q", 1 << 40) + b"{}", "not a safetensors file"),
    "cut in the header": (struct.pack("<Q", 200) + b'{"a":', r"truncated: its header takes 208 bytes, .* 13"),
    "pickle": (b"\x80\x02}q\x00.", "not a safetensors file"),
    "zip": (b"PK\x03\x04" + bytes(30), "not a safetensors file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("case", NOT_SAFETENSORS)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, case):
    contents, message = NOT_SAFETENSORS[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(tmp_path)
    assert str(file) in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="absent: no such file"):
        open_source(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        open_source(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read(sharded):
    shard = next(sharded.glob("*1-of*"))
    shard.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
        open_source(sharded)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GOOD = {f"layer.{i}": (FIRST, SECOND)[i // 2] for i in range(4)}
INDICES = {
    "absent shard": ({**GOOD, "x": "model-3.safetensors"}, r"'model-3\.safetensors', which does not exist"),
    "absent tensor": ({**GOOD, "x": FIRST}, r"puts tensor 'x' into model-00001"),
    "other shard": ({**GOOD, "layer.0": SECOND}, r"puts tensor 'layer\.0' into model-00002"),
    "unlisted tensor": (
        {k: v for k, v in GOOD.items() if k != "layer.3"},
        r"'layer\.3' is not in model\.saf",
    ),
    "parent": ({**GOOD, "x": "../x.safetensors"}, r"'\.\./x\.safetensors', which lies outside"),
    "hidden parent": ({**GOOD, "x": "a/../../x.safetensors"}, r"which lies outside"),
    "absolute": ({**GOOD, "x": "/etc/x.safetensors"}, r"'/etc/x\.safetensors', which lies outside"),
    "empty name": ({**GOOD, "x": ""}, r"'', which lies outside"),
    "no table": ([FIRST], r"has no weight_map"),
    "no names": ({"x": 3}, r"has no weight_map"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_does_not_fit_is_refused(sharded, case):
    weight_map, message = INDICES[case]
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(sharded)
    assert str(sharded) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map":{"a":"x","a":"y"}}', "names 'a' twice"),
    ],
)
def test_an_index_that_is_damaged_is_refused(sharded, text, message):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_source(sharded)


def test_two_indices_are_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    shutil.copy(index, sharded / "other.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"more than one index: model\..*, other\."):
        open_source(sharded)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": np.ones(1000, np.float32)}, file)
    with open_source(file) as source:
        os.truncate(file, file.stat().st_size - 400)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'w': the file ends .* 400 bytes"):
            source.read("w", 500, 1000)


def test_a_refused_source_leaves_no_file_open(sharded):
    write_index(sharded, {**GOOD, "x": FIRST})
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(CheckpointError):
        open_source(sharded)
    assert len(os.listdir("/dev/fd")) == before
