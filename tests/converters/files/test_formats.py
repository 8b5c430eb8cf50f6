"""safetensors, msgpack, npz and Orbax: there and back byte for byte, one tensor in memory, faults named."""

import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

from converters import ConversionError
from converters.files import msgpack, npz, open_tensors, write_tensors
from converters.files import safetensors as ours
from converters.leaves import Leaf
from tests.converters.files.torch_files import save_zip, state_dict

TENSORS = {
    "h/0/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "h/10/kernel": np.arange(12, dtype=np.float32).reshape(4, 3).T,
    "half": np.linspace(-2, 2, 5).astype(ml_dtypes.bfloat16),
    "scale": np.full((), 3, np.float32),
    "steps": np.arange(3, dtype=np.int32),
    "short": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
}
FORMATS = ["safetensors", "msgpack", "npz", "orbax"]


def read(path) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in open_tensors(path).tensors.items()}


def same(found, tensors=TENSORS) -> None:
    assert found.keys() == tensors.keys()
    for name, want in tensors.items():
        assert found[name].dtype == want.dtype, name
        assert found[name].shape == want.shape, name
        assert found[name].tobytes() == want.tobytes(), name


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(format, tmp_path):
    write_tensors(tmp_path, TENSORS, format, 5_000_000_000)
    stored = open_tensors(tmp_path)
    assert stored.format == format
    assert stored.is_tree
    same(read(tmp_path))


@pytest.mark.parametrize("format", FORMATS)
def test_one_tensor_is_held_at_a_time(format, tmp_path, monkeypatch):
    """Leaves count how many of their arrays are alive while the next one is read."""
    monkeypatch.setattr("converters.files.orbax.write.__defaults__", (1,))
    alive, most = [], []

    class Counted(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive.pop()

    def leaf(array):
        def load():
            alive.append(1)
            most.append(len(alive))
            fresh = np.ndarray.__new__(Counted, array.shape, array.dtype)
            fresh[...] = array
            return fresh

        return Leaf(array.shape, array.dtype, load)

    numbered = {f"w{i}": np.full((4, 4), i, np.float32) for i in range(6)}
    write_tensors(tmp_path, {name: leaf(array) for name, array in numbered.items()}, format, 5_000_000_000)
    assert max(most) <= 2
    same(read(tmp_path), numbered)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float64", "float8_e4m3fn", "bfloat16", "float32"])
def test_single_files_are_those_of_the_safetensors_library(dtype, tmp_path):
    names = {"b": dtype, "a": dtype, "z": "float32", "y": "bfloat16", "x": "int64", "w": "float16"}
    tensors = {n: np.ones((2, 3)).astype(getattr(ml_dtypes, d, d)) for n, d in names.items()}
    ours.write(tmp_path, tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards(tmp_path):
    ours.write(tmp_path, TENSORS, max_shard_size=60)
    assert len(list(tmp_path.glob("model-0000*-of-0000*.safetensors"))) == 3
    same(read(tmp_path))
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.unlink()
    with pytest.raises(
        ConversionError, match=r"index\.json: names the shard 'model-00002-of-00003\.safetensors', which"
    ):
        open_tensors(tmp_path)


def shards_of_pickles(tmp_path, change=lambda table: None) -> None:
    plain = {name.replace("/", "."): array for name, array in TENSORS.items() if array.dtype != np.int32}
    names = sorted(plain)
    table = {}
    for i in range(2):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        save_zip(tmp_path / file, state_dict({n: np.ascontiguousarray(plain[n]) for n in names[i::2]}))
        table |= dict.fromkeys(names[i::2], file)
    change(table)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(half="pytorch_model-00003-of-00002.bin"), "00003-of-00002.bin', which does not exist"),
        (lambda t: t.update(half="../x.bin"), "lies outside"),
        (
            lambda t: t.update(ghost="pytorch_model-00001-of-00002.bin"),
            "names tensors that its shards do not hold: ghost",
        ),
        (lambda t: t.pop("half"), "does not name tensors that its shards hold: half"),
        (lambda t: t.clear(), "no weight_map"),
    ],
)
def test_shards_of_pickles(change, message, tmp_path):
    shards_of_pickles(tmp_path)
    stored = open_tensors(tmp_path)
    assert stored.format == "torch"
    assert len(stored.tensors) == 5
    assert not stored.is_tree
    shards_of_pickles(tmp_path, change)
    with pytest.raises(ConversionError, match=message):
        open_tensors(tmp_path)


TREE = {
    "params": {"h": {"0": {"kernel": TENSORS["h/0/kernel"]}, "10": {"kernel": TENSORS["h/10/kernel"].copy()}}}
    | {name: TENSORS[name] for name in ("half", "scale", "steps", "short")}
}


def test_msgpack_is_that_of_flax(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(TREE))
    same(read(tmp_path))
    msgpack.write(tmp_path / "ours.msgpack", TENSORS)
    back = serialization.msgpack_restore((tmp_path / "ours.msgpack").read_bytes())
    np.testing.assert_array_equal(back["h"]["10"]["kernel"], TENSORS["h/10/kernel"])
    assert back["half"].dtype == ml_dtypes.bfloat16


def test_large_arrays_are_cut_as_flax_cuts_them(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 20)
    (tmp_path / "theirs.msgpack").write_bytes(serialization.to_bytes(TREE))
    same(read(tmp_path / "theirs.msgpack"))
    msgpack.write(tmp_path / "ours.msgpack", TENSORS, chunk_bytes=20)
    same(read(tmp_path / "ours.msgpack"))
    back = serialization.from_bytes(TREE["params"], (tmp_path / "ours.msgpack").read_bytes())
    np.testing.assert_array_equal(back["h"]["10"]["kernel"], TENSORS["h/10/kernel"])


