"""The streamed executor: runs steps over tensors in files, block by block, in memory bounded by the block.

The task vectors of all models are never held: each stage of statistics, and then the result, is one pass over blocks
of a fixed size, so that a step compiles once whatever the shapes. Threads each take the next block: while one waits
for the disk, the others compute. Steps that ask for rows get blocks of whole rows, and compile once for each length of
a row; steps that ask for whole tensors get the tensor as one block.
"""

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tadrop_jax import cutting, randomness, reductions, sampling, selection
from tadrop_jax.advancing import global_stages, in_passing, merge_stages
from tadrop_jax.blocks import Site, compiled, selected_like
from tadrop_jax.reading import Block, NonFinite, Reader, Stream
from tadrop_jax.sites import given
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Step
from tadrop_jax.workers import cores, side_by_side

__all__ = ["NonFinite", "Outcome", "Settings", "Stream", "measure", "run"]

# A tensor is read once, and kept while its stages run, if it fits in here: the bits of all models, and the keys that
# ranks are found among.
KEEP_BYTES = 144 << 20


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
      MergeError: if a random step has no key.
    """
    return _Run(steps, streams, tasks, settings).go(write, done, frozenset(skip))


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
    return _Run(steps, streams, tasks, settings).measure()


class _Run:
    """One run: what the passes share. The statistics found so far are its only state."""

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
        self.reader = Reader(streams, tasks, settings.check_finite, settings.progress)
        self.workers = settings.workers or cores()
        self.decomposing = threading.Lock()
        self.functions: dict[tuple, Callable] = {}
        group = math.lcm(*(s.group for s in steps))
        self.widths = [cutting.widths(t.size, part, group, tasks) for t, part in zip(streams, self.parts, strict=True)]
        # What was found in passing, by step and stage and by stream: a share for each block, and if it went by a guess.
        self.shares: dict[tuple[int, int], dict[int, list[tuple[dict, Any]]]] = {}

    def go(self, write, done, skip) -> Outcome:
        for stop in global_stages(self.steps, passing=False):
            self.global_stage(stop)

        def finish(k, parallel):
            self.finish(k, None if k in skip else write, parallel)
            if k not in skip and not self.guessed(k):
                done(k, self.found(k))

        # What is there already still counts in statistics of the tree.
        self.each(finish, [k for k in range(len(self.streams)) if k not in skip or self.passing(k)])
        last = len(self.steps) - 1
        at = (k for k, chain in enumerate(self.chains) if self.active[k][last] and chain[last] == self.steps[last])
        carry = next((merge_stages(self.carries[k][last]) for k in at), {})
        for (i, j), shares in self.shares.items():
            stage = self.steps[i].stages[j]
            found = reductions.combine(stage, [s for k in sorted(shares) for s, _ in shares[k]])  # type: ignore[arg-type]
            self.mend(i, j, found, [k for k in shares if k not in skip], write, done)
            carry |= found if i == last else {}
        return Outcome(carry, tuple(self.reader.differs))

    def guessed(self, k: int) -> list[Block]:
        """The blocks of a tensor with entries that went by a guess."""
        shares = (self.shares[at][k] for at in self.passing(k))
        return [b for found in shares for b, (_, guessed) in zip(self.blocks(k), found, strict=True) if guessed]

    def mend(self, i: int, j: int, found, streams: Iterable[int], write, done) -> None:
        """Writes the blocks that went by a guess once more, now that it is known, unless it holds."""
        late = {k: blocks for k in streams if (blocks := self.guessed(k))}
        if late and not self.steps[i].stages[j].guess.holds(found):  # type: ignore[union-attr]
            for k in late:
                self.fill(k, i, {j: found})
            self.each(lambda k, parallel: parallel(lambda b: self.put(b, write), late[k]), late)
        for k in late:
            done(k, self.found(k))

    def measure(self) -> list[Carries]:
        for stop in global_stages(self.steps, passing=False):
            self.global_stage(stop)

        def stages(k, parallel):
            if self.whole[k]:
                self.call("finish", self.blocks(k)[0])
            else:
                self.tensor_stages(k, None, parallel, self.keep(k))

        self.each(stages, range(len(self.streams)))
        return [self.found(k) for k in range(len(self.streams))]

    def each(self, fn, streams: Iterable[int]) -> dict[int, Any]:
        """``fn(k, parallel)`` of each stream: those too large to be held one at a time, then the rest side by side."""
        ordered = sorted(streams, key=lambda k: -self.streams[k].size)
        large = [k for k in ordered if self.bytes_held(k) > KEEP_BYTES and not self.whole[k]]
        rest = [k for k in ordered if k not in set(large)]
        found = {k: fn(k, self.parallel) for k in large}
        beside = side_by_side(lambda k: fn(k, _serial), rest, self.workers, from_both_ends=True)
        return found | dict(zip(rest, beside, strict=True))

    def parallel(self, fn, items) -> list:
        return side_by_side(fn, items, self.workers)

    def blocks(self, k: int) -> list[Block]:
        n = self.streams[k].size
        if self.whole[k]:
            return [Block(k, 0, n)]
        width = self.widths[k][1]
        return [Block(k, start, min(start + width, n)) for start in range(0, n, width)]

    def bytes_held(self, k: int) -> int:
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

    def call(self, kind: str, block: Block, stop=None, kept=None, sample: bool = False):
        """Runs a compiled block function: the value, and what was found in passing."""
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
        stream = self.streams[k]
        out = (self.settings.dtype or stream.dtype).name
        shape, part = (stream.shape, None) if self.whole[k] else (None, self.parts[k])
        chain, active = tuple(s.form for s in self.chains[k]), self.active[k]
        return Site(chain, active, self.tasks, kind, stop, stream.dtype.name, out, shape, part)

    def global_stage(self, stop):
        i, j = stop
        at = [k for k in range(len(self.streams)) if self.active[k][i] and self.chains[k][i] == self.steps[i]]
        if not at or self.carries[at[0]][i][j] is not None:
            return
        stage = self.steps[i].stages[j]
        if isinstance(stage, Sums):

            def shares(k, parallel):
                # With the statistics of the single tensor that earlier steps need here, while it is held.
                kept = self.keep(k, stop)
                self.tensor_stages(k, stop, parallel, kept)
                return parallel(lambda b: self.call("sums", b, stop, kept)[0], self.blocks(k))

            found = self.each(shares, at)
            group = {j: reductions.combine(stage, [share for k in at for share in found[k]])}
            self.passed(at)
        else:
            self.each(lambda k, parallel: self.tensor_stages(k, stop, parallel, self.keep(k, stop)), at)
            group = self.ranks(stop, at, [b for k in at for b in self.blocks(k)], self.parallel)
        for k in at:
            self.fill(k, i, group)

    def passed(self, at: Iterable[int]) -> None:
        """Notes that all blocks of some streams went by: their contents need not be looked at again."""
        for k in at:
            self.reader.checked[k] = True

    def fill(self, k: int, i: int, group: dict[int, dict]) -> None:
        found = tuple(group.get(j, f) for j, f in enumerate(self.carries[k][i]))
        self.carries[k] = (*self.carries[k][:i], found, *self.carries[k][i + 1 :])

    def missing(self, k: int, stop=None) -> Iterator[tuple[int, int]]:
        """The stages of one tensor that are not known yet, up to ``stop``."""
        for i, step in enumerate(self.chains[k]):
            for j, stage in enumerate(step.stages):
                if (i, j) == stop:
                    return
                # What is of rows is found with each block of them.
                here = self.active[k][i] and stage.scope != "row" and not in_passing(self.chains[k], i, j)
                if here and self.carries[k][i][j] is None:
                    yield i, j

    def tensor_stages(self, k: int, stop, parallel, kept=None):
        """Fills in the statistics of one tensor up to ``stop``."""
        if self.whole[k]:
            # Computed with the rest, in one piece; but ranks of the tree may hang on what comes before them.
            if stop is not None and None in self.carries[k][stop[0]][: stop[1]]:
                kind = "sums" if isinstance(self.steps[stop[0]].stages[stop[1]], Sums) else "keys"
                self.call(kind, self.blocks(k)[0], stop)
            return
        blocks = self.blocks(k)
        while at := next(self.missing(k, stop), None):
            i, j = at
            stage = self.chains[k][i].stages[j]
            if isinstance(stage, Sums):
                shares = parallel(lambda b, at=at: self.call("sums", b, at, kept)[0], blocks)
                self.fill(k, i, {j: reductions.combine(stage, shares)})
                self.passed([k])
            elif stage.ties is not None:
                self.fill(k, i, {j: self.part_ties(at, k, blocks, parallel, kept)})
                self.passed([k])
            else:
                self.fill(k, i, self.ranks(at, [k], blocks, parallel, kept))

    def ranks(self, stop, at, blocks, parallel, kept=None) -> dict[int, dict]:
        """Exact order statistics over some streams, of a stage and of those after it that select from the same."""
        i, j = stop
        k, n = at[0], sum(self.streams[k].size for k in at)
        stages = self.chains[k][i].stages[j:]
        stages = [stages[0], *itertools.takewhile(lambda s: getattr(s, "again", False), stages[1:])]
        dtype, lead = self.selected_like(k, stop)
        names: dict[int, list[str]] = {}

        def found(keys: list[np.ndarray]) -> list[dict]:
            return [dict(zip(names[m], sampling.values(one, dtype), strict=True)) for m, one in enumerate(keys)]

        def ranks_of(m: int, keys: list[np.ndarray]) -> np.ndarray:
            carry = merge_stages([*self.carries[k][i][:j], *found(keys)])
            named = stages[m].at(n, jax.tree.map(jnp.asarray, carry))
            names[m], ranks = reductions.from_the_bottom(named, n, lead)
            return ranks

        search = sampling.Selection(n, [functools.partial(ranks_of, m) for m in range(len(stages))])
        settled: dict[int, dict] = {}
        if kept is not None:
            held = self.reader.buffer("keys", (lead, n), np.dtype(np.uint32))

            def fill(b: Block) -> None:
                held[:, b.start : b.stop] = self.call("keys", b, stop, kept)[0][:, : b.size]

            parallel(fill, blocks)
            self.passed(at)
            search.settle_among(held)
            after = next(iter(self.chains[k][i].stages[j + len(stages) :]), None)
            tail = after.tail if isinstance(after, Sums) else None
            if tail is not None:
                keys = {name: key for m in names for name, key in zip(names[m], search.found[m], strict=True)}
                sums = sampling.tails(held, search.places, keys[tail.cut], tail.power)
                settled[j + len(stages)] = jax.tree.map(jnp.asarray, sums)
        else:
            # A sample is of runs that begin anywhere.
            if search.wants_sample and all(self.parts[k] is None for k in at):
                length = self.widths[k][0]
                runs = [self.sample_block(at, where, length) for where in search.sample_starts(length)]
                search.bracket(parallel(lambda b: self.call("keys", b, stop, sample=True)[0][:, : b.size], runs))
            while not search.settled:  # ranks that no entry has, of density 0, take no pass
                search.update(parallel(lambda b: search.count(self.call("keys", b, stop)[0][:, : b.size]), blocks))
                self.passed(at)
        return settled | {j + m: one for m, one in enumerate(found(search.found))}

    def part_ties(self, stop, k, blocks, parallel, kept) -> dict[str, jax.Array]:
        """What a stage finds that parts ties: from their number in each block, and a look at the blocks that matter."""
        (i, j), n = stop, self.streams[k].size
        stage, before = self.chains[k][i].stages[j], (i, j - 1)
        lead = self.selected_like(k, before)[1]
        carry = jax.tree.map(jnp.asarray, merge_stages(self.carries[k][i][:j]))
        (name,), (ranks,) = reductions.from_the_bottom(stage.at(n, carry), n, lead)
        cuts = np.asarray(selection.ordered_bits(carry[stage.ties]))

        def keys(b: Block) -> np.ndarray:
            return self.call("keys", b, before, kept)[0][:, : b.size]

        counts = np.array(parallel(lambda b: sampling.reaching(keys(b), cuts), blocks))
        found = [sampling.tie_at(counts[:, t], int(rank)) for t, rank in enumerate(ranks)]
        for t, at in enumerate(found):
            if isinstance(at, tuple):
                b, number = blocks[at[0]], at[1]
                found[t] = np.uint32(b.start + 1 + np.flatnonzero(keys(b)[t] == cuts[t])[number])
        return {name: jnp.asarray(np.array(found))}

    def sample_block(self, at, where: int, length: int) -> Block:
        """The block of a sample that begins at entry ``where`` of the streams laid end to end."""
        for k in at:
            size = self.streams[k].size
            if where < size:
                return Block(k, where, min(where + length, size))
            where -= size
        raise AssertionError("a sample lies inside the tree")

    def selected_like(self, k, stop):
        width = 8 if self.parts[k] is None else math.prod(self.parts[k])
        raw = jax.ShapeDtypeStruct((self.tasks + 1, width), self.streams[k].bits)
        held = (raw, self.given[k], self.carries[k])
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), held))
        return selected_like(self.site(k, "keys", stop), tuple(leaves), tree)

    def passing(self, k: int) -> list[tuple[int, int]]:
        """Where the chain of one tensor has stages whose statistics are found in the last pass."""
        chain = self.chains[k]
        stages = ((i, j) for i, step in enumerate(chain) if self.active[k][i] for j in range(len(step.stages)))
        return [(i, j) for i, j in stages if in_passing(chain, i, j)]

    def finish(self, k: int, write, parallel) -> None:
        kept = self.keep(k)
        self.tensor_stages(k, None, parallel, kept)
        at = self.passing(k)

        def share(block: Block) -> list[tuple[dict, Any]]:
            if write is not None:
                return self.put(block, write, kept)
            return [(self.call("sums", block, stop, kept)[0], False) for stop in at]

        found = parallel(share, self.blocks(k))
        for m, stop in enumerate(at):
            self.shares.setdefault(stop, {})[k] = [shares[m] for shares in found]

    def put(self, block: Block, write, kept=None) -> list[tuple[dict, Any]]:
        """Computes what the chain puts out for a block, and writes it; gives what was found in passing."""
        value, passing = self.call("finish", block, None, kept)
        bundle = self.steps[-1].output == "bundle"
        write(block.at, block.start, self.parts_of(block, value) if bundle else value[: block.size])
        return passing

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

    def keep(self, k: int, stop=None) -> dict | None:
        """Where to keep the blocks of a tensor that is small enough while its own stages run, or None."""
        several = next(self.missing(k, stop), None) is not None
        return {} if several and not self.whole[k] and self.bytes_held(k) <= KEEP_BYTES else None

    def found(self, k: int) -> Carries:
        return tuple({n: np.asarray(v) for n, v in merge_stages(c).items()} for c in self.carries[k])


_serial = functools.partial(side_by_side, workers=1)
