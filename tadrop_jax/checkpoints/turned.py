"""Tensors of a Flax tree in PyTorch's order of axes, while they are merged from disk to disk."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tadrop_jax.checkpoints.safetensors import Source
from tadrop_jax.workers import cores

Places = Mapping[str, tuple[str, tuple[int, ...] | None]]
_KEEP_BYTES = 1 << 28


class Turned:
    """Reads tensors of base and models in another order of axes; threads may share it.

    A tensor that is turned is read whole when the first of its blocks is asked for, and kept for the next ones.

    Args:
      sources: the base and the models.
      places: for names of tensors (name in PyTorch, permutation into its order, None: as it is).
      threads: how many read at once, each a tensor of its own.
    """

    def __init__(self, sources: Sequence[Source], places: Places, threads: int | None = None):
        self.sources, self.places, self._threads = sources, places, threads or cores()
        self._held: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def order(self, name: str) -> tuple[int, ...] | None:
        """The permutation of a tensor's axes, or None."""
        return self.places.get(name, (name, None))[1]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as it is merged."""
        shape, order = self.sources[0].tensors[name].shape, self.order(name)
        return shape if order is None else tuple(shape[a] for a in order)

    def read(self, row: int, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Entries [start, stop) of a tensor of source ``row``, in the order in which it is merged."""
        if self.order(name) is None:
            self.sources[row].read(name, start, stop, out)
            return
        with self._lock:
            if (row, name) not in self._held:
                self._held[row, name] = self._whole(row, name)
                # Each thread asks for all rows of a tensor in turn: one that was dropped is read for every block.
                least = self._threads * len(self.sources)
                while len(self._held) > least and sum(a.nbytes for a in self._held.values()) > _KEEP_BYTES:
                    self._held.popitem(last=False)
            self._held.move_to_end((row, name))
            out[: stop - start] = self._held[row, name][start:stop]

    def _whole(self, row: int, name: str) -> np.ndarray:
        info = self.sources[row].tensors[name]
        whole = self.sources[row].read(name, 0, info.size).reshape(info.shape)
        return np.ascontiguousarray(whole.transpose(self.order(name))).reshape(-1)

    def entry(self, name: str, entry: Sequence[int]) -> list[int]:
        """An entry's place in the file, of its place in the order in which the tensor is merged."""
        order = self.order(name)
        return list(entry) if order is None else [entry[order.index(axis)] for axis in range(len(order))]


class Back:
    """Collects the blocks of turned tensors, and hands each tensor over in its own order when it is whole."""

    def __init__(self, turned: Turned, write: Callable[[str, int, Any], None]):
        self.turned, self._write = turned, write
        self._parts: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def write(self, name: str, start: int, value: Any) -> None:
        """Takes entries from ``start`` on."""
        if self.turned.order(name) is None:
            self._write(name, start, value)
            return
        with self._lock:
            if name not in self._parts:
                self._parts[name] = np.empty(self.turned.sources[0].tensors[name].size, value.dtype)
        self._parts[name][start : start + value.size] = np.ravel(value)

    def done(self, name: str) -> None:
        """Writes a tensor of which all entries came."""
        order = self.turned.order(name)
        if order is not None and name in self._parts:
            whole = self._parts.pop(name).reshape(self.turned.shape(name))
            self._write(name, 0, np.ascontiguousarray(whole.transpose(np.argsort(order))).reshape(-1))
