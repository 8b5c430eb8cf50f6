"""The file formats, one module a format. Nothing here knows of model families or of merging."""

import json
import os
from pathlib import Path

import numpy as np

from converters.errors import ConversionError

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


def read_tensors(directory: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all safetensors of a directory, sharded with an index or not.

    Returns:
        Arrays by name, read-only, in the file's dtypes (bfloat16 by ml_dtypes).

    Raises:
        ConversionError: a file is missing or damaged.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= _read_file(directory / name)
    return tensors


def _read_file(path: Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
    import safetensors

    try:
        entries = safetensors.deserialize(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from error
    return {
        name: np.frombuffer(entry["data"], np.dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])
        for name, entry in entries
    }
