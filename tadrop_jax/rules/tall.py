r"""TALL masks: localising what each task needs in the sum (arXiv 2405.07813)."""

import jax.numpy as jnp

from tadrop_jax.kinds import masked_vector
from tadrop_jax.parameters import lengths, number
from tadrop_jax.selection import magnitude
from tadrop_jax.steps import Piece, Step, over_tasks, patterns, spec

KIND = masked_vector("tall")


def tall(tall_lambda=0.4, *, per_task=()) -> Step:
    r"""The sum of the task vectors, and for each task a mask of one bit an entry of where the sum serves it.

    .. math::

      \tau = \sum_t \tau_t, \quad m_t = |\tau_t| > \lambda_t |\tau - \tau_t|, \quad \theta_t = \theta_0 + m_t \tau

    The authors' code (``nik-dim/tall_masks``, ``generate_task_masks``) takes the differences between full weights, not
    between task vectors, so that a mask may differ where the two sides are within rounding of each other; and it picks
    :math:`\lambda_t` from .2, .3, .4, .5 and .6 for each task by validation.

    Args:
      tall_lambda: :math:`\lambda_t`, at least 0; a number or one per task.
      per_task: regular expressions of tensors that stay each task's own, heads for instance.

    Returns:
      A per-task rule: :func:`tadrop_jax.merge` gives a :class:`~tadrop_jax.bundles.Bundle` whose rescalers are 1.

    Raises:
      ParameterError: for a negative value or a broken pattern.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> models = [{"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 0.5])}]
      >>> bundle = tj.merge({"w": jnp.zeros(2)}, models, tj.tall())
      >>> bundle.unified["w"].tolist(), bundle.mask(0)["w"].tolist()
      ([4.0, -1.5], [False, True])
    """
    tall_lambda = number("tall", "tall_lambda", tall_lambda, 0)

    def apply(x, carry):
        total, masks = sum_and_masks(x, tall_lambda)
        return {"unified": total, "masks": masks}

    return Step(
        apply=apply,
        output="bundle",
        kind=KIND,
        scalars=lambda carry, tasks: {"rescalers": jnp.ones((tasks,), jnp.float32)},
        per_task=patterns(per_task),
        lengths=lengths(tall_lambda=tall_lambda),
        spec=spec("tall", tall_lambda=tall_lambda),
    )


def sum_and_masks(x: Piece, tall_lambda):
    """The sum of the task vectors (S), and the TALL masks (T, *S)."""
    total = over_tasks(jnp.add, x.stack)
    return total, magnitude(x.stack) > x.per_task(tall_lambda) * magnitude(total - x.stack)
