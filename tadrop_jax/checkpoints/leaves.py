"""Checkpoints of other formats than safetensors, as sources of blocks: torch pickles, Orbax, msgpack, npz.

Also checkpoints whose names and axes are others than those of the base: their tensors are renamed and turned first.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from converters.files import Stored
from converters.leaves import Leaf
from tadrop_jax.checkpoints.safetensors import Source, TensorInfo
from tadrop_jax.checkpoints.safetensors.source import aligned_empty
from tadrop_jax.errors import CheckpointError, checkpoint_errors
from tadrop_jax.workers import cores

# What is unpacked or turned is kept while its blocks are read: so much of it, and a tensor a thread at least.
_KEEP_BYTES = 1 << 28


class LeafSource(Source):
    """An open checkpoint whose tensors come from `converters.files`.

    A tensor that lies in its file as it is asked for is mapped into memory; any other is read whole when the first of
    its blocks is asked for. `read` may be called from many threads.

    Args:
        stored: the checkpoint.
        tensors: its leaves under other names; None takes them as they are.
    """

    def __init__(self, stored: Stored, tensors: Mapping[str, Leaf] | None = None):
        leaves = stored.tensors if tensors is None else tensors
        self.path, self.files, self.metadata = stored.path, stored.files, {}
        self.stored, self._leaves = stored, leaves
        self.tensors = {
            n: TensorInfo(n, leaf.dtype, leaf.shape, leaf.file or stored.path, 0, leaf.nbytes)
            for n, leaf in leaves.items()
        }
        self.size_bytes = sum(file.stat().st_size for file in stored.files)
        self._fds, self._lock = {}, threading.Lock()
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()
        digest = hashlib.sha256()
        for file in stored.files:
            digest.update(file.name.encode() + b"\0")
        for name, info in self.tensors.items():
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        self.header_digest = digest.hexdigest()

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """As :meth:`Source.read`."""
        info = self.tensors[name]
        if not 0 <= start <= stop <= info.size:
            raise IndexError(f"entries {start}:{stop} of {name!r}, which has {info.size}.")
        out = aligned_empty(stop - start, info.dtype) if out is None else out[: stop - start]
        out[:] = self._flat(name)[start:stop]
        return out

    def rename(self, names: Mapping[str, str]) -> None:
        """As :meth:`Source.rename`."""
        super().rename(names)
        self._leaves = {names.get(n, n): leaf for n, leaf in self._leaves.items()}

    def _flat(self, name: str) -> np.ndarray:
        with self._lock:
            if name not in self._held:
                with checkpoint_errors():
                    self._held[name] = np.ascontiguousarray(np.asarray(self._leaves[name])).reshape(-1)
                while len(self._held) > max(cores(), 2) and sum(a.nbytes for a in self._held.values()) > _KEEP_BYTES:
                    self._held.popitem(last=False)
            self._held.move_to_end(name)
            return self._held[name]

    def full_digest(self) -> str:
        """As :meth:`Source.full_digest`."""
        try:
            self._fds = {file: os.open(file, os.O_RDONLY) for file in self.files}
            return super().full_digest()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}.") from error
        finally:
            super().close()

    def close(self) -> None:
        """Lets go of what was read."""
        self._held.clear()
        super().close()