def test_numpy_archives(tmp_path):
    np.savez(tmp_path / "plain.npz", **{"params/a/kernel": np.ones((2, 3)), "b": np.asfortranarray(np.eye(3))})
    np.savez_compressed(tmp_path / "packed.npz", **{"a/kernel": np.ones((2, 3)), "b": np.eye(3)})
    for name in ("plain", "packed"):
        same(read(tmp_path / f"{name}.npz"), {"a/kernel": np.ones((2, 3)), "b": np.eye(3)})
    npz.write(tmp_path / "ours.npz", TENSORS)
    with np.load(tmp_path / "ours.npz") as theirs:
        np.testing.assert_array_equal(theirs["h/10/kernel"], TENSORS["h/10/kernel"])
    np.savez(tmp_path / "code.npz", a=np.array([{}], object))
    with pytest.raises(ConversionError, match="Python objects"):
        open_tensors(tmp_path / "code.npz")


@pytest.mark.parametrize("how", ["PyTreeCheckpointer", "StandardCheckpointer", "v1", "manager", "no ocdbt"])
def test_orbax_checkpoints_of_all_kinds(how, tmp_path):
    import jax
    import orbax.checkpoint as ocp
    from orbax.checkpoint.experimental import v1

    path = tmp_path / "saved"
    tree = jax.tree.map(jax.numpy.asarray, TREE)
    if how == "v1":
        v1.save(str(path), tree)
    elif how == "manager":
        with ocp.CheckpointManager(path) as manager:
            manager.save(7, args=ocp.args.StandardSave(tree))
        path = path / "7"
    elif how == "no ocdbt":
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(path, tree)
    else:
        with getattr(ocp, how)() as checkpointer:
            checkpointer.save(path, tree)
    assert open_tensors(path).format == "orbax"
    same(read(path))


def test_orbax_opens_what_we_write(tmp_path):
    import orbax.checkpoint as ocp
    from orbax.checkpoint.experimental import v1

    (tmp_path / "config.json").write_text("{}")
    write_tensors(tmp_path, TENSORS, "orbax", 1)
    for restore in (ocp.StandardCheckpointer().restore, ocp.PyTreeCheckpointer().restore, lambda p: v1.load(str(p))):
        tree = restore(tmp_path)
        np.testing.assert_array_equal(tree["h"]["10"]["kernel"], TENSORS["h/10/kernel"])
        assert tree["half"].dtype == ml_dtypes.bfloat16
        assert tree["scale"].shape == ()


@pytest.mark.parametrize("cut", [0, 5, 40, -3])
@pytest.mark.parametrize("format", ["safetensors", "msgpack", "npz"])
def test_truncated_files(format, cut, tmp_path):
    write_tensors(tmp_path, TENSORS, format, 5_000_000_000)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ConversionError, match=file.name):
        read(tmp_path)


def test_large_tensors_lie_in_chunks(tmp_path, monkeypatch):
    """So that a process of many reads of a tensor what its devices hold."""
    from orbax.checkpoint.experimental import v1

    monkeypatch.setattr("converters.files.orbax._CHUNK_BYTES", 1 << 12)
    tensors = {"large": np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32), "small": np.ones(3)}
    write_tensors(tmp_path, tensors, "orbax", 1)
    same(read(tmp_path), tensors)
    found = v1.metadata(tmp_path).metadata
    assert np.prod(found["large"].storage_metadata.chunk_shape) * 4 <= 1 << 12
    assert found["small"].storage_metadata.chunk_shape == (3,)


def test_damaged_orbax(tmp_path):
    write_tensors(tmp_path, TENSORS, "orbax", 1)
    metadata = (tmp_path / "_METADATA").read_text()
    (tmp_path / "_METADATA").write_text(metadata.replace("half", "whole"))
    with pytest.raises(ConversionError, match="whole"):
        open_tensors(tmp_path)
    (tmp_path / "_METADATA").write_text(metadata[:50])
    with pytest.raises(ConversionError, match="no description"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no safetensors file, torch pickle"),
        ({"a.pth": b"", "b.pt": b""}, r"several checkpoints, name one: a\.pth, b\.pt"),
        ({"training_args.bin": b"", "optimizer.pt": b""}, "holds no safetensors file, torch pickle"),
        ({"model.safetensors": b"version https://git-lfs"}, "git lfs pull"),
        ({"pytorch_model.bin": b"version https://git-lfs"}, "git lfs pull"),
        ({"a.msgpack": b"\xc1"}, "no msgpack file"),
        ({"a.npz": b"PK"}, "truncated or damaged"),
    ],
)
def test_nothing_to_read(files, message, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConversionError, match=message):
        open_tensors(tmp_path)
    with pytest.raises(ConversionError, match="no such file"):
        open_tensors(tmp_path / "absent")


def test_bombs_in_msgpack(tmp_path):
    (tmp_path / "deep.msgpack").write_bytes(b"\x81\xa1a" * 5000 + b"\xc0")
    with pytest.raises(ConversionError, match="deeper"):
        open_tensors(tmp_path / "deep.msgpack")
    (tmp_path / "long.msgpack").write_bytes(b"\xdf\xff\xff\xff\xff")
    with pytest.raises(ConversionError, match="truncated"):
        open_tensors(tmp_path / "long.msgpack")


def test_compressed_entries_are_unpacked_when_they_are_asked_for(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.ones(4))
    leaf = open_tensors(tmp_path / "a.npz").tensors["a"]
    assert isinstance(leaf, Leaf)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.infolist()[0].compress_type == zipfile.ZIP_DEFLATED
    assert np.asarray(leaf).sum() == 4
