"""Random numbers that depend on seed, tensor, task and position alone.

A mask must be the same streamed, in memory and sharded, so nothing may depend on the shape of a block. The key of a
tensor is the user's key folded with the crc32 of the tensor's path; the task is folded in next; the 64-bit position of
an entry is the counter of one threefry-2x32 block. For a vector this equals ``jax.random.bits(key, (n,), "uint32")``
under ``jax_threefry_partitionable``.
"""

import zlib

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p, threefry_prng_impl

from tadrop_jax.errors import MergeError


def check_key(key) -> jax.Array:
    """A typed threefry key from what the user gave.

    Raises:
      MergeError: for a key of another generator, or an array that is no single key.
    """
    if not isinstance(key, jax.Array):
        raise MergeError(f"key must come from jax.random.key(seed), got {type(key).__name__}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape != (2,) or key.dtype != jnp.uint32:
            raise MergeError(f"key must come from jax.random.key(seed), got {key.dtype}{list(key.shape)}")
        return jax.random.wrap_key_data(key, impl=threefry_prng_impl)
    if str(jax.random.key_impl(key)) != str(jax.random.key_impl(jax.random.key(0, impl="threefry2x32"))):
        raise MergeError(f"key must be a threefry2x32 key, got {jax.random.key_impl(key)}")
    if key.shape != ():
        raise MergeError(f"key must be one key, got an array of keys of shape {key.shape}")
    return key


def check_needed(needed: bool, key) -> jax.Array | None:
    """The key, checked, if one is needed.

    Raises:
      MergeError: if there is none, or one of the wrong kind.
    """
    if not needed:
        return None
    if key is None:
        raise MergeError("this method is random: pass key=jax.random.key(seed)")
    return check_key(key)


def tensor_key(key: jax.Array, name: str) -> jax.Array:
    """The key of the tensor of this name: a stable hash, the same on every machine."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def uniform(key: jax.Array, task: int | jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1) with 24 random bits for each position.

    Args:
      key: typed key of the tensor.
      task: index of the task.
      high: uint32, upper half of the positions.
      low: uint32, lower half, of the same shape.

    Returns:
      float32 array of the shape of ``low``.
    """
    k1, k2 = jax.random.key_data(jax.random.fold_in(key, task))
    a, b = threefry2x32_p.bind(*(jnp.broadcast_to(v, low.shape) for v in (k1, k2)), high, low)
    return ((a ^ b) >> 8).astype(jnp.float32) * jnp.float32(2**-24)
