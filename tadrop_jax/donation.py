"""Which arrays a merge that is given its models may use up."""

from collections import Counter

import jax
import jax.numpy as jnp

from tadrop_jax.errors import MergeError
from tadrop_jax.trees import is_traced


def spare(base, models) -> frozenset[int]:
    """The arrays of the models whose memory nothing else in these trees holds, by ``id``: a merge may use them up.

    Distinct arrays may share memory: ``jax.device_put`` copies nothing to where it lies already.

    Raises:
      MergeError: inside a transformation, where donation is the caller's.
    """
    if is_traced((base, models)):
        raise MergeError("donate=True is for calls outside jit; inside, donate the arguments of your own jit")
    counts = Counter(place for leaf in jax.tree.leaves((base, models)) for place in _memory(leaf))
    return frozenset(id(m) for m in jax.tree.leaves(models) if (at := _memory(m)) and all(counts[p] == 1 for p in at))


def _memory(leaf) -> list[tuple]:
    """Where the parts of an array lie that this process has: device and address; none of what is not merged."""
    if not (isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size):
        return []
    return [(part.device, part.data.unsafe_buffer_pointer()) for part in leaf.addressable_shards]
