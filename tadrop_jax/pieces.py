"""Pieces of tensors as steps see them, and the positions of their entries in 64 bits."""

import math

import jax.numpy as jnp
from jax import lax

from tadrop_jax.steps import Piece


def piece_of(raw, site_order, tasks: int, key, shape, offsets=None) -> Piece:
    """The piece that a step sees: task vectors in float32, whatever the storage dtype."""
    base, models = raw
    if base is None:
        stack = models[0].astype(jnp.float32)
    else:
        base = base.astype(jnp.float32)
        stack = jnp.stack([m.astype(jnp.float32) - base for m in models])
    local = stack.shape[1:]

    def position():
        return positions(local, shape, site_order, offsets)

    return Piece(stack, base, tuple(range(tasks)), key, position, math.prod(local), site_order)


def positions(local, shape, order=None, offsets=None):
    """Row-major positions, in PyTorch order, of a shard of shape ``local``: high and low halves of 64 bits."""
    high = low = jnp.zeros(local, jnp.uint32)
    for axis in order or range(len(shape)):
        index = lax.broadcasted_iota(jnp.uint32, local, axis)
        if offsets is not None:
            index = index + offsets[axis]
        high, low = _times_plus(high, low, shape[axis], index)
    return high, low


def _times_plus(high, low, factor: int, addend):
    """``value * factor + addend`` in 64 bits, for a factor below 2^32."""
    f1, f0 = jnp.uint32(factor >> 16), jnp.uint32(factor & 0xFFFF)
    a1, a0 = low >> 16, low & 0xFFFF
    middle = (a0 * f0 >> 16) + (a0 * f1 & 0xFFFF) + (a1 * f0 & 0xFFFF)
    carried = a1 * f1 + (a0 * f1 >> 16) + (a1 * f0 >> 16) + (middle >> 16)
    product = (a0 * f0 & 0xFFFF) | (middle << 16)
    total = product + addend
    return high * jnp.uint32(factor) + carried + (total < addend).astype(jnp.uint32), total
