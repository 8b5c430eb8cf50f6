"""Iso-C, isotropic merging in the common subspace (arXiv 2502.04959)."""

import functools

import jax.numpy as jnp

from tadrop_jax import linalg
from tadrop_jax.matrices import matrix_rule
from tadrop_jax.parameters import choice
from tadrop_jax.steps import Step, over_tasks


def iso_c(coefficient=1.0, *, mean_only=(), null_directions: str = "drop") -> Step:
    r"""Gives all singular directions of the summed task vectors the same weight.

    .. math:: \sum_t \tau_t = U S V^T, \quad \tau = \frac{\sum_i s_i}{\min(out, in)} U V^T

    Tensors that are no matrices get the mean.

    ``danielm1405/iso-merging`` (method ``iso_c``): ``mean_only="text_projection"``, ``null_directions="keep"``; the
    coefficient is what they look for on validation data. fusion-bench (``ISO_C_Merge``): the same without
    ``mean_only``.

    Args:
      coefficient: multiplies the merged vector.
      mean_only: regular expression(s) of matrices that get the mean, such as embeddings.
      null_directions: what becomes of directions in which the sum is 0 to rounding, which the SVD picks freely:
        ``"drop"`` leaves them out; ``"keep"`` gives them the weight of the others, as the authors do.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for a coefficient that is no number, or an unknown choice.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
      >>> tj.merge_task_vectors(stack, tj.iso_c())["w"].tolist()
      [[2.0, 0.0], [0.0, 2.0]]
    """
    choice("iso_c", "null_directions", null_directions, ("drop", "keep"))
    return matrix_rule(
        "iso_c",
        functools.partial(merge, keep_null=null_directions == "keep"),
        coefficient=coefficient,
        mean_only=mean_only,
        null_directions=null_directions,
    )


def merge(stack, keep_null: bool = False):
    """The formula: ``(T, out, in)`` to ``(out, in)``."""
    total = over_tasks(jnp.add, stack)
    factor = linalg.polar(total, keep_null)
    # The sum of the singular values is the inner product with the polar factor: no second decomposition.
    return factor * (jnp.sum(factor * total) / min(total.shape))
