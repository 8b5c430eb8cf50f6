r"""Spectral decompositions of batches of matrices, with gradients that are finite everywhere.

Everything takes leading axes and traces inside ``jit``, ``vmap`` and ``grad``.

**Gradients.** The derivative of a singular vector holds :math:`1 / (s_i^2 - s_j^2)`, which says how fast two
directions turn into each other, and has no value where they are equally strong. Such inverse gaps are taken as 0 where
the gap :math:`|s_i - s_j|`, or a singular value itself, is at most :data:`GAP` times the largest singular value: 100
units in the last place, about what rounding leaves of a gap; and everywhere, if the largest is below 1e-30. Away from
that the gradients are exact. A result that does not depend on the choice of basis inside a repeated singular value
should be asked for as a whole (:func:`polar`, :func:`truncate`): it has a derivative of its own, which is exact there.

**Rank.** Directions whose singular value is at most :data:`NULL` times the largest are *null*: they are what rounding
made of zero (up to 9 units in the last place were seen at 768 rows), and LAPACK picks them freely.

**Routes.** ``benchmarks/linear_algebra.py`` measures the cheaper ones; figures are for 768 rows or columns on a CPU.
The SVD of a matrix at least :data:`TALL` times as long as it is wide goes through QR: the same digits in .8 to .9 of
the time. The eigen-decomposition of the Gram matrix (.2 to .7 of the time) is not used: its eigenvalues are squares, so
float32 loses half of the digits of what is small, and polar factors are wrong by .005. Nor are Newton-Schulz steps for
the polar factor: they have all digits where the rank is full, but turn null directions into rotations of unit length,
and take five times as long on a CPU. An accelerator was not at hand.

**Batches on a CPU** go to LAPACK one matrix at a time. jaxlib up to 0.11 hands a batch out to the very threads that
wait for it (``ParallelBatchMap``): as many batches at once as there are threads, as in a merge of several tensors, may
wait for ever.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

#: Gaps below this share of the largest singular value (or eigenvalue) count as none: 100 float32 epsilons.
GAP = 100 * float(np.finfo(np.float32).eps)

#: Singular values up to this share of the largest count as zero: 32 float32 epsilons.
NULL = 32 * float(np.finfo(np.float32).eps)

#: From this ratio of the sides on, QR goes before the SVD.
TALL = 4

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def matmul(*factors) -> jax.Array:
    """The product of matrices (or batches of them) in full float32 precision, also where a fast product rounds more.

    Of several the order is the cheapest: a projection ``u ut x`` of tall matrices must not go through ``u ut``.
    """
    return functools.reduce(_dot, factors) if len(factors) < 3 else _dot(*map(_product, _parted(factors)[1]))


def _product(factors) -> jax.Array:
    return matmul(*factors) if len(factors) > 1 else factors[0]


def _parted(factors) -> tuple[int, tuple]:
    """Multiplications of the cheapest order, and what it multiplies last; of equals the one from the left."""
    if len(factors) == 1:
        return 0, (factors,)
    ways = [(factors[:k], factors[k:]) for k in range(len(factors) - 1, 0, -1)]

    def work(way) -> int:
        left, right = way
        last = left[0].shape[-2] * right[0].shape[-2] * right[-1].shape[-1]
        return last + _parted(left)[0] + _parted(right)[0]

    best = min(ways, key=work)
    return work(best), best


def _one_at_a_time(decompose):
    """The function, on CPUs without batches: neither those of leading axes, nor those that ``vmap`` makes."""
    alone = jax.custom_batching.sequential_vmap(decompose)

    def chosen(a):
        looped = alone
        for _ in range(a.ndim - 2):
            looped = jax.vmap(looped)
        return jax.lax.platform_dependent(a, cpu=looped, default=decompose)

    return chosen


_qr = _one_at_a_time(lambda a: tuple(jnp.linalg.qr(a)))
_svd = _one_at_a_time(lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)))
_eigh = _one_at_a_time(lambda a: tuple(jnp.linalg.eigh(a, symmetrize_input=True)))


@jax.custom_jvp
def svd(a) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin singular value decomposition.

    Args:
      a: float32 ``(..., m, n)``; k is the smaller of m and n.

    Returns:
      ``u (..., m, k)``, ``s (..., k)`` from the largest down, ``vt (..., k, n)``.

    Example:
      >>> u, s, vt = svd(jnp.diag(jnp.array([2.0, 0.0, 3.0])))
      >>> s.tolist()
      [3.0, 2.0, 0.0]
    """
    m, n = a.shape[-2:]
    if n and m >= TALL * n:
        q, r = _qr(a)
        u, s, vt = _svd(r)
        return matmul(q, u), s, vt
    if m and n >= TALL * m:
        v, s, ut = svd(_t(a))
        return _t(ut), s, _t(v)
    return _svd(a)


