"""What the streamed executor computes on one block: compiled once per step, whatever the shapes of the tensors."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tadrop_jax import memory, reductions, selection
from tadrop_jax.pieces import piece_of
from tadrop_jax.steps import Max, Min, Piece, Step, Sums, advance, over_tasks


class Site(NamedTuple):
    """What a compiled block function depends on besides the length of the block.

    Attributes:
      steps: the chain.
      active: which steps are for the tensor.
      tasks: T.
      kind: ``"keys"`` (of a stage of ranks), ``"sums"`` (of a stage of sums) or ``"finish"`` (what the chain puts out).
      stop: (step, stage) that is asked for; None to finish.
      dtype: name of the storage dtype.
      check: whether to look for NaN and infinity.
      out_dtype: name of the output dtype.
      shape: S where a block is the whole tensor, since a step wants rows or all of it; None for flat blocks of any.
    """

    steps: tuple[Step, ...]
    active: tuple[bool, ...]
    tasks: int
    kind: str
    stop: tuple[int, int] | None
    dtype: str
    check: bool
    out_dtype: str
    shape: tuple[int, ...] | None = None


def _reach(site: Site, raw, key, carries, start, valid):
    """The chain up to the site's stop, over one block."""
    values = lax.bitcast_convert_type(raw, jnp.dtype(site.dtype)).astype(jnp.float32)
    if site.shape is not None:
        values = values.reshape(-1, *site.shape)
        x = piece_of((values[0], list(values[1:])), None, site.tasks, key, site.shape)

        def whole(stage, x, carry):
            return reductions.reduce_stage(stage, x, carry, math.prod(x.stack.shape[1:]))

        return x, advance(site.steps, site.active, x, carries, whole, site.stop)

    def position():
        low = start[1] + lax.iota(jnp.uint32, raw.shape[1])
        return start[0] + (low < start[1]).astype(jnp.uint32), low

    stack = values[1:] - values[:1]
    x = Piece(stack, values[0], tuple(range(site.tasks)), key, position, valid)

    def missing(stage, x, carry):
        raise AssertionError("statistics come before the pass that needs them")

    return x, advance(site.steps, site.active, x, carries, missing, site.stop)


def stage_of(site: Site) -> Any:
    """The stage at the site's stop."""
    i, j = site.stop or (-1, -1)
    return site.steps[i].stages[j]


def block_values(site: Site, raw, key, carries, start, valid, n):
    """What a stage of ranks selects from, over one block: ``(T', B)``."""
    _, reached = _reach(site, raw, key, carries, start, valid)
    return _flat(stage_of(site).of(reached.x, reached.carry))


def _flat(array):
    return array.reshape(array.shape[0], -1)


@functools.lru_cache(maxsize=1024)
def compiled(site: Site):
    """The compiled function of one block.

    Returns:
      A function of raw bits ``(T + 1, B)`` (row 0 is the base), key, carries, position of the first entry as two
      uint32, number of real entries, and entries of the tensor. It gives the value of the site's kind; a sum that is
      not finite if an input is not (None unless the site checks); and, where the block is the whole tensor, the carries
      with the tensor's own statistics filled in (else None).
    """

    def fn(raw, key, carries, start, valid, n):
        x, reached = _reach(site, raw, key, carries, start, valid)
        filled = None if site.shape is None else reached.carries
        # Not finite where an input is not: subtraction and sum carry it along.
        total = jnp.sum(over_tasks(jnp.add, x.stack)) if site.check else None
        if site.kind == "keys":
            return selection.ordered_bits(_flat(stage_of(site).of(reached.x, reached.carry))), total, filled
        if site.kind == "sums":
            stage = stage_of(site)
            neutral = {Sums: 0, Min: jnp.inf, Max: -jnp.inf}[type(stage)]
            real = lax.iota(jnp.int32, raw.shape[1]) < valid
            found = stage.of(reached.x, reached.carry, n)
            arrays = {k: jnp.where(real, _flat(reductions.statistic(stage, a)), neutral) for k, a in found.items()}
            reduce = {Sums: jnp.sum, Min: jnp.min, Max: jnp.max}[type(stage)]
            return {k: reduce(a, axis=1) for k, a in arrays.items()}, total, filled
        last = site.steps[-1]
        value = memory.store(last, reached, x.base, jnp.dtype(site.out_dtype))
        if value is not None and last.output != "bundle":  # a bundle's parts have dtypes of their own
            value = value.astype(jnp.dtype(site.out_dtype)).ravel()
        return value, total, filled

    return jax.jit(fn)
