"""safetensors: one file, or shards that an index names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.errors import ConversionError
from converters.files import header
from converters.files.mapped import mapped
from converters.leaves import Leaf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Header(NamedTuple):
    """The beginning of a file: its size in bytes, the header with its length prefix, tensors and metadata."""

    size: int
    head: bytes
    entries: dict[str, header.Entry]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Reads and checks the header of a file.

    Raises:
        ConversionError: the file is no safetensors file, truncated, or its header does not describe its bytes.
    """
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(9)
            if prefix.startswith(b"version "):
                raise ConversionError(f"{file}: is a Git LFS pointer, not the weights; `git lfs pull` brings them.")
            length = int.from_bytes(prefix[:8], "little")
            if len(prefix) < 8 or length > header.MAX_HEADER_BYTES or prefix[8:9] not in (b"{", b""):
                raise ConversionError(
                    f"{file}: is not a safetensors file ({size} bytes, a header of {length} bytes announced)."
                )
            if 8 + length > size:
                raise ConversionError(
                    f"{file}: the file is truncated: its header takes {8 + length} bytes, the file holds {size}."
                )
            stream.seek(0)
            head = stream.read(8 + length)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error
    entries, metadata = header.parse(head[8:], size - len(head), file)
    return Header(size, head, entries, metadata)


def read(file: Path) -> dict[str, Leaf]:
    """The tensors of one file.

    Raises:
        ConversionError: as `read_header`.
    """
    _, head, entries, _ = read_header(file)
    return {name: mapped(file, len(head) + e.begin, e.dtype, e.shape) for name, e in entries.items()}


def write(directory: Path, tensors: Mapping[str, Any], max_shard_size: int = 5_000_000_000) -> None:
    """Writes tensors one after another into `model.safetensors`, or into shards with an index.

    A single file has the bytes that the safetensors library writes.

    Args:
        directory: where to.
        tensors: arrays or leaves by name; each is read when its turn comes.
        max_shard_size: bytes of tensors in a shard.

    Raises:
        ConversionError: for a dtype that the format does not have.
    """
    sizes = {name: array.nbytes for name, array in tensors.items()}
    shards, where = split(sizes, max_shard_size), dict[str, str]()
    for number, names in enumerate(shards, 1):
        file = shard_name(number, len(shards))
        _write_file(directory / file, {name: tensors[name] for name in names})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (directory / INDEX).write_text(index(where, sum(sizes.values())))


def split(sizes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Names of tensors, in order, shard by shard; a tensor that is larger than a shard gets one of its own.

    Args:
        sizes: bytes of each tensor.
        max_shard_size: bytes of tensors in a shard.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in sizes.items():
        if shards[-1] and filled + nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def shard_name(number: int, count: int) -> str:
    """The file of shard `number`, from 1, of `count`, as transformers names it."""
    return SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def index(where: Mapping[str, str], size: int) -> str:
    """The contents of the index: each tensor's file, and the bytes of all tensors."""
    described = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(described, indent=2) + "\n"


def _write_file(file: Path, tensors: Mapping[str, Any]) -> None:
    order = list(header.DTYPES.values())
    ranks = {name: order.index(a.dtype) if a.dtype in order else -1 for name, a in tensors.items()}
    names = sorted(tensors, key=lambda name: (-ranks[name], name))
    plan = {name: (np.dtype(tensors[name].dtype), tuple(tensors[name].shape)) for name in names}
    head, _ = header.encode(plan, {"format": "pt"}, alignment=8)
    with open(file, "xb") as stream:
        stream.write(head)
        for name in names:
            stream.write(np.ascontiguousarray(np.asarray(tensors[name])).reshape(-1).view(np.uint8).data)