@svd.defjvp
def _svd_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    u, s, vt = svd(a)
    unit, scale = _unit(s)
    da, ut, v = da * scale[..., None], _t(u), _t(vt)
    dp = matmul(ut, da, v)
    row, column = unit[..., :, None], unit[..., None, :]
    turn = _inverse(column - row) * _inverse(row + column)
    du = matmul(u, turn * (dp * column + row * _t(dp)))
    dv = matmul(v, turn * (row * dp + _t(dp) * column))
    inverse = _inverse(unit)[..., None, :]
    dav, dau = matmul(da, v), matmul(_t(da), u)
    if a.shape[-2] > a.shape[-1]:
        du = du + (dav - matmul(u, ut, dav)) * inverse
    if a.shape[-2] < a.shape[-1]:
        dv = dv + (dau - matmul(v, vt, dau)) * inverse
    ds = jnp.diagonal(matmul(ut, tangents[0], v), axis1=-2, axis2=-1)
    return (u, s, vt), (du, ds, _t(dv))


@jax.custom_jvp
def eigh(a) -> tuple[jax.Array, jax.Array]:
    """Eigen-decomposition of symmetric matrices.

    Args:
      a: float32 ``(..., n, n)``; the symmetric part counts.

    Returns:
      ``values (..., n)`` from the smallest up, and ``vectors (..., n, n)`` in columns.

    Example:
      >>> eigh(jnp.array([[2.0, 1.0], [1.0, 2.0]]))[0].round(5).tolist()
      [1.0, 3.0]
    """
    return _eigh(a)


