"""Reading: a safetensors file or a Hugging Face directory, all headers checked before a tensor is read."""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from converters.files import shards_of
from converters.files.safetensors import read_header
from tadrop_jax.errors import CheckpointError, checkpoint_errors

_CHUNK = 1 << 24


class TensorInfo(NamedTuple):
    """Where one tensor lies.

    Attributes:
        name: its name in the file.
        dtype: NumPy dtype (of `ml_dtypes` for bfloat16 and the 8-bit floats).
        shape: its shape.
        file: the file that holds it.
        offset: its first byte, counted from the beginning of the file.
        nbytes: its length in bytes.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class Source:
    """An open checkpoint. Files stay open until `close`; `read` may be called from many threads at once.

    Attributes:
        path: the path that the user gave.
        tensors: name -> TensorInfo, by file, then by offset.
        files: the files read.
        metadata: the files' `__metadata__` tables, joined.
        header_digest: SHA-256 over the files' names and headers: cheap, tells structures apart, not values.
        size_bytes: size of all files together.
    """

    def __init__(self, path: Path, files: Iterable[Path]):
        self.path = path
        self.tensors: Mapping[str, TensorInfo]
        self.metadata: dict[str, str] = {}
        self.size_bytes = 0
        self._fds: dict[Path, int] = {}
        tensors: dict[str, TensorInfo] = {}
        digest = hashlib.sha256()
        try:
            for file in files:
                self._fds[file] = _open(file)
                with checkpoint_errors():
                    size, head, entries, metadata = read_header(file)
                digest.update(file.name.encode() + b"\0" + head)
                self.size_bytes += size
                self.metadata.update(metadata)
                for name, entry in entries.items():
                    if name in tensors:
                        raise CheckpointError(f"tensor {name!r} is in both {tensors[name].file} and {file}.")
                    offset = len(head) + entry.begin
                    tensors[name] = TensorInfo(name, entry.dtype, entry.shape, file, offset, entry.nbytes)
        except BaseException:
            self.close()
            raise
        self.tensors = tensors
        self.files = tuple(self._fds)
        self.header_digest = digest.hexdigest()

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Reads entries `[start, stop)` of the row-major flattened tensor.

        Args:
            name: the tensor.
            start: first entry.
            stop: one past the last entry.
            out: a contiguous 1-D array of the tensor's dtype with at least `stop - start` entries to read
                into; when None, a new array, aligned to 64 bytes so that jax on CPU takes it without a copy.

        Returns:
            Shape `(stop - start,)`, the tensor's dtype; a view of `out` when given.

        Raises:
            CheckpointError: when the file ends early or cannot be read.
            IndexError: when the range lies outside the tensor.

        Example:
            >>> import tempfile, safetensors.numpy
            >>> file = tempfile.mkdtemp() + "/model.safetensors"
            >>> safetensors.numpy.save_file({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, file)
            >>> with open_source(file) as source:
            ...     source.read("w", 2, 5)
            array([2., 3., 4.], dtype=float32)
        """
        info = self.tensors[name]
        if not 0 <= start <= stop <= info.size:
            raise IndexError(f"entries {start}:{stop} of {name!r}, which has {info.size}.")
        count, itemsize = stop - start, info.dtype.itemsize
        if out is None:
            out = aligned_empty(count, info.dtype)
        elif out.dtype != info.dtype or out.ndim != 1 or out.size < count or not out.flags.c_contiguous:
            raise ValueError(f"out for {name!r} must be a contiguous 1-D {info.dtype} array of {count} or more.")
        out = out[:count]
        if not count:
            return out
        rest, offset = out.view(np.uint8).data, info.offset + start * itemsize
        try:
            while rest:
                got = os.preadv(self._fds[info.file], [rest], offset)
                if not got:
                    raise CheckpointError(
                        f"{info.file}: tensor {name!r}: the file ends at byte {offset}, {len(rest)} bytes short."
                    )
                rest, offset = rest[got:], offset + got
        except OSError as error:
            raise CheckpointError(f"{info.file}: tensor {name!r}: cannot be read: {error.strerror}.") from error
        return out

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names: new ones by old ones; those that are not listed keep theirs."""
        self.tensors = {(to := names.get(n, n)): info._replace(name=to) for n, info in self.tensors.items()}

    def full_digest(self) -> str:
        """SHA-256 over the contents of all files, in order; reads everything once."""
        digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
        for file, fd in self._fds.items():
            offset = 0
            try:
                while got := os.preadv(fd, [buffer], offset):
                    digest.update(memoryview(buffer)[:got])
                    offset += got
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}.") from error
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the files."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a checkpoint and checks all its headers.

    A directory is read as `transformers` does: `model.safetensors`, else the shards that its
    `*.safetensors.index.json` names; else every `*.safetensors` file in it.

    Args:
        path: a safetensors file, or a directory.

    Returns:
        The open source; a context manager.

    Raises:
        CheckpointError: when there is nothing to read, or something does not fit.
    """
    path = Path(path)
    if path.is_file():
        return Source(path, [path])
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such file or directory, and nothing is downloaded (`hf download` does that)."
        )
    if (path / "model.safetensors").is_file():
        return Source(path, [path / "model.safetensors"])
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{path}: more than one index: {', '.join(index.name for index in indices)}.")
    if indices:
        return _open_indexed(path, indices[0])
    files = sorted(path.glob("*.safetensors"))
    if files:
        return Source(path, files)
    raise CheckpointError(f"{path}: holds no safetensors file.")


def aligned_empty(count: int, dtype: np.dtype) -> np.ndarray:
    """An uninitialised 1-D array whose data begins at a multiple of 64 bytes."""
    raw = np.empty(count * dtype.itemsize + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + count * dtype.itemsize].view(dtype)


def _open_indexed(path: Path, index: Path) -> Source:
    with checkpoint_errors():
        weight_map = shards_of(path, index)
    source = Source(path, [path / shard for shard in sorted(set(weight_map.values()))])
    try:
        for name, shard in weight_map.items():
            if name not in source.tensors or source.tensors[name].file != path / shard:
                raise CheckpointError(f"{index}: puts tensor {name!r} into {shard}, which does not hold it.")
        for name, info in source.tensors.items():
            if name not in weight_map:
                raise CheckpointError(f"{info.file}: tensor {name!r} is not in {index.name}.")
    except BaseException:
        source.close()
        raise
    return source


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {error.strerror}.") from error
