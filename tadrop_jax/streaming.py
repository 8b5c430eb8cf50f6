"""The streamed executor: runs steps over tensors in files, block by block, in memory bounded by the block.

The task vectors of all models are never held: each stage of statistics, and then the result, is one pass over blocks
of a fixed size, so that a step compiles once whatever the shapes. Threads each take the next block: while one waits
for the disk, the others compute. Steps that ask for rows or whole tensors get the tensor as one block.
"""

import contextlib
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tadrop_jax import randomness, reductions, selection
from tadrop_jax.blocks import Site, block_values, compiled
from tadrop_jax.errors import ContentError, MergeError
from tadrop_jax.sampling import Selection
from tadrop_jax.steps import Ranks, Step, Sums, global_stages, merge_stages
from tadrop_jax.trees import check_patterns

BLOCK = 1 << 18
SMALL = 1 << 13
# A tensor of all models that fits in here is read once, and kept while its stages run.
KEEP_BYTES = 96 << 20
_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class Stream(NamedTuple):
    """One tensor in the files of base and models.

    Attributes:
      name: its name.
      shape: its shape S.
      dtype: its storage dtype, the same in all files.
      read: ``(row, start, stop, out)`` reads entries of the flattened tensor; row 0 is the base, row t + 1 model t.
      seed_name: the name that random numbers are drawn by; "" for the tensor's own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int, int, np.ndarray], Any]
    seed_name: str = ""

    @property
    def size(self) -> int:
        """Entries of S."""
        return math.prod(self.shape)


class Block(NamedTuple):
    """Entries [start, stop) of stream number ``at``."""

    at: int
    start: int
    stop: int


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


Write = Callable[[int, int, Any], None]
Carries = tuple[dict[str, np.ndarray], ...]


class Outcome(NamedTuple):
    """What is known after a run.

    Attributes:
      carry: of the last step: the statistics of the tree that a bundle keeps.
      differs: for each model, whether it differs from the base anywhere.
    """

    carry: dict[str, jax.Array]
    differs: tuple[bool, ...]


def run(
    steps: Sequence[Step],
    streams: Sequence[Stream],
    tasks: int,
    write: Write,
    done: Callable[[int, Carries], None],
    settings: Settings,
    skip: Iterable[int] = (),
) -> Outcome:
    """Runs a chain of steps over all streams, and hands the result over block by block.

    Args:
      steps: expanded steps, the last one a merge rule.
      streams: the float tensors; all of the base and T models.
      tasks: T.
      write: ``(stream, start, value)``, called from several threads with what the last step puts out for the entries
        from ``start`` on: an array; for a bundle its parts as they are kept (bits packed), None where the rule leaves
        the tensor alone: ``(n,)`` of what all tasks share, ``(T, n)`` of what each task has, and with the first block
        what is not laid over entries.
      done: ``(stream, carries)``, called once a stream, from any thread, after its last block was written; the
        statistics of each step, by name.
      settings: how to run.
      skip: streams whose result is there already; they still count in statistics of the tree.

    Returns:
      The outcome.

    Raises:
      ContentError: for NaN or infinity, naming file, tensor and entry.
      MergeError: if a random step has no key, or a pattern matches nothing.
    """
    steps = tuple(steps)
    names = [s.name for s in streams]
    check_patterns([p for s in steps for p in s.named], names)
    key = randomness.check_needed(any(s.random for s in steps), settings.key)
    return _Run(steps, tuple(streams), tasks, key, settings).go(write, done, frozenset(skip))


def measure(steps: Sequence[Step], streams: Sequence[Stream], tasks: int, settings: Settings) -> list[Carries]:
    """The statistics of a chain of sparsifiers over all streams; nothing is put out.

    Args:
      steps: expanded steps.
      streams: the float tensors; all of the base and T models.
      tasks: T.
      settings: how to run.

    Returns:
      For each stream the statistics of each step, by name.

    Raises:
      As :func:`run`.
    """
    steps = tuple(steps)
    check_patterns([p for s in steps for p in s.named], [s.name for s in streams])
    return _Run(
        steps, tuple(streams), tasks, randomness.check_needed(any(s.random for s in steps), settings.key), settings
    ).measure()


class _Run:
    """One run: what the passes share. The statistics found so far are its only state."""

    def __init__(self, steps, streams, tasks, key, settings: Settings):
        self.steps, self.streams, self.tasks, self.settings = steps, streams, tasks, settings
        self.active = [tuple(s.covers(t.name) and t.size > 0 for s in steps) for t in streams]
        self.chains = [tuple(s.for_tensor(t.name, t.shape, tasks) for s in steps) for t in streams]
        self.whole = [
            any(a and _wants_whole(s) for a, s in zip(active, chain, strict=True))
            for active, chain in zip(self.active, self.chains, strict=True)
        ]
        self.keys = [None if key is None else randomness.tensor_key(key, t.seed_name or t.name) for t in streams]
        self.carries: list[tuple] = [tuple((None,) * len(s.stages) for s in chain) for chain in self.chains]
        self.checked = [False] * len(streams)
        self.differs = [False] * tasks
        self.workers = settings.workers or _cores()
        self.buffers = threading.local()
        self.decomposing = threading.Lock()
        group = math.lcm(*(s.group for s in steps if s.piece == "group"))
        self.block = max(BLOCK // group, 1) * group
        # Packed masks want starts at multiples of 8.
        self.block *= 8 // math.gcd(8, self.block)
        self.small = self.block if group > 1 else SMALL

    def go(self, write, done, skip):
        for stop in global_stages(self.steps):
            self.global_stage(stop)
        todo = sorted((k for k in range(len(self.streams)) if k not in skip), key=lambda k: -self.streams[k].size)
        # Large tensors one at a time, their blocks in parallel; then many small ones at once.
        large = [k for k in todo if self.streams[k].size >= 16 * self.block]
        for k in large:
            done(k, self.finish(k, write, self.parallel))
        rest = [k for k in todo if k not in set(large)]
        self.parallel(lambda k: done(k, self.finish(k, write, _serial)), rest)
        lasts = (merge_stages(found[-1]) for found in self.carries if found and found[-1] and found[-1][0] is not None)
        return Outcome(next(lasts, {}), tuple(self.differs))

    def measure(self) -> list[Carries]:
        for stop in global_stages(self.steps):
            self.global_stage(stop)
        for k in range(len(self.streams)):
            self.tensor_stages(k, None, self.parallel, self.keep(k))
        return [self.found(k) for k in range(len(self.streams))]

    def parallel(self, fn, items) -> list:
        """Maps over items on all workers; the first error stops the rest."""
        items = list(items)
        if self.workers == 1 or len(items) < 2:
            return [fn(item) for item in items]
        results: list[Any] = [None] * len(items)
        counter, errors = itertools.count(), []

        def work():
            while not errors:
                i = next(counter)
                if i >= len(items):
                    return
                try:
                    results[i] = fn(items[i])
                except BaseException as e:
                    errors.append(e)

        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for future in [pool.submit(work) for _ in range(self.workers)]:
                    future.result()
            except BaseException as e:  # an interrupt: the workers must not go through all that is left
                errors.append(e)
                raise
        if errors:
            raise errors[0]
        return results

    def blocks(self, k: int) -> list[Block]:
        n = self.streams[k].size
        if self.whole[k]:
            return [Block(k, 0, n)]
        return [Block(k, start, min(start + self.block, n)) for start in range(0, n, self.block)]

    def load(self, block: Block, kept=None) -> tuple[np.ndarray, int]:
        """Raw bits of base and models, ``(T + 1, B)``, padded with zeros; and how many entries are real."""
        valid = block.stop - block.start
        if kept is not None and block.start in kept:
            return kept[block.start], valid
        stream = self.streams[block.at]
        width = valid if self.whole[block.at] else self.small if valid <= self.small else self.block
        uint = _UINT.get(stream.dtype.itemsize)
        if uint is None:
            raise MergeError(f"tensor {stream.name!r}: dtype {stream.dtype} cannot be merged from files")
        rows = self.tasks + 1
        if kept is None and not self.whole[block.at]:
            # One buffer a thread and size: a block is done with before the next one is read.
            held = self.buffers.__dict__.setdefault("held", {})
            if (width, uint) not in held:
                held[width, uint] = _aligned((rows, width), uint)
            raw = held[width, uint]
        else:
            raw = _aligned((rows, width), uint)
            if kept is not None:
                kept[block.start] = raw
        for row in range(rows):
            stream.read(row, block.start, block.stop, raw[row, :valid].view(stream.dtype))
        raw[:, valid:] = 0
        self.settings.progress(rows * valid * stream.dtype.itemsize)
        return raw, valid

    def call(self, kind: str, block: Block, stop=None, kept=None):
        """Runs a compiled block function; also checks the contents when the stream is read for the first time."""
        k = block.at
        raw, valid = self.load(block, kept)
        stream, check = self.streams[k], not self.checked[k]
        site = self.site(k, kind, stop, check)
        start = np.array([block.start >> 32, block.start & 0xFFFFFFFF], np.uint32)
        # XLA on CPU hands a batch of decompositions to its own threads and waits on one of them: two such calls at once
        # have been seen to wait for each other forever.
        with self.decomposing if self.whole[k] else contextlib.nullcontext():
            value, total, carries = compiled(site)(
                jax.dlpack.from_dlpack(raw),
                self.keys[k],
                self.carries[k],
                start,
                np.int32(valid),
                np.float32(stream.size),
            )
            if carries is not None:
                self.carries[k] = jax.tree.map(np.asarray, carries)
            value = jax.tree.map(np.asarray, value)
        if check:
            self.check(block, raw, valid, np.asarray(total))
        return value

    def site(self, k: int, kind: str, stop=None, check: bool = False) -> Site:
        stream = self.streams[k]
        return Site(
            self.chains[k],
            self.active[k],
            self.tasks,
            kind,
            stop,
            stream.dtype.name,
            check,
            self.dtype_name(k),
            stream.shape if self.whole[k] else None,
        )

    def check(self, block: Block, raw, valid, total):
        """Refuses NaN and infinity, and notes which models differ from the base."""
        for t in range(self.tasks):
            if not self.differs[t] and not np.array_equal(raw[0, :valid], raw[t + 1, :valid]):
                self.differs[t] = True
        if np.isfinite(total) or not self.settings.check_finite:
            return
        stream = self.streams[block.at]
        for row in range(self.tasks + 1):
            values = raw[row, :valid].view(stream.dtype).astype(np.float32)
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                entry = np.unravel_index(block.start + int(bad[0]), stream.shape) if stream.shape else ()
                raise NonFinite(row, stream.name, [int(i) for i in entry], float(values[bad[0]]))

    def dtype_name(self, k: int) -> str:
        return (self.settings.dtype or self.streams[k].dtype).name

    def global_stage(self, stop):
        i, j = stop
        at = [k for k in range(len(self.streams)) if self.active[k][i] and self.chains[k][i] == self.steps[i]]
        if not at:
            return
        for k in at:
            # Statistics of single tensors that earlier steps need here.
            self.tensor_stages(k, stop, self.parallel)
        stage = self.steps[i].stages[j]
        blocks = [b for k in at for b in self.blocks(k)]
        if isinstance(stage, Sums):
            found = reductions.combine(stage, self.parallel(lambda b: self.call("sums", b, stop), blocks))
        else:
            found = self.ranks(stage, stop, at, blocks, self.parallel)
        for k in at:
            self.checked[k] = True
            self.fill(k, i, j, found)

    def fill(self, k, i, j, found):
        done = list(self.carries[k][i])
        done[j] = found
        self.carries[k] = (*self.carries[k][:i], tuple(done), *self.carries[k][i + 1 :])

    def tensor_stages(self, k: int, stop, parallel, kept=None):
        """Fills in the statistics of one tensor up to ``stop``."""
        if self.whole[k]:
            # Computed with the rest, in one piece; but ranks of the tree may hang on what comes before them.
            if stop is not None and None in self.carries[k][stop[0]][: stop[1]]:
                kind = "sums" if isinstance(self.steps[stop[0]].stages[stop[1]], Sums) else "keys"
                self.call(kind, self.blocks(k)[0], stop)
            return
        for i, step in enumerate(self.chains[k]):
            if not self.active[k][i]:
                continue
            for j, stage in enumerate(step.stages):
                if stop == (i, j):
                    return
                if self.carries[k][i][j] is not None:
                    continue
                blocks = self.blocks(k)
                if isinstance(stage, Sums):
                    parts = parallel(lambda b, at=(i, j): self.call("sums", b, at, kept), blocks)
                    found = reductions.combine(stage, parts)
                else:
                    found = self.ranks(stage, (i, j), [k], blocks, parallel, kept)
                self.checked[k] = True
                self.fill(k, i, j, found)

    def ranks(self, stage: Ranks, stop, at, blocks, parallel, kept=None):
        """Exact order statistics over some streams: one sampled bracket, then one pass that counts and collects."""
        i, j = stop
        n = sum(self.streams[k].size for k in at)
        carry = merge_stages(self.carries[at[0]][i][:j])
        wanted = stage.at(n, carry)
        dtype, lead = self.selected_like(at[0], stop)
        names, top = reductions.from_the_top(wanted, n, lead)
        # Ascending index of each rank, (R, T').
        ranks = n - (np.asarray(top.high).astype(np.int64) * (1 << 16) + np.asarray(top.low))
        search = Selection(n, ranks)
        if search.wants_sample and not any(self.whole[k] for k in at):
            pieces = [self.sample_block(at, where, n) for where in search.sample_starts(SMALL)]
            search.bracket([self.call("keys", b, stop)[:, : b.stop - b.start] for b in pieces])
        while not search.settled:
            search.update(parallel(lambda b: self.counted(search, b, stop, kept), blocks))
        found = selection.from_ordered_bits(jnp.asarray(search.keys), dtype)
        return dict(zip(names, found, strict=True))

    def counted(self, search: Selection, block: Block, stop, kept):
        keys = self.call("keys", block, stop, kept)
        return search.count(keys[:, : block.stop - block.start])

    def sample_block(self, at, where: int, n: int) -> Block:
        """The block of a sample that begins at entry ``where`` of the streams laid end to end."""
        for k in at:
            size = self.streams[k].size
            if where < size:
                return Block(k, where, min(where + SMALL, size))
            where -= size
        raise AssertionError("a sample lies inside the tree")

    def selected_like(self, k, stop):
        site, width = self.site(k, "keys", stop), self.streams[k].size if self.whole[k] else 8
        raw = jax.ShapeDtypeStruct((self.tasks + 1, width), _UINT[self.streams[k].dtype.itemsize])
        shape = jax.eval_shape(
            functools.partial(block_values, site),
            raw,
            self.keys[k],
            self.carries[k],
            np.zeros(2, np.uint32),
            np.int32(width),
            np.float32(width),
        )
        return shape.dtype, shape.shape[0]

    def finish(self, k: int, write, parallel) -> Carries:
        kept = self.keep(k)
        self.tensor_stages(k, None, parallel, kept)

        def last(block: Block) -> None:
            value = self.call("finish", block, None, kept)
            valid = block.stop - block.start
            bundle = self.steps[-1].output == "bundle"
            write(k, block.start, self.parts_of(block, value) if bundle else value[:valid])

        parallel(last, self.blocks(k))
        return self.found(k)

    def parts_of(self, block: Block, value) -> dict[str, np.ndarray] | None:
        """What of a bundle's parts is written at this block, in the dtypes and the packing that are kept."""
        if value is None:
            return None
        found, valid = {}, block.stop - block.start
        described = self.steps[-1].kind.parts(self.streams[block.at].shape, self.tasks)  # type: ignore[union-attr]
        for name, part in described.items():
            if part.over == "tasks" and block.start:
                continue
            array = value[name]
            if part.over != "tasks":
                array = array.reshape((-1,) if part.over == "entries" else (self.tasks, -1))[..., :valid]
            if part.dtype == "bits":
                found[name] = np.packbits(array, axis=1)  # many times faster than XLA's
            else:
                kept = self.settings.dtype if part.dtype == "values" else None
                found[name] = array.astype(kept or np.float32, copy=False)
        return found

    def keep(self, k: int) -> dict | None:
        """Where to keep the blocks of a tensor that is small enough while its own stages run, or None."""
        stream = self.streams[k]
        if self.whole[k]:
            return None
        missing = any(f is None for i, c in enumerate(self.carries[k]) if self.active[k][i] for f in c)
        small = stream.size * (self.tasks + 1) * stream.dtype.itemsize <= KEEP_BYTES
        return {} if missing and small else None

    def found(self, k: int) -> Carries:
        return tuple({n: np.asarray(v) for n, v in merge_stages(c).items()} for c in self.carries[k])


class NonFinite(ContentError):
    """NaN or infinity: in which row (0 is the base), tensor and entry."""

    def __init__(self, row: int, name: str, entry: list[int], value: float):
        super().__init__(
            f"tensor {name!r} holds {value} at {entry} in {'the base' if row == 0 else f'model {row - 1}'}"
        )
        self.row, self.name, self.entry, self.value = row, name, entry, value


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wants_whole(step: Step) -> bool:
    return step.piece in ("row", "tensor") or any(stage.scope == "row" for stage in step.stages)


def _serial(fn, items) -> list:
    return [fn(item) for item in items]


def _aligned(shape, dtype) -> np.ndarray:
    """An uninitialised array aligned to 64 bytes, which JAX on CPU takes without a copy."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(count + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + count].view(dtype).reshape(shape)
