"""NumPy archives (.npz): one array an entry, mapped into memory where it is not compressed."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.errors import ConversionError
from converters.files.archive import DAMAGED, data_offset, unpacked
from converters.files.mapped import mapped
from converters.leaves import Leaf

# NumPy stores bfloat16 as two bytes without a type; JAX programs read them back as this.
_UNTYPED = {2: ml_dtypes.bfloat16}


def read(file: Path) -> dict[str, Leaf]:
    """The arrays of an archive.

    Raises:
        ConversionError: the file is damaged, or holds Python objects (they are not loaded).
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return {
                info.filename.removesuffix(".npy"): _leaf(file, archive, info)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
    except ConversionError:
        raise
    except (OSError, *DAMAGED) as error:
        raise ConversionError(f"{file}: the archive is truncated or damaged: {error}.") from None


def _leaf(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Leaf:
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):  # later ones are for headers of more than 64 KB, which arrays of numbers do not have
            raise ConversionError(f"{file}: {info.filename} is no array of numbers.")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        begin = stream.tell()
    if dtype.hasobject:
        raise ConversionError(f"{file}: {info.filename} holds Python objects, which are code; nothing was loaded.")
    if dtype.kind == "V" and dtype.itemsize in _UNTYPED:
        dtype = np.dtype(_UNTYPED[dtype.itemsize])
    stored = shape[::-1] if fortran else shape

    def unpack() -> np.ndarray:
        return np.frombuffer(unpacked(file, info, info.file_size), dtype, offset=begin).reshape(stored)

    if info.compress_type == zipfile.ZIP_STORED:
        leaf = mapped(file, data_offset(file, info) + begin, dtype, stored)
    else:
        leaf = Leaf(stored, dtype, unpack)
    if begin + leaf.nbytes != info.file_size:
        raise ConversionError(f"{file}: {info.filename} has {info.file_size - begin} bytes, {leaf.nbytes} expected.")
    return leaf.transpose(tuple(range(len(shape)))[::-1]) if fortran else leaf


def write(file: Path, tensors: Mapping[str, Any]) -> None:
    """Writes arrays or leaves, one at a time, uncompressed."""
    with zipfile.ZipFile(file, "x", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors.items():
            array = np.asarray(tensor)
            info = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date: the same tensors give the same bytes
            with archive.open(info, "w", force_zip64=True) as stream:
                descr = array.dtype.str if array.dtype.kind != "V" else f"|V{array.dtype.itemsize}"
                head = {"descr": descr, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(stream, head)
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
