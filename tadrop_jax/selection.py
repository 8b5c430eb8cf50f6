"""Exact order statistics by counting: no sort, no copy, no gather.

For non-negative floats the IEEE bit pattern grows with the value, so the k-th largest is found by counting how many
patterns lie at or above a few pivots, narrowing the range, and counting again. Each round is one fused pass over the
data with a tiny result that adds up over blocks, tensors and devices. A round of 7 pivots settles 3 bits: 11 rounds
for float32, 5 or 6 for the 16-bit types.
"""

import functools
import math
import operator
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from tadrop_jax import wide
from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.sampling import Selection, place
from tadrop_jax.trees import is_traced
from tadrop_jax.wide import Wide
from tadrop_jax.workers import cores, side_by_side

_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
BITS_PER_ROUND = 3
# The most that 32 bits count.
_COUNTED = (1 << 32) - 1
# On the host: so many entries, by the bytes of one, are partitioned where NumPy has fast vector code for that, few
# anywhere; of more, one of so many is a sample, and blocks are counted.
_PARTITION, _FEW, _STRIDE, _BLOCK = {2: 1 << 24, 4: 1 << 22}, 1 << 16, 64, 1 << 17


def ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned keys in the order of the values; -0 equals +0, NaN lies outside the infinities.

    Comparing keys is exact where comparing floats is not: XLA on CPU flushes subnormals to zero.

    Args:
      x: float array of any shape, or an unsigned integer array (returned as it is).

    Returns:
      Array of the same shape, unsigned of the same width.
    """
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return x
    uint = _UINT[x.dtype.itemsize]
    sign = uint(1 << (8 * x.dtype.itemsize - 1))
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), uint)
    bits = jnp.where(bits == sign, uint(0), bits)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def from_ordered_bits(keys: jax.Array, dtype) -> jax.Array:
    """The inverse of :func:`ordered_bits`."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return keys
    uint = _UINT[dtype.itemsize]
    sign = uint(1 << (8 * dtype.itemsize - 1))
    return lax.bitcast_convert_type(jnp.where(keys >= sign, keys ^ sign, ~keys), dtype)


def magnitude(x: jax.Array) -> jax.Array:
    """``|x|`` by clearing the sign bit, so that subnormals survive on CPU; gradients flow as through ``abs``."""
    return _magnitude(x)


@jax.custom_jvp
def _magnitude(x):
    uint = _UINT[x.dtype.itemsize]
    mask = uint((1 << (8 * x.dtype.itemsize - 1)) - 1)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, uint) & mask, x.dtype)


@_magnitude.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return _magnitude(x), jnp.sign(x) * t


def at_least(x: jax.Array, cut: jax.Array) -> jax.Array:
    """``x >= cut`` by bit patterns: exact for subnormals, and a constant for gradients."""
    return ordered_bits(x) >= ordered_bits(cut)


@jax.custom_jvp
def attached(found: jax.Array, values) -> jax.Array:
    """An order statistic with a gradient: that of the entries which are it, evenly split where several tie.

    Args:
      found: ``(T,)``, exact order statistics of ``values``.
      values: ``(T, *S)``, or several such arrays that were selected from together.

    Returns:
      ``found``, bit for bit.
    """
    return found


@attached.defjvp
def _(primals, tangents):
    (found, values), (_, moved) = primals, tangents
    total, count = jnp.zeros_like(found), jnp.zeros_like(found)
    for value, tangent in zip(jax.tree.leaves(values), jax.tree.leaves(moved), strict=True):
        axes = tuple(range(1, value.ndim))
        ties = ordered_bits(value) == ordered_bits(jnp.reshape(found, (-1, *(1,) * len(axes))))
        total += jnp.sum(jnp.where(ties, tangent, 0), axis=axes)
        count += jnp.sum(ties, axis=axes)
    return found, total / jnp.maximum(count, 1)


def count_at_least(keys, pivots, axes: Sequence[int], *, one_pass: bool = True) -> jax.Array:
    """Counts keys at or above each pivot.

    Args:
      keys: unsigned array of shape S.
      pivots: ``(P, *S')`` where S' is S with 1 on the reduced axes.
      axes: the axes of ``keys`` to count over, all non-negative.
      one_pass: one variadic reduction (fastest on one device or in ``shard_map``). Under plain ``jit`` on a sharded
        array it would be gathered; then take False: one reduction a pivot.

    Returns:
      uint32 counts of the shape of ``pivots``.
    """
    hits = tuple((keys >= pivots[i]).astype(jnp.uint32) for i in range(pivots.shape[0]))
    if one_pass:
        zeros = (jnp.uint32(0),) * len(hits)
        counts = lax.reduce(hits, zeros, lambda a, b: tuple(u + v for u, v in zip(a, b, strict=True)), tuple(axes))
    else:
        counts = tuple(jnp.sum(h, axis=tuple(axes), dtype=jnp.uint32) for h in hits)
    return jnp.stack([jnp.expand_dims(c, tuple(axes)) for c in counts])