@eigh.defjvp
def _eigh_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    values, vectors = eigh(a)
    da = (da + _t(da)) / 2
    dp = matmul(_t(vectors), da, vectors)
    unit, scale = _unit(values)
    turn = _inverse(unit[..., None, :] - unit[..., :, None])
    return (values, vectors), (
        jnp.diagonal(dp, axis1=-2, axis2=-1),
        matmul(vectors, turn * (dp * scale[..., None])),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def polar(a, keep_null: bool = False) -> jax.Array:
    r"""The orthogonal factor of the polar decomposition, :math:`U V^T` of the thin SVD.

    It is the nearest matrix with orthonormal columns (or rows). Where the matrix has null directions, that part of the
    factor is arbitrary: it is left out, so that the result is a partial isometry, the same on every platform.

    Args:
      a: float32 ``(..., m, n)``.
      keep_null: keep the null directions as the SVD happened to pick them. They are constants for gradients.

    Returns:
      float32 ``(..., m, n)``.

    Example:
      >>> polar(jnp.array([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]])).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    u, s, vt = svd(a)
    return matmul(u, vt) if keep_null else matmul(u * not_null(s)[..., None, :], vt)


@polar.defjvp
def _polar_jvp(keep_null, primals, tangents):
    (a,), (da,) = primals, tangents
    u, s, vt = svd(a)
    kept = jnp.full(s.shape, True) if keep_null else not_null(s)
    out = matmul(u * kept[..., None, :], vt)
    # In the basis of the singular vectors the derivative is antisymmetric, over sums of singular values: no gaps.
    unit, scale = _unit(s)
    row, column = kept[..., :, None], kept[..., None, :]
    da = da * scale[..., None]
    dp = matmul(_t(u), da, _t(vt))
    turned = jnp.where(row & column, dp - _t(dp), jnp.where(row | column, dp, 0))
    turn = turned * _inverse(unit[..., :, None] + unit[..., None, :])
    inverse = (kept * _inverse(unit))[..., None]
    tangent = matmul(u, turn, vt)
    if a.shape[-2] > a.shape[-1]:
        dav = matmul(da, _t(vt))
        tangent = tangent + matmul(dav - matmul(u, _t(u), dav), inverse * vt)
    if a.shape[-2] < a.shape[-1]:
        uda = matmul(_t(u), da)
        tangent = tangent + matmul(u * _t(inverse), uda - matmul(uda, _t(vt), vt))
    return out, tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def truncate(a, rank: int) -> jax.Array:
    """The nearest matrix of at most this rank: the leading triples of the SVD, multiplied.

    Args:
      a: float32 ``(..., m, n)``.
      rank: how many triples to keep, from 0 on.

    Returns:
      float32 ``(..., m, n)``.

    Example:
      >>> truncate(jnp.diag(jnp.array([2.0, 1.0, 3.0])), 1).tolist()
      [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]
    """
    u, s, vt = svd(a)
    return matmul(u[..., :rank] * s[..., None, :rank], vt[..., :rank, :])


@truncate.defjvp
def _truncate_jvp(rank, primals, tangents):
    (a,), (da,) = primals, tangents
    u, s, vt = svd(a)
    kept = jnp.arange(s.shape[-1]) < rank
    ur, vtr = u[..., :rank], vt[..., :rank, :]
    out = matmul(ur * s[..., None, :rank], vtr)
    # What lies in the kept rows or columns stays; kept and dropped directions turn into each other over their gap.
    dp = matmul(_t(u), da, _t(vt))
    unit, _ = _unit(s)
    row, column = unit[..., :, None], unit[..., None, :]
    strong, weak = jnp.maximum(row, column), jnp.minimum(row, column)
    turned = strong * _inverse(strong - weak) * _inverse(strong + weak) * (strong * dp + weak * _t(dp))
    both, one = kept[:, None] & kept[None, :], kept[:, None] != kept[None, :]
    inside = jnp.where(both, dp, jnp.where(one, turned, 0))
    tangent = matmul(u, inside, vt)
    if a.shape[-2] > a.shape[-1]:
        dav = matmul(da, _t(vtr))
        tangent = tangent + matmul(dav - matmul(u, _t(u), dav), vtr)
    if a.shape[-2] < a.shape[-1]:
        uda = matmul(_t(ur), da)
        tangent = tangent + matmul(ur, uda - matmul(uda, _t(vt), vt))
    return out, tangent


def not_null(s, largest=None) -> jax.Array:
    """Which singular values are more than rounding.

    Args:
      s: float32 ``(..., k)``, from the largest down.
      largest: what they are measured against, ``(..., 1)``; None means the largest of them.

    Returns:
      bool ``(..., k)``.
    """
    return (s > NULL * (s[..., :1] if largest is None else largest)) & (s > 0)


def _t(a):
    return jnp.swapaxes(a, -1, -2)


def _unit(s):
    """Singular values (or eigenvalues) over the largest, and one over the largest; zeros if there is nothing."""
    largest = jnp.max(jnp.abs(s), axis=-1, keepdims=True)
    nothing = largest < 1e-30
    scale = jnp.where(nothing, 0, 1 / jnp.where(nothing, 1, largest))
    return s * scale, scale


def _inverse(value):
    """``1 / value``, and 0 where its size is at most GAP."""
    small = jnp.abs(value) <= GAP
    return jnp.where(small, 0, 1 / jnp.where(small, 1, value))
