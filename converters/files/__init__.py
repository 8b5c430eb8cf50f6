"""The file formats, one module a format. Nothing here knows of model families or of merging.

`open_tensors` gives what a file or a directory holds as leaves: nothing is read before it is asked for.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from converters.errors import ConversionError, few
from converters.files import header, msgpack, npz, orbax, safetensors, torch_pickle
from converters.leaves import Leaf

PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
# What training leaves beside a model: pickles, but not of its weights.
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
_ADAPTER = "adapter_model."  # how PEFT's files begin
FORMATS = ("safetensors", "orbax", "msgpack", "npz")


class Stored(NamedTuple):
    """A checkpoint on disk.

    Attributes:
        path: as it was given.
        format: "safetensors", "torch", "orbax", "msgpack" or "npz".
        tensors: leaves by the names that they have in the files; paths of trees are joined by '/'.
        files: what was opened; of an Orbax checkpoint all its files.
    """

    path: Path
    format: str
    tensors: dict[str, Leaf]
    files: tuple[Path, ...]

    @property
    def is_adapter(self) -> bool:
        """Whether it is what PEFT adds to a model, and no model: its files or its tensors are called so."""
        named = bool(self.files) and all(file.name.startswith(_ADAPTER) for file in self.files)
        return named or (bool(self.tensors) and all("lora_" in name for name in self.tensors))

    @property
    def why_no_model(self) -> str:
        """What is said of an adapter, and of a file that is one shard of several by an index beside it; else empty."""
        if self.is_adapter:
            return "is an adapter, no model: merge it into its base first (PEFT's merge_and_unload)"
        for index in [] if self.path.is_dir() else sorted(self.path.parent.glob("*.index.json")):
            with contextlib.suppress(ConversionError):  # it may be of other files, which are gone
                shards = set(shards_of(self.path.parent, index).values())
                if self.path.name in shards and len(shards) > 1:
                    return f"is one of {len(shards)} shards; give their directory, {self.path.parent}"
        return ""

    @property
    def is_tree(self) -> bool:
        """Whether the names are paths of a tree, not those of a PyTorch module."""
        return self.format in ("orbax", "msgpack") or any("/" in name for name in self.tensors)


def open_tensors(path: str | os.PathLike) -> Stored:
    """Opens a checkpoint: a file, or a directory with one, of any of the formats.

    A directory is searched as `transformers` searches: `model.safetensors`, or the shards that its index names; else
    any `*.safetensors` (but an adapter's beside a `pytorch_model.bin`); else `pytorch_model.bin`, or its shards; else
    `flax_model.msgpack`; else an Orbax checkpoint; else the only pickle or archive in it.

    Raises:
        ConversionError: there is nothing to read, several files of which one would have to be chosen, a shard is
            missing, a file is damaged, or a pickle holds code.

    Example:
        >>> import tempfile, safetensors.numpy
        >>> folder = tempfile.mkdtemp()
        >>> safetensors.numpy.save_file({"w": np.ones((2, 3))}, f"{folder}/model.safetensors")
        >>> stored = open_tensors(folder)
        >>> stored.format, stored.tensors["w"].shape
        ('safetensors', (2, 3))
    """
    path = Path(path)
    if path.is_file():
        return _from_files(path, [path])
    if not path.is_dir():
        raise ConversionError(
            f"{path}: no such file or directory, and nothing is downloaded (`hf download` does that)."
        )
    for single, pattern in (
        ("model.safetensors", "*.safetensors"),
        ("pytorch_model.bin", "pytorch_model*.bin"),
        ("flax_model.msgpack", "flax_model*.msgpack"),
    ):
        if (path / single).exists():
            return _from_files(path, [path / single])
        indices = sorted(path.glob(f"{pattern}.index.json"))
        if len(indices) > 1:
            raise ConversionError(f"{path}: more than one index: {', '.join(index.name for index in indices)}.")
        if indices:
            return _from_index(path, indices[0])
        if single == "model.safetensors" and (files := _any_safetensors(path)):
            return _from_files(path, files)
    tree = orbax.find(path)
    if tree is not None:
        files = tuple(sorted(file for file in tree.rglob("*") if file.is_file()))
        return Stored(path, "orbax", _named(orbax.read(tree)), files)
    files = [
        file
        for suffix in (*PICKLES, ".msgpack", ".npz")
        for file in sorted(path.glob(f"*{suffix}"))
        if not file.name.startswith(_NOT_WEIGHTS)
    ]
    if len(files) > 1:
        raise ConversionError(f"{path}: holds several checkpoints, name one: {', '.join(f.name for f in files)}.")
    if not files:
        kinds = "safetensors file, torch pickle, msgpack file, npz archive or Orbax checkpoint"
        raise ConversionError(f"{path}: holds no {kinds}.")
    return _from_files(path, files)


def _any_safetensors(path: Path) -> list[Path]:
    """The safetensors files of a directory without an adapter's beside a `pytorch_model.bin`."""
    files = sorted(path.glob("*.safetensors"))
    whole = any(path.glob("pytorch_model*.bin"))
    return [file for file in files if not (whole and file.name.startswith(_ADAPTER))]


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all tensors of a checkpoint; what lies in its files uncompressed is mapped into memory.

    Returns:
        Arrays by name, in the file's dtypes (bfloat16 by ml_dtypes); but for those of Orbax they are read-only.

    Raises:
        ConversionError: as `open_tensors`.
    """
    return {name: np.asarray(leaf) for name, leaf in open_tensors(path).tensors.items()}


def write_tensors(directory: Path, tensors: Mapping[str, Any], format: str, max_shard_size: int) -> None:
    """Writes arrays or leaves into a directory, leaf by leaf.

    Args:
        directory: it must exist.
        tensors: by name.
        format: one of `FORMATS`.
        max_shard_size: bytes of a safetensors file.

    Raises:
        ConversionError: for another format, or a tensor that it cannot hold.
    """
    if format == "safetensors":
        safetensors.write(directory, tensors, max_shard_size)
    elif format == "orbax":
        orbax.write(directory, tensors)
    elif format == "msgpack":
        msgpack.write(directory / "flax_model.msgpack", tensors)
    elif format == "npz":
        npz.write(directory / "model.npz", tensors)
    else:
        raise ConversionError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")


def _named(tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Paths without the leading `params` of Linen and the trailing `value` of NNX."""
    return {name.removeprefix("params/").removesuffix("/value"): leaf for name, leaf in tensors.items()}


def _from_files(path: Path, files: list[Path]) -> Stored:
    tensors: dict[str, Leaf] = {}
    where: dict[str, Path] = {}
    format = ""
    for file in files:
        format, read = _reader(file)
        for name, leaf in read(file).items():
            if name in tensors:
                raise ConversionError(f"tensor {name!r} is in both {where[name]} and {file}.")
            tensors[name], where[name] = leaf, file
    return Stored(path, format, _named(tensors) if format in ("msgpack", "npz") else tensors, tuple(files))


def _reader(file: Path) -> tuple[str, Callable[[Path], dict[str, Leaf]]]:
    """The format of a file, told by its first bytes; its name decides where these leave it open."""
    try:
        with open(file, "rb") as stream:
            first = stream.read(8)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error
    if first == b"version ":
        raise ConversionError(f"{file}: is a Git LFS pointer, not the weights; `git lfs pull` brings them.")
    if file.suffix == ".json":
        raise ConversionError(f"{file}: tells of tensors and holds none; give its directory, {file.parent}.")
    if file.suffix == ".npz":
        return "npz", npz.read
    # The first bytes of a safetensors file are a length in 64 bits, which may begin like a pickle, but ends in zeros.
    pickled = first[:4] == b"PK\x03\x04" or (first[:2] == b"\x80\x02" and any(first[4:]))
    if file.suffix in PICKLES or pickled:
        return "torch", torch_pickle.read
    if file.suffix == ".msgpack":
        return "msgpack", msgpack.read
    return "safetensors", safetensors.read


def shards_of(path: Path, index: Path) -> dict[str, str]:
    """The table of an index, tensor's name to file name, checked: every shard exists and lies in the directory.

    Raises:
        ConversionError: the index is damaged, or names a file that does not exist or lies elsewhere.
    """
    try:
        text = index.read_bytes()
    except OSError as error:
        raise ConversionError(f"{index}: cannot be read: {error.strerror}.") from error
    table = header.load_json(text, str(index))
    where = table.get("weight_map") if isinstance(table, dict) else None
    if not (isinstance(where, dict) and where and all(isinstance(shard, str) for shard in where.values())):
        raise ConversionError(f"{index}: has no weight_map from tensor names to file names.")
    for shard in sorted(set(where.values())):
        # By name only: snapshots in the Hugging Face cache are links that lead out of their directory.
        parts = PurePosixPath(shard).parts
        if not parts or ".." in parts or "\\" in shard or "\0" in shard or os.path.isabs(shard):
            raise ConversionError(f"{index}: names the shard {shard!r}, which lies outside {path}.")
        if not (path / shard).is_file():
            raise ConversionError(f"{index}: names the shard {shard!r}, which does not exist.")
    return where


def _from_index(path: Path, index: Path) -> Stored:
    where = shards_of(path, index)
    stored = _from_files(path, [path / shard for shard in sorted(set(where.values()))])
    names = {name.removeprefix("params/") for name in where} if stored.is_tree else set(where)
    if lost := sorted(names - stored.tensors.keys()):
        raise ConversionError(f"{index}: names tensors that its shards do not hold: {', '.join(few(lost))}.")
    if extra := sorted(stored.tensors.keys() - names):
        raise ConversionError(f"{index}: does not name tensors that its shards hold: {', '.join(few(extra))}.")
    return stored
