"""Stages of statistics over one tensor, and partial statistics of tensors, blocks and devices added up."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tadrop_jax import selection, wide
from tadrop_jax.errors import MergeError
from tadrop_jax.stages import Max, Min, Stage, Sums
from tadrop_jax.steps import Piece
from tadrop_jax.trees import is_traced
from tadrop_jax.wide import Wide


def from_the_top(named, n: int, tasks: int) -> tuple[list[str], Wide]:
    """Ranks from the bottom as ``k``-th largest: names, and a Wide of shape ``(R, T)``.

    Raises:
      MergeError: for what is no rank among n entries.
    """
    ks = []
    for rank in _ranks(named, n, tasks).values():
        if isinstance(rank, int):
            limbs = wide.wide(n - rank)
        elif isinstance(rank, Wide):
            limbs = wide.subtract(wide.wide(n), rank)
        else:
            each = [wide.subtract(wide.wide(n), wide.wide(r)) for r in rank]
            limbs = Wide(*(jnp.stack([jnp.reshape(limb, ()) for limb in limbs]) for limbs in zip(*each, strict=True)))
        ks.append(Wide(*(jnp.broadcast_to(limb, (tasks,)) for limb in limbs)))
    return list(named), Wide(*(jnp.stack(limbs) for limbs in zip(*ks, strict=True)))


def from_the_bottom(named, n: int, tasks: int) -> tuple[list[str], np.ndarray]:
    """Concrete ranks as they are named: names, and int64 ``(R, T)``.

    Raises:
      MergeError: for what is no rank among n entries.
    """

    def whole(rank):
        if isinstance(rank, Wide):
            return (np.asarray(rank.high).astype(np.int64) << 16) + np.asarray(rank.low)
        return np.stack([np.reshape(whole(r), ()) for r in rank]) if isinstance(rank, tuple) else np.int64(rank)

    ranks = [whole(rank) for rank in _ranks(named, n, tasks).values()]
    return list(named), np.stack([np.broadcast_to(rank, (tasks,)) for rank in ranks])


def _ranks(named, n: int, tasks: int) -> "dict[str, int | Wide | tuple]":
    """What a stage of ranks asks for, checked: ints, Wides, or a tuple of one of those per task.

    A share of n would be cut to a whole number without a word, and other ranks give entries of their own.
    """
    if not isinstance(named, Mapping):
        raise MergeError(f"the at of a stage of ranks gives a dictionary of ranks by name, got {named!r}")
    return {name: _rank(name, rank, n, tasks) for name, rank in named.items()}


def _rank(name: str, rank, n: int, tasks: int) -> "int | Wide | tuple":
    if getattr(rank, "ndim", 2) < 2:  # an array
        if not is_traced(rank):
            rank = rank.tolist()
            rank = tuple(rank) if isinstance(rank, list) else rank
        elif jnp.issubdtype(rank.dtype, jnp.integer):
            rank = wide.wide(rank)
    if isinstance(rank, Wide):
        fits = np.shape(rank.low) in ((), (1,), (tasks,))
    elif isinstance(rank, tuple):
        return tuple(_rank(name, r, n, 1) for r in rank) if len(rank) == tasks else _rank(name, [*rank], n, tasks)
    else:
        fits = isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank <= n
    if not fits:
        raise MergeError(
            f"a rank is a whole number from 0 to {n}, the number of entries, or a tuple of one for each of {tasks} "
            f"tasks (tj.floor_times makes one of a share); {name!r} is {rank!r}"
        )
    return rank


def reduce_stage(stage: Stage, x: Piece, carry, n, axis_names=(), one_pass=True, made=None) -> dict[str, jax.Array]:
    """One stage over one tensor, or over what of it this device holds.

    Args:
      stage: a stage of scope "tensor" or "row", or the tensor's share of a "global" sum.
      x: the tensor.
      carry: what the stages before found.
      n: entries of the tensor.
      axis_names: mesh axes that the tensor is sharded over.
      one_pass: see :func:`tadrop_jax.selection.count_at_least`.
      made: what a stage of ranks selects from, see :func:`tadrop_jax.selection.order_statistic`.

    Returns:
      The stage's part of the carry.
    """
    if isinstance(stage, Sums):
        arrays = stage.of(x, carry, n)
        if stage.scope == "row":
            return {k: _reduce(stage, a, (a.ndim - 1,) if a.ndim > 1 else (), keep=True) for k, a in arrays.items()}
        found = {k: _reduce(stage, a, tuple(range(1, a.ndim))) for k, a in arrays.items()}
        if not axis_names:
            return found
        cross = {Sums: lax.psum, Min: lax.pmin, Max: lax.pmax}[type(stage)]
        return {k: cross(v, axis_names) for k, v in found.items()}
    values = stage.of(x, carry)
    row = stage.scope == "row"
    axes = ((values.ndim - 1,) if values.ndim > 1 else ()) if row else tuple(range(1, values.ndim))
    if row:
        n = values.shape[-1] if values.ndim > 1 else 1
    names, k = from_the_top(stage.at(n, carry), n, values.shape[0])
    kept = tuple(1 if a in axes else s for a, s in enumerate(values.shape))
    k = Wide(*(jnp.broadcast_to(jnp.reshape(v, (*v.shape, *(1,) * (values.ndim - 1))), (v.shape[0], *kept)) for v in k))
    found = selection.order_statistic(values, k, axes, axis_names=axis_names, one_pass=one_pass, made=made)
    return {name: v if row else jnp.reshape(v, (-1,)) for name, v in zip(names, found, strict=True)}


def _reduce(stage, array, axes, keep=False):
    array = statistic(stage, array)
    op = {Sums: jnp.sum, Min: jnp.min, Max: jnp.max}[type(stage)]
    return op(array, axis=axes, keepdims=keep) if axes else array


def statistic(stage: Sums, array) -> jax.Array:
    """What is reduced: float32, or uint32 where booleans are counted."""
    return array.astype(jnp.uint32 if type(stage) is Sums and array.dtype == bool else jnp.float32)


def combine(stage: Sums, parts: Sequence[dict]) -> dict[str, jax.Array]:
    """Adds partial statistics of tensors or blocks; concrete ones in float64. Counts stay whole numbers.

    Raises:
      MergeError: if a count passes 2^32.
    """
    op = {Sums: np.add, Min: np.minimum, Max: np.maximum}[type(stage)]
    if is_traced(parts):
        op = {Sums: jnp.add, Min: jnp.minimum, Max: jnp.maximum}[type(stage)]
        return {k: functools.reduce(op, [p[k] for p in parts]) for k in parts[0]}
    found = {k: op.reduce([np.asarray(p[k], np.float64) for p in parts]) for k in parts[0]}
    for k, v in found.items():
        if parts[0][k].dtype == np.uint32 and np.max(v) >= 1 << 32:
            raise MergeError(f"the count {k!r} passes 2^32: count over tensors, not over the tree")
    return {k: jnp.asarray(v.astype(parts[0][k].dtype)) for k, v in found.items()}
