"""Blocks of tensors in files, of the base and all models at once: what the streamed executor computes on."""

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tadrop_jax import squares
from tadrop_jax.checkpoints.safetensors.source import aligned_empty
from tadrop_jax.errors import ContentError, MergeError

_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class Stream(NamedTuple):
    """One tensor in the files of base and models.

    Attributes:
      name: its name.
      shape: its shape S.
      dtype: its storage dtype, the same in all files.
      read: ``(row, start, stop, out)`` reads entries of the flattened tensor; row 0 is the base, row t + 1 model t.
      seed_name: the name that random numbers are drawn by; "" for the tensor's own.
      aliases: further names of it, where it is tied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int, int, np.ndarray], Any]
    seed_name: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Entries of S."""
        return math.prod(self.shape)

    @property
    def bits(self) -> type[np.unsignedinteger]:
        """The unsigned integer of the dtype's width.

        Raises:
          MergeError: if there is none that merges.
        """
        uint = _UINT.get(self.dtype.itemsize)
        if uint is None:
            raise MergeError(f"tensor {self.name!r}: dtype {self.dtype} cannot be merged from files")
        return uint


class Block(NamedTuple):
    """Entries [start, stop) of stream number ``at``."""

    at: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.stop - self.start


class NonFinite(ContentError):
    """NaN or infinity: in which row (0 is the base), tensor and entry."""

    def __init__(self, row: int, name: str, entry: list[int], value: float):
        super().__init__(
            f"tensor {name!r} holds {value} at {entry} in {'the base' if row == 0 else f'model {row - 1}'}"
        )
        self.row, self.name, self.entry, self.value = row, name, entry, value


class Reader:
    """Reads blocks, and looks at the contents when a tensor is read for the first time.

    Attributes:
      checked: for each stream, whether it has been read as a whole.
      differs: for each model, whether it differs from the base in what was read so far.
    """

    def __init__(self, streams: Sequence[Stream], tasks: int, check_finite: bool, progress: Callable[[int], None]):
        self.streams, self.tasks, self.check_finite, self.progress = streams, tasks, check_finite, progress
        self.checked = [False] * len(streams)
        self.differs = [False] * tasks
        self.buffers = threading.local()

    def read(self, block: Block, width: int, place: int | None = 0, sample: bool = False) -> np.ndarray:
        """Raw bits of base and models.

        Args:
          block: which entries.
          width: of the result; zeros fill it up.
          place: which of the thread's buffers to overwrite; None for an array of its own.
          sample: whether this is no more than a sample, whose contents are looked at later.

        Returns:
          ``(T + 1, width)``, aligned so that JAX on CPU takes it without a copy.

        Raises:
          NonFinite: for NaN or infinity, unless they may pass.
        """
        stream, rows = self.streams[block.at], self.tasks + 1
        raw = self.buffer(place, (rows, width), np.dtype(stream.bits))
        values = raw[:, : block.size].view(stream.dtype)
        for row in range(rows):
            stream.read(row, block.start, block.stop, values[row])
        if not sample and not self.checked[block.at]:
            self._check(block, values, raw[:, : block.size])
        raw[:, block.size :] = 0
        self.progress(rows * block.size * stream.dtype.itemsize)
        return raw

    def buffer(self, place: Hashable, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialised array in a buffer of this thread's, which the next one at that place overwrites.

        The system takes longer to hand out new memory than it takes to fill it.

        Args:
          place: which of the buffers; None for memory of its own.
          shape: its shape.
          dtype: its dtype.
        """
        held = self.buffers.__dict__.setdefault("held", {})
        size = math.prod(shape) * dtype.itemsize
        raw = held.get(place)
        if raw is None or raw.size < size:
            raw = aligned_empty(size, np.dtype(np.uint8))
            if place is not None:
                held[place] = raw
        return raw[:size].view(dtype).reshape(shape)

    def _check(self, block: Block, values: np.ndarray, bits: np.ndarray) -> None:
        for task, differs in enumerate(self.differs):
            if not differs and not np.array_equal(bits[0], bits[task + 1]):
                self.differs[task] = True
        if not self.check_finite or all_finite(values):
            return
        stream, values = self.streams[block.at], values.astype(np.float32)
        row, bad = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        entry = np.unravel_index(block.start + bad, stream.shape) if stream.shape else ()
        raise NonFinite(row, stream.name, [int(i) for i in entry], float(values[row, bad]))


def all_finite(values: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity."""
    if values.dtype == np.float32 and values.size and np.isfinite(squares.of_runs(values)).all():
        return True  # several times faster than a look at each
    if values.dtype.itemsize != 2:  # there are 8-bit floats without infinity
        return bool(np.isfinite(values if values.dtype == np.float32 else values.astype(np.float32)).all())
    # NumPy has no fast test of these. Of either sign, infinity and NaN have the largest patterns.
    infinite = int(np.array(ml_dtypes.finfo(values.dtype).max, values.dtype).view(np.uint16)) + 1
    signed, unsigned = values.view(np.int16), values.view(np.uint16)
    return not values.size or bool(signed.max() < infinite and unsigned.max() < infinite | 1 << 15)
