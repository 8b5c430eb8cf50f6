r"""Multi-SLERP: the mean direction of several models, at their mean length (mergekit)."""

import jax.numpy as jnp

from tadrop_jax.parameters import choice, flag, number
from tadrop_jax.rules.geometry import (
    combined,
    root,
    shares,
    task_vectors_of,
    weights_of,
    weights_per_task,
    weights_with_sum,
)
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Step, safe_ratio, spec

# Of the sum of |w_t|: what float32 rounding leaves of unit vectors that balance out lies below.
_BALANCED = 1e-5


def multislerp(weights=1.0, *, space: str = "task vectors", normalize: bool = True) -> Step:
    r"""The weighted mean of unit task vectors, brought to the weighted mean of their norms.

    .. math::

      m = \sum_t w_t \frac{\tau_t}{|\tau_t|}, \quad \tau = \frac{m}{|m|} \sum_t w_t |\tau_t|

    mergekit's ``multislerp`` goes on to average the log-maps of the vectors in the tangent space at m/|m|. That average
    is zero whatever the vectors: the tangent parts sum to :math:`m - \langle m, m/|m|\rangle m/|m| = 0`. So this
    formula is all of it. :func:`tadrop_jax.karcher` is the mean on the sphere that such steps lead to when they are
    repeated.

    The defaults give what mergekit gives with a ``base_model``, ``space="weights"`` what it gives without one. Where
    the unit vectors balance out to within rounding (:math:`|m| \le 10^{-5} \sum_t |w_t|`) m has no direction, and the
    result is the weighted mean :math:`\sum_t w_t \tau_t`, for any number of models (mergekit: below :math:`10^{-8}`,
    for two; it refuses more). One model is returned as it is.

    Args:
      weights: w_t, a number or one per task.
      space: ``"task vectors"``, or the ``"weights"`` of the models themselves (then :func:`merge` only).
      normalize: divide the weights by their sum.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for weights that are no numbers or, with ``normalize``, whose sum is 0; for an unknown space.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> tj.merge_task_vectors(stack, tj.multislerp())["w"].round(3).tolist()
      [1.4140000343322754, 1.4140000343322754]
    """
    choice("multislerp", "space", space, ("task vectors", "weights"))
    normalize = flag("multislerp", "normalize", normalize)
    weights = weights_with_sum("multislerp", weights) if normalize else number("multislerp", "weights", weights)
    vectors_of = weights_of if space == "weights" else task_vectors_of

    def weighted(x):
        return shares(x) if normalize else weights_per_task(x)

    def direction(x, carry):
        return combined(x, vectors_of(x), safe_ratio(weighted(x), root(carry["square"])))

    def squares(x, carry, n):
        vectors = vectors_of(x)
        return {"square": vectors * vectors}

    def length(x, carry, n):
        mean = direction(x, carry)
        return {"mean": (mean * mean)[None]}

    def apply(x, carry):
        vectors = vectors_of(x)
        if len(x.tasks) == 1:
            return vectors[0]
        size = root(carry["mean"][0])
        balanced = size <= _BALANCED * jnp.sum(jnp.abs(weighted(x)))
        scale = jnp.sum(weighted(x) * root(carry["square"])) / jnp.where(balanced, 1, size)
        return jnp.where(balanced, combined(x, vectors, weighted(x)), direction(x, carry) * scale)

    return Step(
        stages=(Sums(squares), Sums(length)),
        apply=apply,
        output="parameters" if space == "weights" else "vector",
        spec=spec("multislerp", space=space, normalize=normalize),
        numbers={"weights": weights},
    )
