"""Exact integers up to 2^48 inside jit, where JAX has 32 bits only.

Counts over a tree pass 2^31, and ``floor(q * n)`` in float32 is wrong beyond n = 2^24 (GPT-2's embedding has 38.6 M
entries). A :class:`Wide` holds a count in two limbs of base 2^16; the high limb has 32 bits.
"""

import fractions
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from tadrop_jax.trees import is_traced

_BASE = 16
_MASK = (1 << _BASE) - 1
MAX = (1 << 48) - 1


class Wide(NamedTuple):
    """``high * 2^16 + low`` with ``low < 2^16``; both uint32 arrays of one shape, of NumPy if they are concrete."""

    high: Any
    low: Any


def wide(value) -> Wide:
    """Turns a Python int, a uint32 array or a :class:`Wide` into a :class:`Wide`; what is concrete, into one of NumPy.

    The arithmetic below then stays with NumPy, which is many times faster than dispatching it.

    Raises:
      OverflowError: if a Python int is negative or above 2^48 - 1.
    """
    if isinstance(value, Wide):
        return value
    if isinstance(value, (int, np.integer)):
        if not 0 <= int(value) <= MAX:
            raise OverflowError(f"{value} is outside [0, 2^48)")
        return Wide(np.uint32(int(value) >> _BASE), np.uint32(int(value) & _MASK))
    value = (jnp if is_traced(value) else np).asarray(value).astype(np.uint32)
    return Wide(value >> _BASE, value & _MASK)


def add(a: Wide, b: Wide) -> Wide:
    """``a + b``, elementwise."""
    low = a.low + b.low
    return Wide(a.high + b.high + (low >> _BASE), low & _MASK)


def subtract(a: Wide, b: Wide) -> Wide:
    """``a - b``, elementwise, for ``a >= b``."""
    low = a.low + np.uint32(1 << _BASE) - b.low
    return Wide(a.high - b.high - (1 - (low >> _BASE)), low & _MASK)


def at_least(a: Wide, b: Wide) -> jax.Array:
    """``a >= b``, elementwise."""
    return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def where(condition, a: Wide, b: Wide) -> Wide:
    """``a`` where the condition holds, else ``b``."""
    xp = jnp if is_traced((condition, a, b)) else np
    return Wide(xp.where(condition, a.high, b.high), xp.where(condition, a.low, b.low))


def minimum(a: Wide, b: Wide) -> Wide:
    """The smaller of the two, elementwise."""
    return where(at_least(a, b), b, a)


def maximum(a: Wide, b: Wide) -> Wide:
    """The larger of the two, elementwise."""
    return where(at_least(a, b), a, b)


def psum(a: Wide, axis_names) -> Wide:
    """Sum over mesh axes (for at most 2^16 devices)."""
    high, low = lax.psum(a, axis_names)
    return Wide(high + (low >> _BASE), low & _MASK)


def to_int(value):
    """The exact Python int of a concrete scalar :class:`Wide`, or a tuple of them for a vector."""
    if not isinstance(value, Wide):
        return int(value)
    exact = np.asarray(value.high).astype(object) * (1 << _BASE) + np.asarray(value.low).astype(object)
    return int(exact) if np.ndim(exact) == 0 else tuple(int(v) for v in exact)


