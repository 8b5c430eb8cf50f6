"""TSV-M, Task Singular Vectors (arXiv 2412.00081)."""

import functools

import jax.numpy as jnp

from tadrop_jax import linalg
from tadrop_jax.matrices import matrix_rule
from tadrop_jax.parameters import choice
from tadrop_jax.steps import Step


def tsv_m(coefficient=1.0, *, mean_only=(), null_directions: str = "drop") -> Step:
    r"""Keeps the leading singular triples of each task, and makes those of different tasks orthogonal.

    .. math::

      \tau_t \approx U_t S_t V_t^T \text{ of rank } r = \lfloor \min(out, in) / T \rfloor, \quad
      \tau = P([U_1 \dots U_T]) \; diag(S_1 \dots S_T) \; P([V_1 \dots V_T])^T

    where P is the orthogonal factor of the polar decomposition. Tensors that are no matrices get the mean.

    The rank is rounded as the authors round it, ``int(min(out, in) * (1 / T))``. Where T exceeds the size of a matrix
    it would be 0, and the authors' code drops the tensor; here each task keeps one triple. The report names the rank.

    ``AntoAndGar/task_singular_vectors`` (method ``TSVM``): ``mean_only="text_projection"``,
    ``null_directions="keep"``; the coefficient is what they look for on validation data. fusion-bench
    (``TaskSingularVectorMerging``): the same without ``mean_only``.

    Args:
      coefficient: multiplies the merged vector.
      mean_only: regular expression(s) of matrices that get the mean, such as embeddings.
      null_directions: what becomes of directions whose singular value is 0 to rounding (of a zero task vector, of
        LoRA deltas, of equal task vectors side by side): ``"drop"`` leaves them out; ``"keep"`` lets them take part
        in the polar factor as the SVD happened to pick them, as the authors do.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for a coefficient that is no number, or an unknown choice.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]])}
      >>> tj.merge_task_vectors(stack, tj.tsv_m())["w"].round(4).tolist()
      [[3.0, 0.0], [0.0, 2.0]]
    """
    choice("tsv_m", "null_directions", null_directions, ("drop", "keep"))
    return matrix_rule(
        "tsv_m",
        functools.partial(merge, keep_null=null_directions == "keep"),
        coefficient=coefficient,
        mean_only=mean_only,
        note=lambda shape, tasks: {"rank": leading_rank(min(shape), tasks)},
        null_directions=null_directions,
    )


def leading_rank(size: int, tasks: int) -> int:
    """How many triples each of T tasks keeps of a matrix whose smaller side is ``size``."""
    return max(1, int(size * (1 / tasks)))


def merge(stack, keep_null: bool = False):
    """The formula: ``(T, out, in)`` to ``(out, in)``."""
    rank = leading_rank(min(stack.shape[1:]), stack.shape[0])
    u, s, vt = linalg.svd(stack)
    return orthogonal_sum(u[..., :rank], s[:, :rank], vt[:, :rank], linalg.not_null(s)[:, :rank], keep_null)


def orthogonal_sum(u, s, vt, real, keep_null: bool):
    """``P([U_1 ... U_B]) diag(s) P([V_1 ... V_B])^T`` for B blocks of singular triples.

    Args:
      u: ``(B, out, r)``.
      s: ``(B, r)``.
      vt: ``(B, r, in)``.
      real: bool ``(B, r)``: which triples are more than rounding.
      keep_null: let the others take part.
    """
    left, right = side_by_side(u, vt, real, keep_null)
    return linalg.matmul(linalg.polar(left, keep_null) * jnp.reshape(s, -1), linalg.polar(right, keep_null))


def side_by_side(u, vt, real, keep_null: bool):
    """``[U_1 ... U_B]`` and ``[V_1 ... V_B]^T``, see :func:`orthogonal_sum`."""
    if not keep_null:
        u, vt = u * real[:, None, :], vt * real[:, :, None]
    left = jnp.reshape(jnp.moveaxis(u, 0, 1), (u.shape[1], -1))
    return left, jnp.reshape(vt, (-1, vt.shape[-1]))
