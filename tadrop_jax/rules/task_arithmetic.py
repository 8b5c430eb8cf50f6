"""Task Arithmetic (arXiv 2212.04089)."""

import jax.numpy as jnp

from tadrop_jax.parameters import flag, number
from tadrop_jax.steps import Step, over_tasks, product, spec


def task_arithmetic(coefficient=0.3, *, weights=1.0, normalize: bool = False) -> Step:
    """``theta_0 + coefficient * sum_t w_t tau_t``.

    The authors (``mlfoundations/task_vectors``), mergekit (``task_arithmetic``, whose ``lambda`` is 1), PEFT
    (``task_arithmetic``, with ``coefficient=1``) and fusion-bench (``TaskArithmeticAlgorithm``) agree.

    Args:
      coefficient: multiplies the merged vector; a number or one per task. .3 is the authors' choice for 8 ViT tasks.
      weights: w_t, a number or one per task.
      normalize: divide by the sum of the weights, where its size is at least 1e-8 (mergekit's ``normalize``).

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values that are no numbers, or no flag.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.merge({"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([1.0, 2.0])}],
      ...          tj.task_arithmetic(0.5))["w"].tolist()
      [1.0, 1.0]
    """
    coefficient = number("task_arithmetic", "coefficient", coefficient)
    weights, normalize = number("task_arithmetic", "weights", weights), flag("task_arithmetic", "normalize", normalize)

    def apply(x, carry):
        coefficient, weights = (x.per_task(x.numbers[name]) for name in ("coefficient", "weights"))
        total = over_tasks(jnp.add, x.stack, coefficient * weights, of=product)
        if not normalize:
            return total
        divisor = jnp.sum(jnp.broadcast_to(weights.ravel(), (x.stack.shape[0],)))
        return total / jnp.where(jnp.abs(divisor) < 1e-8, 1, divisor)

    return Step(
        apply=apply,
        output="vector",
        spec=spec("task_arithmetic", normalize=normalize),
        numbers={"coefficient": coefficient, "weights": weights},
    )
