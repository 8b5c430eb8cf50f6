r"""RAM: reinforced agent merging (arXiv 2601.13572)."""

import jax
import jax.numpy as jnp

from tadrop_jax.parameters import single
from tadrop_jax.selection import magnitude
from tadrop_jax.steps import Step, over_tasks, spec


def ram(threshold=1e-5, coefficient=1.0) -> Step:
    r"""Averages each entry over the tasks that changed it.

    .. math::

      a_t = |\tau_t| > threshold, \quad \tau = \frac{\sum_t a_t \tau_t}{\max(\sum_t a_t, 1)}

    An entry that one task alone changed passes as it is. The authors (xiangchi-yuan/mrl, mode ``arm``) and mergekit
    (``ram``) agree.

    Args:
      threshold: a change above it counts, at least 0; 1e-5 in both.
      coefficient: multiplies the merged vector; 1 in both.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.merge_task_vectors({"w": jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 4.0]])}, tj.ram())["w"].tolist()
      [1.0, 0.0, 3.0]
    """
    threshold = single("ram", "threshold", threshold, low=0)
    coefficient = single("ram", "coefficient", coefficient)

    def apply(x, carry):
        active, count = changed(x, threshold)
        return x.numbers["coefficient"] * over_tasks(jnp.add, jnp.where(active, x.stack, 0)) / jnp.maximum(count, 1)

    return Step(
        apply=apply,
        output="vector",
        spec=spec("ram", threshold=threshold),
        numbers={"coefficient": coefficient},
    )


def changed(x, threshold) -> tuple[jax.Array, jax.Array]:
    """Which entries each task changed, ``(T, *S)``, and how many tasks changed each entry, ``S``."""
    active = magnitude(x.stack) > threshold
    return active, x.once(over_tasks(jnp.add, active.astype(jnp.float32)))
