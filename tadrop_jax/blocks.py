"""What the streamed executor computes on one block: compiled once per step, whatever the shapes of the tensors."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tadrop_jax import memory, reductions, selection
from tadrop_jax.advancing import advance, may_pass
from tadrop_jax.pieces import piece_of
from tadrop_jax.sites import Given
from tadrop_jax.stages import Max, Min, Sums
from tadrop_jax.steps import Piece, Step


class Site(NamedTuple):
    """What a compiled block function depends on besides the length of the block.

    Attributes:
      steps: the chain, without its numbers (:attr:`Step.form`).
      active: which steps are for the tensor.
      tasks: T.
      kind: ``"keys"`` (of a stage of ranks), ``"sums"`` (of a stage of sums) or ``"finish"`` (what the chain puts out).
      stop: (step, stage) that is asked for; None to finish.
      dtype: name of the storage dtype.
      out_dtype: name of the output dtype.
      shape: S where a block is the whole tensor, since a step wants all of it; else None.
      part: the shape of the rows, or slices, that a block is made of where a step wants whole ones; None for flat
        blocks.
    """

    steps: tuple[Step, ...]
    active: tuple[bool, ...]
    tasks: int
    kind: str
    stop: tuple[int, int] | None
    dtype: str
    out_dtype: str
    shape: tuple[int, ...] | None = None
    part: tuple[int, ...] | None = None


def _reach(site: Site, raw, given: Given, carries, start, valid, n):
    """The chain up to the site's stop, over one block; and what it finds in passing."""
    values = lax.bitcast_convert_type(raw, jnp.dtype(site.dtype)).astype(jnp.float32)
    steps, passing = given.of(site.steps), list[tuple]()

    def passed(stage, x, carry, found):
        if stage.guess is None:
            return passing.append((found, False)) or {}
        passing.append((found, jnp.any(stage.guess.matters(x, carry))))
        return {name: jnp.full((1,), value, jnp.float32) for name, value in stage.guess.values.items()}

    if site.shape is not None:
        values = values.reshape(-1, *site.shape)
        x = piece_of((values[0], list(values[1:])), None, site.tasks, given.key, site.shape)

        def whole(stage, x, carry):
            found = reductions.reduce_stage(stage, x, carry, math.prod(x.stack.shape[1:]))
            return passed(stage, x, carry, found) if may_pass(stage) else found

        return advance(steps, site.active, x, carries, whole, site.stop), passing

    if site.part is not None:
        values = values.reshape(len(values), -1, *site.part)
    local = values.shape[1:]

    def position():
        low = start[1] + lax.iota(jnp.uint32, raw.shape[1])
        return (start[0] + (low < start[1]).astype(jnp.uint32)).reshape(local), low.reshape(local)

    stack = values[1:] - values[:1]
    x = Piece(stack, values[0], tuple(range(site.tasks)), given.key, position, valid, true=valid > 0)

    def missing(stage, x, carry):
        if stage.scope == "row":
            return reductions.reduce_stage(stage, x, carry, n)
        if not may_pass(stage):
            raise AssertionError("statistics come before the pass that needs them")
        return passed(stage, x, carry, _partial(stage, x, carry, valid, n))

    return advance(steps, site.active, x, carries, missing, site.stop), passing


def stage_of(site: Site) -> Any:
    """The stage at the site's stop."""
    i, j = site.stop or (-1, -1)
    return site.steps[i].stages[j]


@functools.lru_cache(maxsize=1024)
def selected_like(site: Site, leaves: tuple, tree) -> tuple[Any, int]:
    """Dtype and leading length of what a stage of ranks selects from; cached, since tracing takes milliseconds.

    Args:
      site: of kind ``"keys"``.
      leaves: shapes and dtypes of raw bits, key and numbers, and carries.
      tree: their structure.
    """
    raw, given, carries = jax.tree.unflatten(tree, leaves)

    def values(raw, given, carries):
        start, size = np.zeros(2, np.uint32), raw.shape[1]
        reached, _ = _reach(site, raw, given, carries, start, np.uint32(size), np.float32(size))
        return _flat(stage_of(site).of(reached.x, reached.carry))

    found = jax.eval_shape(values, raw, given, carries)
    return found.dtype, found.shape[0]


def _flat(array):
    return array.reshape(array.shape[0], -1)


def _partial(stage: Sums, x: Piece, carry, valid, n) -> dict[str, jax.Array]:
    """A block's share of a statistic."""
    neutral = {Sums: 0, Min: jnp.inf, Max: -jnp.inf}[type(stage)]
    reduce = {Sums: jnp.sum, Min: jnp.min, Max: jnp.max}[type(stage)]

    def reduced(array):
        array = _flat(reductions.statistic(stage, array))
        real = lax.iota(jnp.uint32, array.shape[1]) < valid
        return reduce(jnp.where(real, array, neutral), axis=1)

    return {k: reduced(a) for k, a in stage.of(x, carry, n).items()}


@functools.lru_cache(maxsize=1024)
def compiled(site: Site):
    """The compiled function of one block.

    Returns:
      A function of raw bits ``(T + 1, B)`` (row 0 is the base), key and numbers, carries, position of the first entry
      as two uint32, number of real entries, and entries of the tensor. It gives the value of the site's kind; of each
      stage that is found in passing, for ``"finish"``, the block's share and whether entries went by a guess of it;
      and, where the block is the whole tensor, the carries with the tensor's own statistics filled in (else None).
    """

    def fn(raw, given, carries, start, valid, n):
        reached, passing = _reach(site, raw, given, carries, start, valid, n)
        filled = None if site.shape is None else reached.carries
        if site.kind == "keys":
            return selection.ordered_bits(_flat(stage_of(site).of(reached.x, reached.carry))), [], filled
        if site.kind == "sums":
            return _partial(stage_of(site), reached.x, reached.carry, valid, n), [], filled
        last = site.steps[-1]
        value = memory.store(last, reached, reached.x.base, jnp.dtype(site.out_dtype))
        if value is not None and last.output != "bundle":  # a bundle's parts have dtypes of their own
            value = value.astype(jnp.dtype(site.out_dtype)).ravel()
        return value, passing, filled

    return jax.jit(fn)
