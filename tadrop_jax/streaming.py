"""The streamed executor: runs steps over tensors in files, block by block, in memory bounded by the block.

The task vectors of all models are never held: each stage of statistics, and then the result, is one pass over blocks
of a fixed size, so that a step compiles once whatever the shapes. Threads each take the next block: while one waits
for the disk, the others compute. Steps that ask for rows get blocks of whole rows, and compile once for each length of
a row; steps that ask for whole tensors get the tensor as one block.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tadrop_jax import reductions, sampling, selection
from tadrop_jax.advancing import global_stages, in_passing, merge_stages
from tadrop_jax.reading import Block, NonFinite, Stream
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Step
from tadrop_jax.tensors import Carries, Settings, Tensors
from tadrop_jax.workers import cores, side_by_side

__all__ = ["NonFinite", "Outcome", "Settings", "Stream", "measure", "run"]

# A tensor is read once, and kept while its stages run, if it fits in here: the bits of all models, and the keys that
# ranks are found among.
KEEP_BYTES = 144 << 20

Write = Callable[[int, int, Any], None]


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
    """One run: the order of its passes. What is known is with the tensors, but for what is found in passing."""

    def __init__(self, steps: Sequence[Step], streams: Sequence[Stream], tasks: int, settings: Settings):
        self.tensors = Tensors(steps, streams, tasks, settings)
        self.steps, self.streams = self.tensors.steps, self.tensors.streams
        self.workers = settings.workers or cores()
        # What was found in passing, by step and stage and by stream: a share for each block, and if it went by a guess.
        self.shares: dict[tuple[int, int], dict[int, list[tuple[dict, Any]]]] = {}

    def go(self, write, done, skip) -> Outcome:
        for stop in global_stages(self.steps, passing=False):
            self.global_stage(stop)

        def finish(k, parallel):
            self.finish(k, None if k in skip else write, parallel)
            if k not in skip and not self.guessed(k):
                done(k, self.tensors.found(k))

        # What is there already still counts in statistics of the tree.
        self.each(finish, [k for k in range(len(self.streams)) if k not in skip or self.passing(k)])
        last = len(self.steps) - 1
        carry = next((merge_stages(self.tensors.carries[k][last]) for k in self.tensors.under(last)), {})
        for (i, j), shares in self.shares.items():
            stage = self.steps[i].stages[j]
            found = reductions.combine(stage, [s for k in sorted(shares) for s, _ in shares[k]])  # type: ignore[arg-type]
            self.mend(i, j, found, [k for k in shares if k not in skip], write, done)
            carry |= found if i == last else {}
        return Outcome(carry, tuple(self.tensors.reader.differs))

    def guessed(self, k: int) -> list[Block]:
        """The blocks of a tensor with entries that went by a guess."""
        shares = (self.shares[at][k] for at in self.passing(k))
        return [b for found in shares for b, (_, guessed) in zip(self.tensors.blocks(k), found, strict=True) if guessed]

    def mend(self, i: int, j: int, found, streams: Iterable[int], write, done) -> None:
        """Writes the blocks that went by a guess once more, now that it is known, unless it holds."""
        late = {k: blocks for k in streams if (blocks := self.guessed(k))}
        if late and not self.steps[i].stages[j].guess.holds(found):  # type: ignore[union-attr]
            for k in late:
                self.tensors.fill(k, i, {j: found})
            self.each(lambda k, parallel: parallel(lambda b: self.put(b, write), late[k]), late)
        for k in late:
            done(k, self.tensors.found(k))

    def measure(self) -> list[Carries]:
        for stop in global_stages(self.steps, passing=False):
            self.global_stage(stop)

        def stages(k, parallel):
            if self.tensors.whole[k]:
                self.tensors.call("finish", self.tensors.blocks(k)[0])
            else:
                self.tensor_stages(k, None, parallel, self.keep(k))

        self.each(stages, range(len(self.streams)))
        return [self.tensors.found(k) for k in range(len(self.streams))]

    def each(self, fn, streams: Iterable[int]) -> dict[int, Any]:
        """``fn(k, parallel)`` of each stream: those too large to be held one at a time, then the rest side by side."""
        ordered = sorted(streams, key=lambda k: -self.streams[k].size)
        large = [k for k in ordered if self.tensors.bytes_held(k) > KEEP_BYTES and not self.tensors.whole[k]]
        rest = [k for k in ordered if k not in set(large)]
        found = {k: fn(k, self.parallel) for k in large}
        beside = side_by_side(lambda k: fn(k, _serial), rest, self.workers, from_both_ends=True)
        return found | dict(zip(rest, beside, strict=True))

    def parallel(self, fn, items) -> list:
        return side_by_side(fn, items, self.workers)

    def global_stage(self, stop):
        i, j = stop
        at = self.tensors.under(i)
        if not at or self.tensors.carries[at[0]][i][j] is not None:
            return
        stage = self.steps[i].stages[j]
        if isinstance(stage, Sums):

            def shares(k, parallel):
                # With the statistics of the single tensor that earlier steps need here, while it is held.
                kept = self.keep(k, stop)
                self.tensor_stages(k, stop, parallel, kept)
                return parallel(lambda b: self.tensors.call("sums", b, stop, kept)[0], self.tensors.blocks(k))

            found = self.each(shares, at)
            group = {j: reductions.combine(stage, [share for k in at for share in found[k]])}
            self.passed(at)
        else:
            self.each(lambda k, parallel: self.tensor_stages(k, stop, parallel, self.keep(k, stop)), at)
            group = self.ranks(stop, at, [b for k in at for b in self.tensors.blocks(k)], self.parallel)
        for k in at:
            self.tensors.fill(k, i, group)

    def passed(self, at: Iterable[int]) -> None:
        """Notes that all blocks of some streams went by: their contents need not be looked at again."""
        for k in at:
            self.tensors.reader.checked[k] = True

    def missing(self, k: int, stop=None) -> Iterator[tuple[int, int]]:
        """The stages of one tensor that are not known yet, up to ``stop``."""
        chain, active = self.tensors.chains[k], self.tensors.active[k]
        for i, step in enumerate(chain):
            for j, stage in enumerate(step.stages):
                if (i, j) == stop:
                    return
                # What is of rows is found with each block of them.
                here = active[i] and stage.scope != "row" and not in_passing(chain, i, j)
                if here and self.tensors.carries[k][i][j] is None:
                    yield i, j

    def tensor_stages(self, k: int, stop, parallel, kept=None):
        """Fills in the statistics of one tensor up to ``stop``."""
        if self.tensors.whole[k]:
            # Computed with the rest, in one piece; but ranks of the tree may hang on what comes before them.
            if stop is not None and None in self.tensors.carries[k][stop[0]][: stop[1]]:
                kind = "sums" if isinstance(self.steps[stop[0]].stages[stop[1]], Sums) else "keys"
                self.tensors.call(kind, self.tensors.blocks(k)[0], stop)
            return
        blocks = self.tensors.blocks(k)
        while at := next(self.missing(k, stop), None):
            i, j = at
            stage = self.tensors.chains[k][i].stages[j]
            if isinstance(stage, Sums):
                shares = parallel(lambda b, at=at: self.tensors.call("sums", b, at, kept)[0], blocks)
                self.tensors.fill(k, i, {j: reductions.combine(stage, shares)})
                self.passed([k])
            elif stage.ties is not None:
                self.tensors.fill(k, i, {j: self.part_ties(at, k, blocks, parallel, kept)})
                self.passed([k])
            else:
                self.tensors.fill(k, i, self.ranks(at, [k], blocks, parallel, kept))

    def ranks(self, stop, at, blocks, parallel, kept=None) -> dict[int, dict]:
        """Exact order statistics over some streams, of a stage and of those after it that select from the same."""
        i, j = stop
        k, n = at[0], sum(self.streams[k].size for k in at)
        stages = self.tensors.chains[k][i].stages[j:]
        stages = [stages[0], *itertools.takewhile(lambda s: getattr(s, "again", False), stages[1:])]
        dtype, lead = self.tensors.selected_like(k, stop)
        names: dict[int, list[str]] = {}

        def found(keys: list[np.ndarray]) -> list[dict]:
            return [dict(zip(names[m], sampling.values(one, dtype), strict=True)) for m, one in enumerate(keys)]

        def ranks_of(m: int, keys: list[np.ndarray]) -> np.ndarray:
            carry = merge_stages([*self.tensors.carries[k][i][:j], *found(keys)])
            named = stages[m].at(n, jax.tree.map(jnp.asarray, carry))
            names[m], ranks = reductions.from_the_bottom(named, n, lead)
            return ranks

        def keys(b: Block, kept=None, sample: bool = False) -> np.ndarray:
            return self.tensors.call("keys", b, stop, kept, sample)[0][:, : b.size]

        search = sampling.Selection(n, [functools.partial(ranks_of, m) for m in range(len(stages))])
        settled: dict[int, dict] = {}
        if kept is not None:
            held = self.tensors.reader.buffer("keys", (lead, n), np.dtype(np.uint32))

            def fill(b: Block) -> None:
                held[:, b.start : b.stop] = keys(b, kept)

            parallel(fill, blocks)
            self.passed(at)
            search.settle_among(held)
            after = next(iter(self.tensors.chains[k][i].stages[j + len(stages) :]), None)
            tail = after.tail if isinstance(after, Sums) else None
            if tail is not None:
                cuts = {name: key for m in names for name, key in zip(names[m], search.found[m], strict=True)}
                sums = sampling.tails(held, search.places, cuts[tail.cut], tail.power)
                settled[j + len(stages)] = jax.tree.map(jnp.asarray, sums)
        else:
            # A sample is of runs that begin anywhere.
            if search.wants_sample and all(self.tensors.parts[k] is None for k in at):
                length = self.tensors.widths[k][0]
                runs = [self.tensors.sample_block(at, where, length) for where in search.sample_starts(length)]
                search.bracket(parallel(lambda b: keys(b, sample=True), runs))
            while not search.settled:  # ranks that no entry has, of density 0, take no pass
                search.update(parallel(lambda b: search.count(keys(b)), blocks))
                self.passed(at)
        return settled | {j + m: one for m, one in enumerate(found(search.found))}

    def part_ties(self, stop, k, blocks, parallel, kept) -> dict[str, jax.Array]:
        """What a stage finds that parts ties: from their number in each block, and a look at the blocks that matter."""
        (i, j), n = stop, self.streams[k].size
        stage, before = self.tensors.chains[k][i].stages[j], (i, j - 1)
        lead = self.tensors.selected_like(k, before)[1]
        carry = jax.tree.map(jnp.asarray, merge_stages(self.tensors.carries[k][i][:j]))
        (name,), (ranks,) = reductions.from_the_bottom(stage.at(n, carry), n, lead)
        cuts = np.asarray(selection.ordered_bits(carry[stage.ties]))

        def keys(b: Block) -> np.ndarray:
            return self.tensors.call("keys", b, before, kept)[0][:, : b.size]

        counts = np.array(parallel(lambda b: sampling.reaching(keys(b), cuts), blocks))
        found = [sampling.tie_at(counts[:, t], int(rank)) for t, rank in enumerate(ranks)]
        for t, at in enumerate(found):
            if isinstance(at, tuple):
                b, number = blocks[at[0]], at[1]
                found[t] = np.uint32(b.start + 1 + np.flatnonzero(keys(b)[t] == cuts[t])[number])
        return {name: jnp.asarray(np.array(found))}

    def passing(self, k: int) -> list[tuple[int, int]]:
        """Where the chain of one tensor has stages whose statistics are found in the last pass."""
        chain = self.tensors.chains[k]
        stages = ((i, j) for i, step in enumerate(chain) if self.tensors.active[k][i] for j in range(len(step.stages)))
        return [(i, j) for i, j in stages if in_passing(chain, i, j)]

    def finish(self, k: int, write, parallel) -> None:
        kept = self.keep(k)
        self.tensor_stages(k, None, parallel, kept)
        at = self.passing(k)

        def share(block: Block) -> list[tuple[dict, Any]]:
            if write is not None:
                return self.put(block, write, kept)
            return [(self.tensors.call("sums", block, stop, kept)[0], False) for stop in at]

        found = parallel(share, self.tensors.blocks(k))
        for m, stop in enumerate(at):
            self.shares.setdefault(stop, {})[k] = [shares[m] for shares in found]

    def put(self, block: Block, write, kept=None) -> list[tuple[dict, Any]]:
        """Computes what the chain puts out for a block, and writes it; gives what was found in passing."""
        value, passing = self.tensors.call("finish", block, None, kept)
        bundle = self.steps[-1].output == "bundle"
        write(block.at, block.start, self.tensors.parts_of(block, value) if bundle else value[: block.size])
        return passing

    def keep(self, k: int, stop=None) -> dict | None:
        """Where to keep the blocks of a tensor that is small enough while its own stages run, or None."""
        several = next(self.missing(k, stop), None) is not None
        return {} if several and not self.tensors.whole[k] and self.tensors.bytes_held(k) <= KEEP_BYTES else None


_serial = functools.partial(side_by_side, workers=1)
