"""Random numbers that depend on seed, tensor, task and position alone.

A mask must be the same streamed, in memory and sharded, so nothing may depend on the shape of a block. The key of a
tensor is the user's key folded with the crc32 of the tensor's path; the task is folded in next; the 64-bit position of
an entry is the counter of one threefry-2x32 block. For a vector this equals ``jax.random.bits(key, (n,), "uint32")``
under ``jax_threefry_partitionable``. Of several random steps in a chain the second and later ones have their number
folded into the tensor's key, or they would draw what the first drew.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_prng_impl

from tadrop_jax.errors import MergeError

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


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


def drawn(key: jax.Array, draw: int) -> jax.Array:
    """The key of a draw from 0 on: a chain's second random step must not draw the numbers of its first."""
    return jax.random.fold_in(key, (1 << 31) + draw) if draw else key  # tasks are folded in from 0 on


def uniform(key: jax.Array, tasks: Sequence[int], high: jax.Array, low: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1) with 24 random bits for each task and position.

    Args:
      key: typed key of the tensor.
      tasks: indices of T tasks.
      high: uint32 of shape S, upper half of the positions.
      low: uint32, lower half, of the same shape.

    Returns:
      float32 array ``(T, *S)``, elementwise in S: what is compared with it need not hold it.
    """
    of_task = jax.vmap(lambda task: jax.random.key_data(jax.random.fold_in(key, task)))(jnp.array(tasks, jnp.uint32))
    a, b = _threefry(jnp.reshape(of_task.T, (2, -1, *(1,) * low.ndim)), high, low)
    return ((a ^ b) >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _threefry(key, high, low) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of 20 rounds (Salmon et al. 2011), unrolled: JAX's own is a loop on CPU, and goes through memory.

    Args:
      key: uint32 ``(2, ...)``.
      high: uint32, the first word of the counters.
      low: uint32, the second.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    a, b = high + keys[0], low + keys[1]
    for i in range(5):
        for turn in _ROTATIONS[i % 2]:
            a += b
            b = ((b << turn) | (b >> (32 - turn))) ^ a
        a += keys[(i + 1) % 3]
        b += keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return a, b
