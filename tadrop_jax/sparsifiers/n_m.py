"""n:m pruning: the balanced sparsification of CABS (arXiv 2503.01874)."""

import jax.numpy as jnp

from tadrop_jax.parameters import choice, whole
from tadrop_jax.selection import magnitude, ordered_bits
from tadrop_jax.steps import Step, spec


def n_m(n: int, m: int, tail: str = "ceil") -> Step:
    """Keeps the n largest magnitudes of every m consecutive weights.

    Groups run over the row-major tensor in PyTorch layout; where a ``layout`` is given, Flax kernels are grouped as
    the PyTorch tensors that they come from. Ties go to the lowest index.

    Args:
      n: kept in each group, from 0 to m.
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
        keys = ordered_bits(magnitude(groups))
        room = _room(groups.shape[1], x.valid)
        ordered = jnp.sort(keys, axis=-1, descending=True)
        cut = jnp.take_along_axis(ordered, jnp.maximum(room - 1, 0)[None, :, None], axis=-1)
        above = keys > cut
        tied = keys == cut
        left = room[None, :, None] - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
        kept = above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= left))
        kept &= (room > 0)[None, :, None]
        return x.ungroup(jnp.where(kept, groups, 0))

    def _room(groups: int, valid):
        """How many entries each group keeps."""
        length = jnp.clip(valid - m * jnp.arange(groups, dtype=jnp.int32), 0, m)
        short = 0 if tail == "drop" else (length * n + m - 1) // m
        return jnp.where(length == m, n, short)

    return Step(apply=apply, piece="group", group=m, spec=spec("n_m", n=n, m=m, tail=tail))
