"""DC-Merge, merging with directional consistency (arXiv 2603.06242)."""

import functools

import jax.numpy as jnp

from tadrop_jax import linalg
from tadrop_jax.matrices import matrix_rule
from tadrop_jax.parameters import choice, fixed, single, whole
from tadrop_jax.rules.tsv_m import leading_rank, side_by_side
from tadrop_jax.selection import kth_largest_magnitude, magnitude
from tadrop_jax.steps import Step, over_tasks


def dc_merge(
    keep=0.001,
    coefficient=1.0,
    *,
    smoothing: str | None = None,
    ratio=5.0,
    rank: int | None = None,
    mean_only=(),
    null_directions: str = "drop",
) -> Step:
    r"""Merges the tasks in a common orthogonal frame, in which each has a block of its own.

    .. math::

      \tau_t \approx U_t S_t V_t^T \text{ of rank } r, \quad C = P([U_1 \dots U_T]), \; D = P([V_1 \dots V_T]), \quad
      M_t = C^T U_t S_t V_t^T D, \quad \tau = C \, (B \odot ties(top(M_1) \dots top(M_T))) \, D^T

    where P is the orthogonal factor of the polar decomposition, top keeps the entries of largest magnitude, ties is the
    mean of those that agree with the sign of their sum, and B keeps the T blocks on the diagonal. Tensors that are no
    matrices get the mean.

    ``Tobeginwith/DC-Merge``, full fine-tuning: the defaults, with ``mean_only="text_projection"`` and
    ``null_directions="keep"``; LoRA of rank 16: ``rank=16, smoothing="average"`` (or ``"linear"`` with ``ratio=5.0``).
    Without ``rank`` the kept count is a share of min(out, in) squared, with it of rT squared, as in their two scripts.

    Args:
      keep: share of the entries of M that top keeps, in [0, 1], at least one entry; a Python number.
      coefficient: multiplies the merged vector.
      smoothing: of a task's singular values, their sum kept: ``"average"`` makes them equal, ``"linear"`` lets them
        fall evenly, None leaves them.
      ratio: of the largest to the smallest singular value, at most, for ``"linear"``; at least 1.
      rank: r; None means that of :func:`tadrop_jax.tsv_m`, min(out, in) / T rounded down, at least 1. At most
        min(out, in) counts.
      mean_only: regular expression(s) of matrices that get the mean, such as embeddings.
      null_directions: what becomes of directions whose singular value is 0 to rounding, see :func:`tadrop_jax.tsv_m`.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for a number out of range, or an unknown choice.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]])}
      >>> tj.merge_task_vectors(stack, tj.dc_merge())["w"].tolist()
      [[3.0, 0.0], [0.0, 2.0]]
    """
    keep = fixed("dc_merge", "keep", keep, 0, 1)
    ratio = single("dc_merge", "ratio", ratio, 1)
    rank = None if rank is None else whole("dc_merge", "rank", rank, 1)
    choice("dc_merge", "smoothing", smoothing, (None, "average", "linear"))
    choice("dc_merge", "null_directions", null_directions, ("drop", "keep"))
    options = {"keep": keep, "smoothing": smoothing, "ratio": ratio, "rank": rank}
    return matrix_rule(
        "dc_merge",
        functools.partial(merge, **options, keep_null=null_directions == "keep"),
        coefficient=coefficient,
        mean_only=mean_only,
        note=lambda shape, tasks: {"rank": _rank(min(shape), tasks, rank)},
        **options,
        null_directions=null_directions,
    )


def _rank(size: int, tasks: int, rank: int | None) -> int:
    return leading_rank(size, tasks) if rank is None else min(rank, size)


def merge(stack, keep: float, smoothing=None, ratio=5.0, rank: int | None = None, keep_null: bool = False):
    """The formula: ``(T, out, in)`` to ``(out, in)``."""
    tasks, size = stack.shape[0], min(stack.shape[1:])
    r = _rank(size, tasks, rank)
    u, s, vt = linalg.svd(stack)
    u, s, vt, real = u[..., :r], s[:, :r], vt[:, :r], linalg.not_null(s)[:, :r]
    left, right = (linalg.polar(side, keep_null) for side in side_by_side(u, vt, real, keep_null))
    s = smoothed(s, smoothing, ratio)
    inner = linalg.matmul(linalg.matmul(left.T, u) * s[:, None, :], linalg.matmul(vt, right.T))
    count = max(1, int(keep * (size if rank is None else r * tasks) ** 2))
    cut = kth_largest_magnitude(inner, min(count, inner[0].size), axis=(1, 2))
    top = jnp.where(magnitude(inner) >= jnp.reshape(cut, (-1, 1, 1)), inner, 0)
    sign = jnp.sign(over_tasks(jnp.add, top))
    agree = (jnp.sign(top) == sign) & (sign != 0)
    agreed = over_tasks(jnp.add, agree.astype(jnp.float32))
    mean = over_tasks(jnp.add, jnp.where(agree, top, 0)) / jnp.maximum(agreed, 1)
    block = jnp.arange(r * tasks) // r
    return linalg.matmul(left, jnp.where(block[:, None] == block, mean, 0), right)


def smoothed(s, smoothing: str | None, ratio):
    """Singular values ``(T, r)`` with the same sum, equal or falling evenly."""
    if smoothing is None:
        return s
    total, r = jnp.sum(s, axis=-1, keepdims=True), s.shape[-1]
    if smoothing == "average":
        return jnp.broadcast_to(total / r, s.shape)
    zero = s[:, -1:] == 0
    first = jnp.minimum(ratio, jnp.where(zero, ratio, s[:, :1] / jnp.where(zero, 1, s[:, -1:])))
    falling = first + (1 - first) * jnp.linspace(0, 1, r, dtype=s.dtype)
    return total * falling / jnp.sum(falling, axis=-1, keepdims=True)
