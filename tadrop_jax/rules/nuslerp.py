r"""NuSLERP: the arc between two fine-tunes, seen from the base (mergekit)."""

import jax
import jax.numpy as jnp

from tadrop_jax.parameters import choice, number
from tadrop_jax.rules.geometry import (
    arc,
    collinear,
    combined,
    cosines,
    gram,
    inner_products,
    root,
    task_vectors_of,
    weights_of,
    weights_per_task,
)
from tadrop_jax.steps import Step, safe_ratio, spec


def nuslerp(weights=1.0, *, space: str = "task vectors", granularity: str = "tensor") -> Step:
    r"""A point on the arc between the task vectors of two models.

    .. math::

      t = \frac{w_2}{w_1 + w_2}, \quad \cos\Omega = \frac{\langle\tau_1, \tau_2\rangle}{|\tau_1| |\tau_2|}, \quad
      \tau = \frac{\sin((1 - t)\Omega)}{\sin\Omega} \tau_1 + \frac{\sin(t\Omega)}{\sin\Omega} \tau_2

    Vectors that are parallel or opposite to within rounding (:math:`1 - |\cos\Omega| \le 10^{-6}`) are interpolated
    linearly; a zero vector counts as orthogonal. The defaults give what mergekit's ``nuslerp`` with a ``base_model``
    gives, ``space="weights"`` what it gives without one.

    Args:
      weights: w_t, a number or one per task; t is 1/2 where their sum is below 1e-6.
      space: interpolate ``"task vectors"``, or the ``"weights"`` of both models themselves (then :func:`merge` only).
      granularity: one arc for the whole ``"tensor"``; or one for each ``"row"`` (the last axis, in PyTorch order;
        mergekit: ``nuslerp_flatten: false``) or ``"column"`` (the first axis; with ``nuslerp_row_wise: true`` besides).

    Returns:
      A merge rule for exactly two fine-tuned models.

    Raises:
      ParameterError: for weights that are no numbers, or unknown options.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[2.0, 0.0], [0.0, 2.0]])}
      >>> tj.merge_task_vectors(stack, tj.nuslerp())["w"].round(3).tolist()
      [1.4140000343322754, 1.4140000343322754]
    """
    weights = number("nuslerp", "weights", weights)
    choice("nuslerp", "space", space, ("task vectors", "weights"))
    choice("nuslerp", "granularity", granularity, ("tensor", "row", "column"))
    vectors_of = weights_of if space == "weights" else task_vectors_of

    def coefficients(x, cosine):
        first, second = weights_per_task(x)
        total = first + second
        small = jnp.abs(total) < 1e-6
        t = jnp.where(small, 0.5, second / jnp.where(small, 1, total))
        return arc(cosine, t, collinear(cosine))

    def whole(x, carry):
        return combined(x, vectors_of(x), jnp.stack(coefficients(x, cosines(gram(carry))[0, 1])))

    def rows(x, carry):
        vectors = x._replace(stack=vectors_of(x)).in_torch_order()
        axis = {"row": vectors.ndim - 1, "column": 1}[granularity] if vectors.ndim > 1 else ()
        first, second = coefficients(x, _cosine(vectors, axis))
        return x.from_torch_order(first * vectors[0] + second * vectors[1])

    return Step(
        stages=(inner_products(vectors_of),) if granularity == "tensor" else (),
        apply=whole if granularity == "tensor" else rows,
        piece="any" if granularity == "tensor" else "row" if granularity == "row" else "tensor",
        output="parameters" if space == "weights" else "vector",
        models=("nuslerp", 2, 2),
        spec=spec("nuslerp", space=space, granularity=granularity),
        numbers={"weights": weights},
    )


def _cosine(vectors: jax.Array, axis) -> jax.Array:
    """Cosine of two vectors ``(2, *S)`` along an axis of them, kept with length 1."""
    if vectors.size and axis != ():
        # Scaled so that squares neither overflow nor vanish.
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=axis, keepdims=True))
        vectors = safe_ratio(vectors, largest)
    norms = root(jnp.sum(vectors * vectors, axis=axis, keepdims=True))
    dot = jnp.sum(vectors[:1] * vectors[1:], axis=axis, keepdims=True)
    return jnp.clip(safe_ratio(dot, norms[:1] * norms[1:]), -1, 1)[0]
