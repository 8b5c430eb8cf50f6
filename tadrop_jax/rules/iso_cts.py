"""Iso-CTS, isotropic merging in common and task-specific subspaces (arXiv 2502.04959)."""

import functools

import jax.numpy as jnp

from tadrop_jax import linalg
from tadrop_jax.matrices import matrix_rule
from tadrop_jax.parameters import choice, fixed
from tadrop_jax.steps import Step, over_tasks


def iso_cts(common=0.8, coefficient=1.0, *, mean_only=(), null_directions: str = "drop") -> Step:
    r"""Iso-C, with the weakest common directions replaced by directions of single tasks.

    Of k = min(out, in) directions, c are the leading ones of the sum, and n of each task are the leading ones of what
    lies outside of those:

    .. math::

      \sum_t \tau_t \approx U_c S_c V_c^T, \quad
      \tau_t - U_c U_c^T \tau_t \approx U_t S_t V_t^T, \quad
      \tau = mean(S_1 \dots S_T, S_c) \; P([U_1 \dots U_T \, U_c]) \; P([V_1 \dots V_T \, V_c])^T

    where P is the orthogonal factor of the polar decomposition, :math:`n = round((k - \lfloor common \cdot k \rfloor) /
    T)` with halves to even, and c = k - nT. Where n tasks' shares would exceed k (small ``common``, many tasks; the
    authors' code fails), n is the largest that fits. With n = 0 this is Iso-C. Tensors that are no matrices get the
    mean. The report names both ranks.

    ``danielm1405/iso-merging`` (method ``iso_cts``): ``mean_only="text_projection"``, ``null_directions="keep"``; the
    coefficient is what they look for on validation data. fusion-bench (``ISO_CTS_Merge``): the same without
    ``mean_only``.

    Args:
      common: share of the directions that is common, in [0, 1]; a Python number, since it decides on shapes.
      coefficient: multiplies the merged vector.
      mean_only: regular expression(s) of matrices that get the mean, such as embeddings.
      null_directions: what becomes of directions that are 0 to rounding, which the SVD picks freely: ``"drop"`` leaves
        them out; ``"keep"`` gives them the weight of the others, as the authors do.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for a number out of range, or an unknown choice.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
      >>> tj.merge_task_vectors(stack, tj.iso_cts(common=0.5))["w"].tolist()
      [[2.0, 0.0], [0.0, 2.0]]
    """
    common = fixed("iso_cts", "common", common, 0, 1)
    choice("iso_cts", "null_directions", null_directions, ("drop", "keep"))
    return matrix_rule(
        "iso_cts",
        functools.partial(merge, common=common, keep_null=null_directions == "keep"),
        coefficient=coefficient,
        mean_only=mean_only,
        note=lambda shape, tasks: dict(zip(("common rank", "rank"), ranks(min(shape), tasks, common), strict=True)),
        common=common,
        null_directions=null_directions,
    )


def ranks(size: int, tasks: int, common: float) -> tuple[int, int]:
    """Directions that are common, and directions of each task, of a matrix whose smaller side is ``size``."""
    own = min(round((size - int(size * common)) / tasks), size // tasks)
    return size - own * tasks, own


def merge(stack, common: float, keep_null: bool = False):
    """The formula: ``(T, out, in)`` to ``(out, in)``."""
    shared, own = ranks(min(stack.shape[1:]), stack.shape[0], common)
    u, s, vt = linalg.svd(over_tasks(jnp.add, stack))
    u, real, s, vt = u[:, :shared], linalg.not_null(s)[:shared], s[:shared], vt[:shared]
    outside = stack - linalg.matmul(u, u.T, stack)
    ut, st, vtt = linalg.svd(outside)
    # What is left of a task that lies in the common subspace is rounding: measured against the task itself.
    size = jnp.linalg.norm(stack, axis=(1, 2))[:, None]
    left = jnp.concatenate([*ut[..., :own], u], axis=1)
    right = jnp.concatenate([*vtt[:, :own], vt], axis=0)
    if not keep_null:
        kept = jnp.concatenate([jnp.ravel(linalg.not_null(st, size)[:, :own]), real])
        left, right = left * kept, right * kept[:, None]
    mean = jnp.mean(jnp.concatenate([jnp.ravel(st[:, :own]), s]))
    return mean * linalg.matmul(linalg.polar(left, keep_null), linalg.polar(right, keep_null))
