"""Tensors that lie in a file as they are: mapped into memory while they are read, and only then."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError
from converters.leaves import Leaf


def mapped(file: Path, offset: int, dtype: Any, shape: Sequence[int], strides: Sequence[int] | None = None) -> Leaf:
    """A tensor at an offset of a file.

    Args:
        file: the file.
        offset: the tensor's first byte.
        dtype: its dtype.
        shape: its shape.
        strides: entries from one step to the next along each axis; None for row-major order.

    Returns:
        A leaf; its arrays are read-only and hold the mapping for as long as they live.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape)
    span = size if strides is None else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))

    def read() -> np.ndarray:
        if not size:
            return np.empty(shape, dtype)
        try:
            flat = np.memmap(file, dtype, "r", offset, (span,))
        except (OSError, ValueError) as error:  # ValueError: the file has become shorter
            raise ConversionError(f"{file}: cannot be read: {error}") from error
        if strides is None:
            return flat.reshape(tuple(shape))
        steps = [s * dtype.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

    return Leaf(shape, dtype, read, file)
