"""The mean of the models (model soups, arXiv 2203.05482)."""

from tadrop_jax.rules.task_arithmetic import task_arithmetic
from tadrop_jax.steps import Step


def average(weights=1.0) -> Step:
    """``mean_t theta_t``, as ``theta_0 + sum_t w_t tau_t / sum_t w_t``, so that sparsifiers can go before it.

    Gives what mergekit's ``linear`` and fusion-bench's ``WeightedAverageAlgorithm`` give with ``normalize``, and its
    ``SimpleAverageAlgorithm`` where the weights are equal.

    Args:
      weights: w_t, a number or one per task.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values that are no numbers.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.merge({"w": jnp.zeros(1)}, [{"w": jnp.array([1.0])}, {"w": jnp.array([3.0])}], tj.average())["w"].tolist()
      [2.0]
    """
    return task_arithmetic(1.0, weights=weights, normalize=True)
