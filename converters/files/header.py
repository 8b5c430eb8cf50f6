"""The header of a safetensors file: bytes <-> a table of names, dtypes, shapes and offsets.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). `parse` is as strict as the reference reader, and says
which tensor is wrong.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters.errors import ConversionError

MAX_HEADER_BYTES = 100_000_000

# In the order in which the safetensors library lays tensors out, backwards: the widest come first in a file.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a header; `begin` counts from the end of the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def parse(text: bytes, data_bytes: int, file: Any) -> tuple[dict[str, Entry], dict[str, str]]:
    """Reads and checks the JSON part of a header.

    Args:
        text: the JSON bytes.
        data_bytes: how many bytes follow the header in the file.
        file: what errors call the file.

    Returns:
        The tensors in the order of their offsets, and the `__metadata__` table.

    Raises:
        ConversionError: when the header is damaged, or does not describe exactly `data_bytes` bytes.
    """
    table = load_json(text, f"{file}: the safetensors header")
    if not isinstance(table, dict):
        raise ConversionError(f"{file}: the safetensors header is a JSON {type(table).__name__}, not an object.")
    metadata = table.pop("__metadata__", None) or {}
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ConversionError(f"{file}: __metadata__ in the safetensors header is not a table of strings.")
    entries = {name: _entry(name, fields, file) for name, fields in table.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    _check_cover(entries, data_bytes, file)
    return entries, metadata


def encode(
    plan: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None, alignment: int = 64
) -> tuple[bytes, dict[str, Entry]]:
    """Lays tensors out one after another and writes their header.

    Args:
        plan: dtype and shape of each tensor, in the order in which they shall lie.
        metadata: the `__metadata__` table, if any.
        alignment: the data begins at a multiple of that many bytes.

    Returns:
        The header with its length prefix, and the entries.

    Raises:
        ConversionError: for a dtype that the format does not have.

    Example:
        >>> head, entries = encode({"w": (np.dtype(np.float32), (2, 3))}, None)
        >>> len(head), entries["w"].nbytes
        (128, 24)
    """
    entries: dict[str, Entry] = {}
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in plan.items():
        if dtype not in _CODES:
            raise ConversionError(f"{name}: safetensors files cannot hold dtype {dtype}.")
        entry = Entry(dtype, tuple(shape), begin, math.prod(shape) * dtype.itemsize)
        end = begin + entry.nbytes
        table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        entries[name] = entry
        begin = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text, entries


def load_json(text: bytes, what: str) -> Any:
    """Parses JSON and refuses an object that names a key twice, which Python's parser would drop silently.

    Args:
        text: UTF-8 JSON.
        what: the subject of the error message.

    Returns:
        The parsed value.

    Raises:
        ConversionError: when the text is not JSON or has a duplicate key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ConversionError(f"{what} names {key!r} twice.")
            table[key] = value
        return table

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{what} is not valid JSON: {error}") from error


def _entry(name: str, fields: Any, file: Any) -> Entry:
    where = f"{file}: tensor {name!r}"
    if not isinstance(fields, dict) or {"dtype", "shape", "data_offsets"} - fields.keys():
        raise ConversionError(f"{where}: its header lacks one of dtype, shape, data_offsets.")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ConversionError(f"{where} has dtype {code!r}, which is not one of {', '.join(DTYPES)}.")
    if not _counts(shape):
        raise ConversionError(f"{where} has shape {shape!r}, not a list of sizes.")
    if not (_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise ConversionError(f"{where} has data_offsets {offsets!r}, not [begin, end].")
    dtype = DTYPES[code]
    needed, nbytes = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != nbytes:
        raise ConversionError(
            f"{where}: its data_offsets {offsets} span {nbytes} bytes, but shape {shape} of {code} takes {needed}."
        )
    return Entry(dtype, tuple(shape), offsets[0], nbytes)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(entries: Mapping[str, Entry], data_bytes: int, file: Any) -> None:
    """Entries in the order of their offsets must cover the data exactly, each byte once."""
    end, before = 0, "the header"
    for name, entry in entries.items():
        if entry.begin != end:
            kind = "overlaps" if entry.begin < end else "leaves a gap after"
            raise ConversionError(
                f"{file}: tensor {name!r} {kind} {before}: it begins at byte {entry.begin} of the data, "
                f"{before} ends at {end}."
            )
        end, before = entry.begin + entry.nbytes, f"tensor {name!r}"
    if end > data_bytes:
        raise ConversionError(
            f"{file}: the file is truncated: its header describes {end} bytes of tensors, the file holds {data_bytes}."
        )
    if end < data_bytes:
        raise ConversionError(
            f"{file}: {data_bytes - end} bytes belong to no tensor: its header describes {end} bytes, "
            f"the file holds {data_bytes}."
        )
