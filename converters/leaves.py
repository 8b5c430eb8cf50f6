"""Arrays that are read when they are asked for, so that a conversion holds one tensor at a time."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError


class Leaf:
    """An array in a file: its shape and dtype are known, its contents come with `np.asarray(leaf)`.

    Args:
        shape: the shape.
        dtype: the dtype.
        read: gives the contents; called anew each time.
        file: the file that they are in, for messages; None where it is not one file.

    Raises:
        ConversionError: the dtype is not one of numbers (an object would be an address in memory), or no array can have
            the shape.

    Example:
        >>> leaf = Leaf((2, 3), np.dtype(np.float32), lambda: np.ones((2, 3), np.float32))
        >>> leaf.transpose((1, 0)).shape, np.asarray(leaf.transpose((1, 0))).sum()
        ((3, 2), np.float32(6.0))
    """

    def __init__(self, shape: Sequence[int], dtype: Any, read: Callable[[], np.ndarray], file: Path | None = None):
        self.shape, self.dtype, self.read, self.file = tuple(shape), np.dtype(dtype), read, file
        at = f"{file}: " if file else ""
        if self.dtype.kind in "OSUMm" or issubclass(self.dtype.type, np.void) or self.dtype.subdtype is not None:
            raise ConversionError(f"{at}an array of dtype {self.dtype} holds no numbers; it is not read.")
        sizes = [int(n) for n in self.shape]
        if min(sizes, default=0) < 0 or math.prod(n for n in sizes if n) * self.dtype.itemsize >= 1 << 63:
            raise ConversionError(f"{at}there is no array of shape {list(self.shape)}.")

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the contents."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype)

    def transpose(self, axes: Sequence[int]) -> "Leaf":
        """The same with its axes in another order."""
        return Leaf([self.shape[a] for a in axes], self.dtype, lambda: self.read().transpose(axes), self.file)

    def reshape(self, shape: Sequence[int]) -> "Leaf":
        """The same in another shape."""
        return Leaf(shape, self.dtype, lambda: self.read().reshape(shape), self.file)


def split(array: Any, parts: int) -> list[Any]:
    """Cuts an array, or a leaf, into equal parts along its first axis."""
    rows = array.shape[0] // parts
    if not isinstance(array, Leaf):
        return [array[k * rows : (k + 1) * rows] for k in range(parts)]
    shape = (rows, *array.shape[1:])
    return [
        Leaf(shape, array.dtype, lambda k=k: array.read()[k * rows : (k + 1) * rows], array.file) for k in range(parts)
    ]


def join(arrays: Sequence[Any]) -> Leaf:
    """Puts arrays of one dtype one after another along their first axis."""
    shape = (sum(a.shape[0] for a in arrays), *arrays[0].shape[1:])
    return Leaf(shape, arrays[0].dtype, lambda: np.concatenate([np.asarray(a) for a in arrays]))
