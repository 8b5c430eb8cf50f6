"""The tensors of a streamed run: how each is cut, what is known of it so far, and what is computed of its blocks."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tadrop_jax import cutting, randomness
from tadrop_jax.advancing import merge_stages
from tadrop_jax.blocks import Site, compiled, selected_like
from tadrop_jax.reading import Block, Reader, Stream
from tadrop_jax.sites import given
from tadrop_jax.steps import Step


class Settings(NamedTuple):
    """How to run.

    Attributes:
      key: random key, or None.
      dtype: output dtype; None keeps each tensor's own.
      check_finite: refuse NaN and infinity in the inputs.
      workers: threads; None means one a core.
      progress: called with the bytes read, as they are read.
    """

    key: Any = None
    dtype: np.dtype | None = None
    check_finite: bool = True
    workers: int | None = None
    progress: Callable[[int], None] = lambda n: None


Carries = tuple[dict[str, np.ndarray], ...]


class Tensors:
    """The tensors of a run, by their number, under its steps.

    Attributes:
      chains: the steps as they are for each tensor.
      active: which of them cover it.
      whole: whether it is computed in one piece.
      carries: what is known of it: for each step, for each of its stages, statistics by name; None: not known yet.
    """

    def __init__(self, steps: Sequence[Step], streams: Sequence[Stream], tasks: int, settings: Settings):
        key = randomness.check_needed(any(s.random for s in steps), settings.key)
        self.steps, self.streams, self.tasks, self.settings = tuple(steps), tuple(streams), tasks, settings
        self.active = [tuple(s.covers(t.name, t.aliases) and t.size > 0 for s in steps) for t in streams]
        self.chains = [tuple(s.for_tensor(t.name, t.shape, tasks, t.aliases) for s in steps) for t in streams]
        self.parts = [
            cutting.part_of(t.shape, [s for a, s in zip(active, chain, strict=True) if a])
            for t, active, chain in zip(streams, self.active, self.chains, strict=True)
        ]
        self.whole = [part == t.shape for t, part in zip(streams, self.parts, strict=True)]
        keys = [None if key is None else randomness.tensor_key(key, t.seed_name or t.name) for t in streams]
        self.given = [given(k, chain) for k, chain in zip(keys, self.chains, strict=True)]
        self.carries: list[tuple] = [tuple((None,) * len(s.stages) for s in chain) for chain in self.chains]
        group = math.lcm(*(s.group for s in steps))
        self.widths = [cutting.widths(t.size, part, group, tasks) for t, part in zip(streams, self.parts, strict=True)]
        self.reader = Reader(streams, tasks, settings.check_finite, settings.progress)
        self.decomposing = threading.Lock()
        self.functions: dict[tuple, Callable] = {}

    def under(self, i: int) -> list[int]:
        """The tensors that step ``i`` covers as it is, not in a form of their own."""
        return [k for k, chain in enumerate(self.chains) if self.active[k][i] and chain[i] == self.steps[i]]

    def blocks(self, k: int) -> list[Block]:
        """All of a tensor, in order; one block where it is computed in one piece."""
        n = self.streams[k].size
        if self.whole[k]:
            return [Block(k, 0, n)]
        width = self.widths[k][1]
        return [Block(k, start, min(start + width, n)) for start in range(0, n, width)]

    def bytes_held(self, k: int) -> int:
        """What it takes to hold a tensor of all models, with the keys that ranks are found among."""
        key = np.dtype(np.uint32).itemsize
        return self.streams[k].size * ((self.tasks + 1) * self.streams[k].dtype.itemsize + self.tasks * key)

    def load(self, block: Block, kept: dict | None = None, sample: bool = False) -> np.ndarray:
        """Raw bits of base and models, ``(T + 1, B)``, padded with zeros."""
        if kept is not None and block.start in kept:
            return kept[block.start]
        whole, (small, full) = self.whole[block.at], self.widths[block.at]
        width = block.size if whole else small if block.size <= small else full
        # One thread goes through all blocks of a tensor that is held.
        place = None if whole else 0 if kept is None else block.start // full + 1
        raw = self.reader.read(block, width, place, sample)
        if kept is not None:
            kept[block.start] = raw
        return raw

    def call(self, kind: str, block: Block, stop=None, kept=None, sample: bool = False) -> tuple[Any, Any]:
        """Runs a compiled block function (see :func:`tadrop_jax.blocks.compiled`).

        Args:
          kind: of the function.
          block: what on.
          stop: step and stage up to which the chain runs; None for all of it.
          kept: where the bits of the tensor's blocks are kept, or None.
          sample: whether the block is no more than a sample, whose contents are looked at later.

        Returns:
          The value, on the host, and what was found in passing.
        """
        k, raw = block.at, self.load(block, kept, sample)
        start = np.array([block.start >> 32, block.start & 0xFFFFFFFF], np.uint32)
        # One tensor is decomposed at a time: LAPACK has the cores already, and each takes several times its size.
        with self.decomposing if self.whole[k] else contextlib.nullcontext():
            value, passing, carries = self.function(k, kind, stop)(
                raw,
                self.given[k],
                self.carries[k],
                start,
                np.uint32(block.size),
                np.float32(self.streams[k].size),
            )
            if carries is not None:
                self.carries[k] = jax.tree.map(np.asarray, carries)
            if kind == "keys":
                return np.asarray(value), []
            # What is kept of every block is copied: a view would keep the device's buffer, kilobytes for a number.
            return jax.tree.map(np.array if kind == "sums" else np.asarray, value), jax.tree.map(np.array, passing)

    def function(self, k: int, kind: str, stop=None) -> Callable:
        """The compiled function of a tensor's blocks; found by its steps once, which takes as long as to call it."""
        at = k, kind, stop
        if at not in self.functions:
            self.functions[at] = compiled(self.site(k, kind, stop))
        return self.functions[at]

    def site(self, k: int, kind: str, stop=None) -> Site:
        """What the compiled function of a tensor's blocks depends on."""
        stream = self.streams[k]
        out = (self.settings.dtype or stream.dtype).name
        shape, part = (stream.shape, None) if self.whole[k] else (None, self.parts[k])
        chain, active = tuple(s.form for s in self.chains[k]), self.active[k]
        return Site(chain, active, self.tasks, kind, stop, stream.dtype.name, out, shape, part)

    def selected_like(self, k: int, stop) -> tuple[Any, int]:
        """Dtype and leading length of what a stage of ranks selects from."""
        part = self.parts[k]
        width = 8 if part is None else math.prod(part)
        raw = jax.ShapeDtypeStruct((self.tasks + 1, width), self.streams[k].bits)
        held = (raw, self.given[k], self.carries[k])
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), held))
        return selected_like(self.site(k, "keys", stop), tuple(leaves), tree)

    def sample_block(self, at: Iterable[int], where: int, length: int) -> Block:
        """The block of a sample that begins at entry ``where`` of some tensors laid end to end."""
        for k in at:
            size = self.streams[k].size
            if where < size:
                return Block(k, where, min(where + length, size))
            where -= size
        raise AssertionError("a sample lies inside the tree")

    def parts_of(self, block: Block, value) -> dict[str, np.ndarray] | None:
        """What of a bundle's parts is written at this block, in the dtypes and the packing that are kept."""
        if value is None:
            return None
        found = {}
        described = self.steps[-1].kind.parts(self.streams[block.at].shape, self.tasks)  # type: ignore[union-attr]
        for name, part in described.items():
            if part.over == "tasks" and block.start:
                continue
            array = value[name]
            if part.over != "tasks":
                array = array.reshape((-1,) if part.over == "entries" else (self.tasks, -1))[..., : block.size]
            if part.dtype == "bits":
                found[name] = np.packbits(array, axis=1)  # many times faster than XLA's
            else:
                kept = self.settings.dtype if part.dtype == "values" else None
                with np.errstate(over="ignore"):  # whoever writes it looks
                    found[name] = array.astype(kept or np.float32, copy=False)
        return found

    def fill(self, k: int, i: int, group: dict[int, dict]) -> None:
        """Notes what was found for some stages of step ``i``."""
        found = tuple(group.get(j, f) for j, f in enumerate(self.carries[k][i]))
        self.carries[k] = (*self.carries[k][:i], found, *self.carries[k][i + 1 :])

    def found(self, k: int) -> Carries:
        """What is known of a tensor: the statistics of each step, by name."""
        return tuple({n: np.asarray(v) for n, v in merge_stages(c).items()} for c in self.carries[k])
