"""Flax's msgpack files (`flax.serialization.to_bytes`, `flax_model.msgpack`): nested maps with arrays as leaves.

An array is an extension of type 1 that holds, as msgpack again, its shape, the name of its dtype and its bytes; one of
more than 2^30 bytes is cut into chunks. Only the small parts are parsed; the bytes of arrays stay in the file.
"""

import mmap
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from converters.errors import ConversionError
from converters.files.mapped import mapped
from converters.leaves import Leaf, join

_CHUNK_BYTES = 1 << 30
_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY = 1
_SCALARS = {  # first byte: struct format of a number
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
    0xD3: ">q",
}  # fmt: skip
_SIZED = {  # first byte: kind, and bytes of its length
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4), 0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2),
    0xDF: ("map", 4),
}  # fmt: skip
_MAX_DEPTH = 64


class _Bytes(NamedTuple):
    """A run of bytes in the file."""

    begin: int
    size: int


class _Parser:
    """Reads msgpack from a mapping, and remembers where its position is."""

    def __init__(self, data: mmap.mmap, file: Path):
        self.data, self.file, self.at, self.depth = data, file, 0, 0

    def take(self, count: int) -> int:
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ConversionError(f"{self.file}: the file is truncated: it ends at byte {len(self.data)}.")
        return begin

    def number(self, form: str) -> Any:
        size = struct.calcsize(form)
        begin = self.take(size)
        return struct.unpack(form, self.data[begin : begin + size])[0]

    def value(self) -> Any:
        first = self.number(">B")
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 0x100
        if first <= 0xBF:
            kind, size = ("map", first & 15) if first <= 0x8F else ("array", first & 15)
            return self.sized("str", first & 31) if first >= 0xA0 else self.sized(kind, size)
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if first in _SCALARS:
            return self.number(_SCALARS[first])
        if 0xD4 <= first <= 0xD8:
            return self.sized("ext", 1 << (first - 0xD4))
        if first not in _SIZED:
            raise ConversionError(f"{self.file}: is no msgpack file, or is damaged (byte {self.at - 1}).")
        kind, width = _SIZED[first]
        return self.sized(kind, self.number({1: ">B", 2: ">H", 4: ">I"}[width]))

    def sized(self, kind: str, size: int) -> Any:
        if kind == "bin":
            return _Bytes(self.take(size), size)
        if kind == "str":
            begin = self.take(size)
            return self.data[begin : begin + size].decode("utf-8", "surrogateescape")
        if kind == "ext":
            code, begin = self.number(">b"), self.take(size)
            return self.array(begin) if code == _NDARRAY else None  # scalars and complex numbers are no parameters
        return self.nested(lambda: [self.value() for _ in range(size)] if kind == "array" else self.table(size))

    def nested(self, read: Callable[[], Any]) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ConversionError(f"{self.file}: is nested deeper than {_MAX_DEPTH} levels.")
        made = read()
        self.depth -= 1
        return made

    def table(self, size: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for _ in range(size):
            key = self.value()
            made[str(key)] = self.value()
        return made

    def array(self, begin: int) -> Leaf:
        end, self.at = self.at, begin
        shape, name, data = self.nested(self.value)
        self.at = end
        if isinstance(name, _Bytes):
            name = self.data[name.begin : name.begin + name.size].decode()
        if not re.fullmatch(r"[a-z0-9_]+|V2", name):  # numpy would parse what is no name
            raise ValueError(f"an array has dtype {name!r}")
        dtype = np.dtype("bfloat16" if name == "V2" else name)
        leaf = mapped(self.file, data.begin, dtype, shape)
        if leaf.nbytes != data.size:
            raise ConversionError(f"{self.file}: an array of {leaf.nbytes} bytes is stored in {data.size}.")
        return leaf


def read(file: Path) -> dict[str, Leaf]:
    """The arrays of a file, by their '/'-joined paths.

    Raises:
        ConversionError: the file is truncated or damaged, or holds no tree.
    """
    try:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            parser = _Parser(data, file)
            tree = parser.value()
            if parser.at != len(data):
                raise ConversionError(f"{file}: {len(data) - parser.at} bytes follow its tree.")
        found = _flat(tree, "") if isinstance(tree, dict) else None
    except ConversionError:
        raise
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConversionError(f"{file}: is no msgpack file of Flax, or is damaged: {error}.") from None
    if found is None:
        raise ConversionError(f"{file}: holds no tree of parameters.")
    return found


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    for key, value in tree.items():
        if isinstance(value, Leaf):
            found[prefix + key] = value
        elif isinstance(value, dict) and value.get(_CHUNKED):
            shape = [value["shape"][str(i)] for i in range(len(value["shape"]))]
            chunks = [value["chunks"][str(i)] for i in range(len(value["chunks"]))]
            whole = join(chunks).reshape(shape)
            if any(c.ndim != 1 or c.dtype != whole.dtype for c in chunks) or sum(c.size for c in chunks) != whole.size:
                raise ValueError(f"the chunks of {prefix + key} are no array of shape {shape}")
            found[prefix + key] = whole
        elif isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}/")
    return found


def write(file: Path, tensors: Mapping[str, Any], chunk_bytes: int = _CHUNK_BYTES) -> None:
    """Writes arrays or leaves, one at a time, as the nested tree that their '/'-joined names tell.

    Args:
        file: where to.
        tensors: by name.
        chunk_bytes: larger arrays are cut, as Flax cuts them.
    """
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = tensor
    with open(file, "xb") as stream:
        _write_table(stream, tree, lambda value: _write_tensor(stream, value, chunk_bytes))


def _write_table(stream: BinaryIO, tree: Mapping[str, Any], leaf: Callable[[Any], None]) -> None:
    size = len(tree)
    stream.write(struct.pack(">B", 0x80 | size) if size < 16 else struct.pack(">BI", 0xDF, size))
    for key, value in tree.items():
        stream.write(_text(key))
        if isinstance(value, dict):
            _write_table(stream, value, leaf)
        else:
            leaf(value)


def _write_tensor(stream: BinaryIO, tensor: Any, chunk_bytes: int) -> None:
    array = np.ascontiguousarray(np.asarray(tensor)).reshape(tensor.shape)
    if array.nbytes <= chunk_bytes:
        return _write_array(stream, array)
    flat, step = array.reshape(-1), chunk_bytes // array.itemsize
    chunks = [flat[i : i + step] for i in range(0, flat.size, step)]
    numbers = {str(i): n for i, n in enumerate(array.shape)}

    def leaf(value: Any) -> None:
        if isinstance(value, np.ndarray):
            _write_array(stream, value)
        else:
            stream.write(b"\xc3" if value is True else _number(value))

    # Flax makes a map of strings of every tuple and list.
    table = {_CHUNKED: True, "shape": numbers, "chunks": {str(i): c for i, c in enumerate(chunks)}}
    _write_table(stream, table, leaf)


def _write_array(stream: BinaryIO, array: np.ndarray) -> None:
    shape = b"".join([struct.pack(">B", 0x90 | len(array.shape)), *map(_number, array.shape)])
    head = b"\x93" + shape + _text(array.dtype.name) + struct.pack(">BI", 0xC6, array.nbytes)
    stream.write(struct.pack(">BIb", 0xC9, len(head) + array.nbytes, _NDARRAY) + head)
    stream.write(array.reshape(-1).view(np.uint8).data)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">BI", 0xDB, len(data)) + data if len(data) > 31 else struct.pack(">B", 0xA0 | len(data)) + data


def _number(value: int) -> bytes:
    return struct.pack(">B", value) if value < 128 else struct.pack(">BQ", 0xCF, value)
