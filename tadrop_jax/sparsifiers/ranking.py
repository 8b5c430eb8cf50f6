"""Exact ranks with ties broken by position: what the sparsifiers that keep an exact number share.

Positions are those of the row-major PyTorch tensor, so that either layout of a checkpoint gives the same entries.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tadrop_jax import reductions, selection, wide
from tadrop_jax.errors import ParameterError
from tadrop_jax.stages import Ranks
from tadrop_jax.wide import Wide

NEVER = np.uint32(2**32 - 1)


def row_ranks(values: jax.Array) -> jax.Array:
    """Rank of each entry along the last axis: 0 is the smallest, ties in order of position. This sorts the rows.

    Args:
      values: float array ``(..., C)``.

    Returns:
      int32 array of the same shape; constant for gradients.
    """
    columns = values.shape[-1]
    keys = jnp.reshape(selection.ordered_bits(values), (-1, columns))
    order = _order(keys)
    rows = jnp.arange(keys.shape[0])[:, None]
    # A scatter inverts the permutation at half the price of a second sort.
    counted = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), keys.shape)
    ranks = jnp.zeros(keys.shape, jnp.int32).at[rows, order].set(counted, unique_indices=True)
    return jnp.reshape(ranks, values.shape)


def _order(keys: jax.Array) -> jax.Array:
    """The stable order of keys ``(R, C)`` along the last axis, as int32."""

    def sorted_pairs(keys):
        # Positions that inside shard_map vary as the keys do: those of jnp.argsort do not.
        at = lax.broadcasted_iota(jnp.int32, keys.shape, 1) + (keys & 0).astype(jnp.int32)
        return lax.sort((keys, at), dimension=1, is_stable=True, num_keys=1)[1]

    return lax.platform_dependent(keys, cpu=_sorted_as_one, default=sorted_pairs)


def _sorted_as_one(keys: jax.Array) -> jax.Array:
    """The same by a sort of one integer of 64 bits an entry, the key above its position.

    XLA on CPU sorts one array of integers several times faster than it sorts pairs (and stably faster than not).
    """
    with jax.enable_x64(True):
        both = keys.astype(jnp.uint64) << 32 | lax.broadcasted_iota(jnp.uint64, keys.shape, 1)
        ordered = lax.sort(both, dimension=1, is_stable=True)
        return ordered.astype(jnp.uint32).astype(jnp.int32)


def between_ranks(values: jax.Array, start, stop) -> jax.Array:
    """Which entries have a rank from ``start`` up to but without ``stop``, as :func:`row_ranks` counts. No sort.

    Args:
      values: float array ``(T, ..., C)``, C below 2^31.
      start: the same for all, or a tuple of one per task; an int or a Wide.
      stop: the same; C lies above all entries.

    Returns:
      Boolean array of the same shape; constant for gradients.
    """
    keys = selection.ordered_bits(values)
    lead, tasks = (2, -1, *(1,) * (keys.ndim - 1)), len(keys)
    columns, kept = keys.shape[-1], (2, *keys.shape[:-1], 1)
    _, largest = reductions.from_the_top({"start": start, "stop": stop}, columns, tasks)
    largest = Wide(*(jnp.broadcast_to(jnp.reshape(limb, lead), kept) for limb in largest))
    cuts = selection.order_statistic(keys, largest, (keys.ndim - 1,))
    rank = columns - ((largest.high << 16) | largest.low)
    first, end = (_reach(keys, cut, r) for cut, r in zip(cuts, rank, strict=True))
    return first & ~end


def _reach(keys: jax.Array, cut: jax.Array, rank: jax.Array) -> jax.Array:
    """Which keys have at least a rank along the last axis, given the key at that rank."""
    below = jnp.sum(keys < cut, axis=-1, keepdims=True, dtype=jnp.uint32)

    def parted():
        ties = keys == cut
        before = jnp.cumsum(ties, axis=-1, dtype=jnp.uint32) - ties
        return ties & (below + before >= rank)

    # As a rule the entry at the rank has no equal before it.
    return (keys > cut) | lax.cond(jnp.any(below < rank), parted, lambda: keys == cut)


def tie_order(x, values: jax.Array, cut: jax.Array, *, descending: bool = False) -> jax.Array:
    """Keys that part the entries equal to a cut by position, and leave all others on their side of it.

    Args:
      x: the piece.
      values: ``(T, *S)``, or ``(1, *S)`` where the tasks share them.
      cut: one order statistic of the values, broadcastable against them.
      descending: whether large values come first.

    Returns:
      uint32 array of the shape of ``values``: 0 before the cut, 1 + position at it, ``NEVER`` after it.
    """
    _, low = x.position()
    keys, at = selection.ordered_bits(values), selection.ordered_bits(cut)
    before = keys > at if descending else keys < at
    return jnp.where(before, jnp.uint32(0), jnp.where(keys == at, low[None] + 1, NEVER))


def exact_largest(values: Callable, kept: Callable, method: str) -> Ranks:
    """The stage after one that put the k-th largest value in ``carry["cut"]``: which of the tied entries is the last.

    Args:
      values: ``(x, carry) -> array``, what is compared.
      kept: ``(n, carry) -> k``: an int, a Wide, or a tuple of one per task.
      method: for the message.

    Returns:
      A stage that puts ``"last"`` into the carry, for :func:`is_kept`.
    """

    def order(x, carry):
        return tie_order(x, values(x, carry), x.column(carry["cut"]), descending=True)

    def last(n, carry):
        check_positions(n, method)
        return {"last": each(_last, kept(n, carry))}

    return Ranks(order, at=last, ties="cut")


def check_positions(n: int, method: str) -> None:
    """Refuses a tensor of so many entries that :func:`tie_order` cannot number them.

    Raises:
      ParameterError: from 2^32 - 1 entries on.
    """
    if n >= int(NEVER):
        raise ParameterError(f"{method}: exact counts are for tensors below 2^32 - 1 entries, got {n}")


def is_kept(x, values: jax.Array, carry) -> jax.Array:
    """Which entries are among the exactly k largest, after :func:`exact_largest`; ties go to the lowest position."""
    _, low = x.position()
    keys, at = selection.ordered_bits(values), selection.ordered_bits(x.column(carry["cut"]))
    return (keys > at) | ((keys == at) & (low < x.column(carry["last"])))


def from_top(n: int, k):
    """Rank, from the bottom, of the k-th largest of n."""
    return n - k if isinstance(k, int) else wide.subtract(wide.wide(n), k)


def each(fn, value):
    """Applies a function to a value, or to each value of a tuple of one per task."""
    return tuple(fn(v) for v in value) if type(value) is tuple else fn(value)


def _last(k):
    """Rank of the last entry that is kept; any rank will do for k = 0, where every key is NEVER."""
    if isinstance(k, int):
        return max(k - 1, 0)
    return wide.subtract(wide.maximum(k, wide.wide(1)), wide.wide(1))