def search(
    count: Callable[[jax.Array], Wide],
    k: Wide,
    bits: int,
    uint,
    *,
    group: int = BITS_PER_ROUND,
    eager: bool = False,
    varies: Sequence[str] = (),
) -> jax.Array:
    """The largest key that at least ``k`` keys reach, bit group by bit group.

    Args:
      count: maps pivots ``(P, *K)`` to the number of keys at or above each, a :class:`Wide` of the same shape.
      k: how many, shape K. For k = 0 the result is the largest pattern there is, which no number reaches.
      bits: width of the keys.
      uint: dtype of the keys.
      group: bits that a round settles, by ``2^group - 1`` pivots.
      eager: call ``count`` on concrete pivots, round by round, in place of tracing one loop.
      varies: see :func:`varying`, of what is counted.

    Returns:
      Keys of shape K.
    """
    rounds, wanted = -(-bits // group), Wide(*(limb[None] for limb in k))
    steps = jnp.reshape(jnp.arange(1, 1 << group, dtype=uint), (-1,) + (1,) * k.low.ndim)

    def narrow(i, found):
        shift = (group * (rounds - 1 - i)).astype(uint)
        # The first round has fewer bits than a group: pivots that would not fit the width do not count.
        fits = steps <= (uint(np.iinfo(uint).max) >> shift)
        reached = fits & wide.at_least(count(found[None] + (steps << shift)), wanted)
        return found + (jnp.sum(reached, axis=0).astype(uint) << shift)

    found = jnp.zeros(k.low.shape, uint)
    if eager:
        for i in range(rounds):
            found = narrow(jnp.uint32(i), found)
        return found
    found = lax.pcast(found, tuple(varies), to="varying") if varies else found
    # A loop, not unrolled: it compiles several times faster and runs about as fast.
    return lax.fori_loop(jnp.uint32(0), jnp.uint32(rounds), narrow, found)


def varying(*arrays) -> tuple[str, ...]:
    """The mesh axes that arrays vary over: inside the user's ``shard_map``, where types say so."""
    types = [jax.typeof(array) for array in arrays if is_traced(array)]
    # jax 0.10 keeps them among what it knows of manual axes.
    seen = [getattr(t, "manual_axis_type", None) or t for t in types]
    return tuple(sorted({axis for t in seen for axis in getattr(t, "varying", None) or getattr(t, "vma", ())}))


def order_statistic(
    x, k: Wide, axes: Sequence[int], *, axis_names=(), one_pass: bool = True, made: Callable | None = None
) -> jax.Array:
    """The k-th largest of ``x`` over ``axes``, for several k at once.

    Args:
      x: float or unsigned array of shape S.
      k: ``(R, *S')``: R ranks for each position of S', which is S with 1 on the reduced axes.
      axes: the axes of ``x`` to reduce.
      axis_names: mesh axes that ``x`` is sharded over, inside ``shard_map``.
      one_pass: see :func:`count_at_least`.
      made: ``pivots -> x``, made anew for each round of counting (:func:`anew`), so that ``x`` is never held.

    Returns:
      Array ``(R, *S')`` of the dtype of ``x``; constant for gradients.
    """
    keys = ordered_bits(x)

    def count(pivots):
        if made is None:
            flat = jnp.reshape(pivots, (-1, *pivots.shape[2:]))
            counts = exact_count(keys, flat, axes, one_pass)
            counts = Wide(*(jnp.reshape(c, pivots.shape) for c in counts))
        else:  # rank by rank: with many pivots at once XLA on CPU makes the keys one entry at a time
            again = ordered_bits(made(pivots))
            each = [exact_count(again, pivots[:, r], axes, one_pass) for r in range(pivots.shape[1])]
            counts = Wide(*(jnp.stack(limbs, axis=1) for limbs in zip(*each, strict=True)))
        return wide.psum(counts, axis_names) if axis_names else counts

    bits = 8 * keys.dtype.itemsize
    group, varies = bits_per_round(one_pass), varying(keys, *k)
    return from_ordered_bits(search(count, k, bits, keys.dtype.type, group=group, varies=varies), x.dtype)


def anew(arrays, pivots):
    """The arrays, so that what is made of them inside a round of counting is made in each round.

    XLA would make it before the first, and keep it: as much memory as all task vectors, and slower to read than the
    models that it is made of. What hangs on the pivots it has to make again.
    """
    return lax.optimization_barrier((lax.stop_gradient(arrays), pivots))[0]


def bits_per_round(one_pass: bool) -> int:
    """Several pivots cost one pass only if they are counted in one; else one bit a round is fastest."""
    return BITS_PER_ROUND if one_pass else 1


def exact_count(keys, pivots, axes, one_pass: bool = True) -> Wide:
    """:func:`count_at_least` as exact integers, also beyond 2^32 entries."""
    if math.prod(keys.shape[a] for a in axes) <= _COUNTED:
        return wide.wide(count_at_least(keys, pivots, axes, one_pass=one_pass))
    longest = max(axes, key=lambda a: keys.shape[a])
    halves = jnp.split(keys, [keys.shape[longest] // 2], axis=longest)
    return wide.add(*(exact_count(half, pivots, axes, one_pass) for half in halves))


def _reduced_axes(x, axis) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(x.ndim))
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    found = {a % x.ndim for a in axes if -x.ndim <= a < x.ndim}
    if len(found) != len(axes):
        raise ParameterError(f"axis must name axes of an array of shape {x.shape}, each once, got {axis}")
    return tuple(sorted(found))


def _entries(x, axes, of: str) -> int:
    n = math.prod(x.shape[a] for a in axes)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise MergeError(f"{of} takes a float array, got dtype {x.dtype}")
    if n == 0:
        raise MergeError(f"{of} of an empty array: shape {x.shape} has no entries over axes {axes}")
    return n


def kth_largest_magnitude(x, k, axis=None) -> jax.Array:
    """The exact k-th largest ``|x|``.

    Args:
      x: float array of any shape (float32, bfloat16, float16).
      k: from 1 (the largest) to the number of entries; a Python int, or an integer scalar, traced or not.
      axis: the axes that are reduced, an int or a tuple; None means all.

    Returns:
      Array of ``x``'s dtype, shape of ``x`` without the reduced axes.

    Raises:
      MergeError: for an empty or non-float ``x``.
      ParameterError: for a concrete ``k`` that is no whole number in [1, number of entries], or axes that ``x`` does
        not have.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> float(tj.kth_largest_magnitude(jnp.array([3.0, -5.0, 1.0]), 2))
      3.0
    """
    x = _array(x)
    axes = _reduced_axes(x, axis)
    n = _entries(x, axes, "kth_largest_magnitude")
    if not is_traced(k):
        try:
            k = operator.index(k)
        except TypeError:
            raise ParameterError(f"k must be a whole number, got {k!r}") from None
        if not 1 <= k <= n:
            raise ParameterError(f"k must lie in [1, {n}], got {k}")
        if axes == tuple(range(x.ndim)):
            return _array(_select(x, (k,))[0])
    return _select_over(x, wide.wide(k), axes, _one_pass(x))


def magnitude_quantile(x, q, method: str = "linear") -> jax.Array:
    """Quantile of ``|x|``, as ``numpy.quantile(abs(x), q, method=method)``.

    Args:
      x: float array of any shape.
      q: in [0, 1]; a Python float (position in float64, as NumPy) or a float32 scalar (exact integer position).
      method: ``"linear"`` (NumPy's default) or ``"lower"`` (the order statistic below: what TADrop takes).

    Returns:
      Scalar of ``x``'s dtype; ``"linear"`` interpolates in float32.

    Raises:
      MergeError: for an empty or non-float ``x``.
      ParameterError: for an unknown method, a concrete ``q`` outside [0, 1], or several.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> float(tj.magnitude_quantile(jnp.array([0.0, -1.0, 2.0]), 0.75))
      1.5
    """
    x = _array(x)
    axes = tuple(range(x.ndim))
    n = _entries(x, axes, "magnitude_quantile")
    if method not in ("linear", "lower"):
        raise ParameterError(f"method must be 'linear' or 'lower', got {method!r}")
    if np.ndim(q):
        raise ParameterError(f"q must be one number, got an array of shape {np.shape(q)}: jax.vmap takes several")
    if not is_traced(q) and not 0 <= float(q) <= 1:
        raise ParameterError(f"q must lie in [0, 1], got {q}")
    low = wide.floor_times(q, n - 1)
    if isinstance(low, int):
        k_low, k_high = n - low, max(n - low - 1, 1)
    else:
        one = wide.wide(1)
        k_low = wide.subtract(wide.wide(n), low)
        k_high = wide.maximum(one, wide.subtract(wide.maximum(k_low, one), one))
    lower, higher = _select(x, (k_low, k_high))
    if method == "lower":
        return _array(lower)
    lo, hi = lower.astype(np.float32), higher.astype(np.float32)
    if isinstance(q, (float, int, np.floating, np.integer)):
        share = np.float32(float(q) * (n - 1) - math.floor(float(q) * (n - 1)))
        if isinstance(lo, np.generic):
            with np.errstate(all="ignore"):
                return _array((lo if lo == hi else lo + (hi - lo) * share).astype(x.dtype))
    else:
        share = _fraction(jnp.asarray(q, jnp.float32), n - 1)
    # Equal neighbours (infinities among them) must not give inf - inf.
    return jnp.where(ordered_bits(lo) == ordered_bits(hi), lo, lo + (hi - lo) * share).astype(x.dtype)


def _fraction(q, n: int):
    """``q * n - floor(q * n)`` for float32 q to 22 bits, or as many as 48 leave beside n, from exact floors."""
    digits = min(22, 48 - n.bit_length())
    whole, scaled = wide.wide(wide.floor_times(q, n)), wide.wide(wide.floor_times(q, n << digits))
    # scaled mod 2^digits, from its two limbs.
    rest = ((scaled.high << 16) | scaled.low) - ((whole.high << 16 | whole.low) << digits)
    return (rest & jnp.uint32((1 << digits) - 1)).astype(jnp.float32) / (1 << digits)


def _array(x) -> jax.Array:
    """As ``jnp.asarray``, without most of its microseconds for an array, or for a scalar of NumPy."""
    return x if isinstance(x, jax.Array) else _same(np.asarray(x)) if isinstance(x, np.generic) else jnp.asarray(x)


@jax.jit
def _same(x):
    return x


def _select(x, ks) -> list:
    """The k-th largest magnitudes of all entries, one for each k, an int or a Wide; of NumPy if found on the host."""
    if not is_traced((x, ks)) and x.dtype.itemsize in (2, 4) and _lies_on_host(x):
        return list(_on_host(np.asarray(x), [x.size - wide.to_int(k) for k in ks]))
    limbs = zip(*(wide.wide(k) for k in ks), strict=True)
    return list(_select_all(x, Wide(*(jnp.stack(limb) for limb in limbs)), _one_pass(x)))


@functools.partial(jax.jit, static_argnums=2)
def _select_all(x, k, one_pass: bool):
    k = Wide(*(jnp.reshape(limb, (-1,) + (1,) * x.ndim) for limb in k))
    return jnp.ravel(_of_magnitudes(x, k, tuple(range(x.ndim)), one_pass))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _select_over(x, k, axes: tuple[int, ...], one_pass: bool):
    shape = tuple(1 if a in axes else s for a, s in enumerate(x.shape))
    rank = Wide(*(jnp.broadcast_to(limb, (1, *shape)) for limb in k))
    return jnp.squeeze(_of_magnitudes(x, rank, axes, one_pass)[0], axes)


def _of_magnitudes(x, k, axes: tuple[int, ...], one_pass: bool):
    return order_statistic(magnitude(x), k, axes, one_pass=one_pass, made=lambda pivots: magnitude(anew(x, pivots)))


def _one_pass(x) -> bool:
    """What :func:`count_at_least` wants to know: whether an array is on one device, as far as can be seen."""
    if not is_traced(x):
        return len(x.devices()) == 1
    axes = jax.typeof(x).sharding.mesh.axis_types
    inside = bool(axes) and all(a == AxisType.Manual for a in axes)  # of shard_map: what this device holds
    return inside or jax.device_count() == 1


def _lies_on_host(x: jax.Array) -> bool:
    devices = list(x.devices())
    return len(devices) == 1 and devices[0].platform == "cpu"


@functools.cache
def _partitions_fast(itemsize: int) -> bool:
    """Whether NumPy partitions integers of so many bytes by vectors here, tried once: .1 to 1 ns an entry, or 4 to 8.

    For some processors it has no code for 16 bits, and on some that is slow (:mod:`tadrop_jax.processors`).
    """
    keys = np.random.default_rng(0).integers(0, 1 << 8 * itemsize, 1 << 15, f"u{itemsize}")
    took = []
    for _ in range(3):
        start = time.perf_counter()
        np.partition(keys, keys.size // 2)
        took.append(time.perf_counter() - start)
    return min(took) < 2e-9 * keys.size


def _on_host(x: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """Magnitudes at ranks from 0, the smallest: faster than counting where NumPy can do it, with all cores."""
    uint = np.dtype(f"u{x.dtype.itemsize}").type
    bits, mask = np.ravel(x).view(uint), uint((1 << (8 * x.dtype.itemsize - 1)) - 1)
    if bits.size <= _FEW or (bits.size <= _PARTITION[bits.itemsize] and _partitions_fast(bits.itemsize)):
        keys, known = bits & mask, [-1, bits.size]
        return np.array([place(keys, known, rank) for rank in ranks]).view(x.dtype)
    search = Selection(bits.size, [lambda found: np.array(ranks)[:, None]])
    search.bracket([(bits[::_STRIDE] & mask)[None]], narrow=True)

    def count(start):
        return search.count((bits[start : start + _BLOCK] & mask)[None])

    starts = range(0, bits.size, _BLOCK)
    while not search.settled:
        search.update(side_by_side(count, starts, max(min(cores(), len(starts) // 8), 1)))
    return search.found[0][:, 0].astype(uint).view(x.dtype)
