"""Entries of zip archives, which torch pickles and .npz files are: where they lie, or what is packed in them."""

import struct
import zipfile
import zlib
from pathlib import Path

from converters.errors import ConversionError

# What zipfile raises for an archive that is damaged, or of a kind that it does not know.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError)


def data_offset(file: Path, info: zipfile.ZipInfo) -> int:
    """Where the contents of an entry that is not compressed begin.

    Raises:
        ConversionError: there is no such entry at that place, or it is encrypted.
    """
    with open(file, "rb") as stream:
        stream.seek(info.header_offset)
        local = stream.read(30)
        end = stream.seek(0, 2)
    if len(local) < 30 or local[:4] != b"PK\x03\x04" or info.flag_bits & 1:
        raise ConversionError(f"{file}: the archive is damaged or encrypted at {info.filename}.")
    begin = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    if begin + info.file_size > end:
        raise ConversionError(f"{file}: the archive is truncated at {info.filename}.")
    return begin


def unpacked(file: Path, info: zipfile.ZipInfo, count: int) -> bytes:
    """The first bytes of an entry; no more are unpacked, however much it may hold.

    Raises:
        ConversionError: the archive is damaged, or the entry is shorter.
    """
    try:
        with zipfile.ZipFile(file) as archive, archive.open(info) as stream:
            data = stream.read(count)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error
    except DAMAGED as error:
        raise ConversionError(f"{file}: the archive is damaged at {info.filename}: {error}.") from None
    if len(data) < count:
        raise ConversionError(f"{file}: the archive is truncated at {info.filename}.")
    return data