def floor_times(q, n) -> "int | Wide":
    """``floor(q * n)``, exact: in float64 for a Python float, in integers for a float32 array.

    Args:
      q: share in [0, 1]: a Python (or NumPy) number, or a float32 array, traced or not. A share outside [0, 1] is
        clipped when it is an array.
      n: number of entries, a Python int below 2^48; or counts, a uint32 array, traced or not.

    Returns:
      A Python int for Python numbers (``math.floor(q * n)``, what NumPy and mergekit compute), else a :class:`Wide`
      of the arrays' shape.
    """
    n = int(n) if isinstance(n, np.integer) else n
    counts = not isinstance(n, int)
    if isinstance(q, (float, int, np.floating, np.integer)):
        return _float64_times_counts(float(q), jnp.asarray(n)) if counts else math.floor(float(q) * n)
    if not counts and not isinstance(q, Tracer):
        return _floor_times_on_host(np.asarray(q, np.float32), n)
    factor = (
        [(n >> (_BASE * j)) & _MASK for j in range(2)] if counts else [(n >> (_BASE * j)) & _MASK for j in range(4)]
    )
    q = jnp.clip(jnp.asarray(q, jnp.float32), 0, 1)
    bits = lax.bitcast_convert_type(q, jnp.uint32)
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | (jnp.uint32(1) << 23)
    # q = mantissa * 2^(exponent - 150): multiply in limbs of 16 bits, then shift right. Subnormals give 0.
    shift = 150 - exponent
    zero = jnp.zeros(jnp.broadcast_shapes(bits.shape, jnp.shape(n)), jnp.uint32)
    bits, shift, exponent = bits + zero, shift + zero, exponent + zero
    limbs = [zero] * 6
    for i, m in enumerate((mantissa & _MASK, mantissa >> _BASE)):
        limbs = _add_product(limbs, i, m, factor)
    stack = jnp.stack([*limbs, zero, zero])
    word, bit = (shift >> 4).astype(jnp.int32), shift & 15

    def limb(i):
        at = jnp.clip(word + i, 0, 6)[None]
        low, high = (jnp.take_along_axis(stack, jnp.minimum(at + o, 7), axis=0)[0] for o in (0, 1))
        return ((low >> bit) | (high << (_BASE - bit))) & _MASK

    found = Wide(limb(1) | (limb(2) << _BASE), limb(0))
    tiny = exponent == 0
    return Wide(jnp.where(tiny, 0, found.high), jnp.where(tiny, 0, found.low))


def _add_product(limbs: list, at: int, digit, factor: list) -> list:
    """Adds ``digit * factor * 2^(16 at)`` to a number in limbs of 16 bits."""
    limbs, carry = list(limbs), jnp.uint32(0)
    for j, f in enumerate(factor):
        product = limbs[at + j] + digit * jnp.asarray(f, jnp.uint32) + carry
        limbs[at + j], carry = product & _MASK, product >> _BASE
    if at + len(factor) < len(limbs):
        limbs[at + len(factor)] = limbs[at + len(factor)] + carry
    return limbs


def _float64_times_counts(q: float, n: jax.Array) -> Wide:
    """``math.floor(q * n)`` with the product rounded to float64, as Python rounds it, for uint32 counts."""
    # 96 bits after the point: exact down to q = 2^-43, below which the product of 32 bits stays below 1.
    digits = int(fractions.Fraction(min(max(q, 0.0), 1.0)) * (1 << 96))
    factor = [n & _MASK, n >> _BASE]
    limbs = [jnp.zeros(n.shape, jnp.uint32)] * 9
    for i in range(7):
        limbs = _add_product(limbs, i, jnp.uint32((digits >> (_BASE * i)) & _MASK), factor)
    whole = limbs[6] | (limbs[7] << _BASE)
    # Rounded to 53 bits, the product reaches the next whole number if the bits after the point that count are all one.
    first, second = ~(limbs[4] | (limbs[5] << _BASE)), ~(limbs[2] | (limbs[3] << _BASE))
    ones = jnp.where(first == 0, 32 + lax.clz(second), lax.clz(first))
    return wide(whole + (ones >= 53 - (32 - lax.clz(whole)) + 1).astype(jnp.uint32))


def _floor_times_on_host(q: np.ndarray, n: int) -> Wide:
    """The same for a concrete array, without the dozens of dispatches that the limbs would take."""
    bits = np.ravel(np.clip(q, 0, 1)).view(np.uint32).astype(object)
    exponents, mantissas = bits >> 23, (bits & 0x7FFFFF) | (1 << 23)
    found = [0 if e == 0 else (m * n) >> (150 - e) for e, m in zip(exponents, mantissas, strict=True)]
    limbs = ([f >> _BASE for f in found], [f & _MASK for f in found])
    return Wide(*(np.array(limb, np.uint32).reshape(q.shape) for limb in limbs))
