"""n:m pruning: the balanced sparsification of CABS (arXiv 2503.01874)."""

import jax
import jax.numpy as jnp
from jax import lax

from tadrop_jax.parameters import choice, whole
from tadrop_jax.selection import magnitude, order_statistic, ordered_bits
from tadrop_jax.steps import Step, spec
from tadrop_jax.wide import Wide, wide

# Groups up to this length are compared entry by entry: longer ones are no longer vectorised by XLA on CPU.
_COMPARED = 32


def n_m(n: int, m: int, tail: str = "ceil") -> Step:
    """Keeps the n largest magnitudes of every m consecutive weights.

    Groups run over the row-major tensor in PyTorch layout; where a ``layout`` is given, Flax kernels are grouped as
    the PyTorch tensors that they come from. Ties go to the lowest index. With whole groups this is the authors'
    (``zongzhenyang/CABS``, ``n_m_block_pruning``) and, where rows are whole groups, fusion-bench's
    ``semistructured_magnitude_prune_(..., m - n, m)``, which counts what goes.

    Args:
      n: kept in each group of m, from 0 to m.
      m: length of a group.
      tail: the last group, if it is shorter: ``"ceil"`` keeps the n/m share of it, rounded up (ours); ``"drop"`` zeroes
        it (CABS, ``roberta_glue_experiments/prune_task_vector.py``).

    Returns:
      A sparsifier for pieces of whole groups.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.sparsify({"w": jnp.array([[1.0, -2.0, 3.0, 9.0, 0.5]])}, tj.n_m(1, 2))["w"].tolist()
      [[0.0, -2.0, 0.0, 9.0, 0.5]]
    """
    m = whole("n_m", "m", m, 1)
    n = whole("n_m", "n", n, 0, m)
    choice("n_m", "tail", tail, ("ceil", "drop"))

    def apply(x, carry):
        groups = x.groups(m)
        kept = largest_in_groups(groups, group_counts(groups.shape[1], x.valid, n, m, tail)[None, :, None])
        return x.ungroup(jnp.where(kept, groups, 0))

    return Step(apply=apply, piece="group", group=m, spec=spec("n_m", n=n, m=m, tail=tail))


def group_counts(groups: int, valid, n: int, m: int, tail: str) -> jax.Array:
    """How many entries each group keeps, int32 ``(G,)``.

    Args:
      groups: number of groups G of m entries.
      valid: how many of the entries are real; those after them are padding.
      n: kept in a whole group.
      m: length of a group.
      tail: what the last group keeps, if it is shorter, see :func:`n_m`.
    """
    at, whole = jnp.arange(groups, dtype=jnp.uint32), jnp.asarray(valid // m, jnp.uint32)
    length = jnp.where(at < whole, m, jnp.where(at == whole, jnp.asarray(valid % m, jnp.int32), 0))
    short = 0 if tail == "drop" else _share(valid % m, n, m)
    return jnp.where(length == m, n, jnp.where(length == 0, 0, short))


def _share(length, n: int, m: int):
    """``ceil(length * n / m)`` bit by bit, for numbers up to 2^30: their product may not fit 32 bits."""
    length = jnp.asarray(length, jnp.uint32)
    whole = rest = jnp.zeros_like(length)
    for bit in f"{n:b}":
        rest = 2 * rest + (length if bit == "1" else 0)
        whole, rest = 2 * whole + rest // m, rest % m
    return (whole + (rest > 0)).astype(jnp.int32)


def largest_in_groups(groups: jax.Array, room: jax.Array, among: jax.Array | None = None) -> jax.Array:
    """The largest magnitudes of each group; ties go to the lowest index. No sort.

    Args:
      groups: float32 ``(T, G, m)``.
      room: int32, how many to take, broadcastable against ``(T, G, 1)``.
      among: bool ``(T, G, m)``, which entries may be taken; None means all.

    Returns:
      bool ``(T, G, m)``: ``room`` entries of each group, or all that may be taken if they are fewer.
    """
    keys = ordered_bits(magnitude(groups))
    if among is not None:
        keys = jnp.where(among, keys, 0)  # below the key of 0
    kept = _by_comparison(keys, room) if keys.shape[-1] <= _COMPARED else _by_cut(keys, room)
    return kept if among is None else kept & among


def _by_comparison(keys: jax.Array, room: jax.Array) -> jax.Array:
    """Compares each key with all of its group: 1 to 5 ns an entry on CPU, where a sort takes 15 to 25."""
    at = jnp.arange(keys.shape[-1])
    own, other = keys[..., :, None], keys[..., None, :]
    before = (other > own) | ((other == own) & (at[None, :] < at[:, None]))
    return jnp.sum(before, axis=-1, dtype=jnp.int32) < room


def _by_cut(keys: jax.Array, room: jax.Array) -> jax.Array:
    """Finds the last key that is kept: 5 ns an entry, whatever the length of a group."""
    room = jnp.broadcast_to(room, (*keys.shape[:-1], 1))
    rank = Wide(*(limb[None] for limb in wide(room.astype(jnp.uint32))))
    (cut,) = order_statistic(keys, rank, (keys.ndim - 1,))
    above, tied = keys > cut, keys == cut
    left = room - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    # As a rule the last one that is kept has no equal.
    many = jnp.any(jnp.sum(tied, axis=-1, keepdims=True, dtype=jnp.int32) > left)
    return above | (tied & lax.cond(many, lambda: jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= left, lambda: tied))
