"""CABS: conflict-aware and balanced sparsification (arXiv 2503.01874)."""

from tadrop_jax.rules.task_arithmetic import task_arithmetic
from tadrop_jax.sparsifiers.conflict_aware import conflict_aware
from tadrop_jax.sparsifiers.n_m import n_m
from tadrop_jax.steps import Chain, chain


def cabs(n: int = 3, m: int = 32, coefficient=1.0, *, order=None, tail: str = "ceil") -> Chain:
    """Disjoint n:m masks, one task after another, then ``theta_0 + sum_t coefficient_t * tau_t``.

    Args:
      n: kept in each group of m; 3:32 is the authors' choice for small models, 64:256 for 7B.
      m: length of a group.
      coefficient: a number or one per task; the authors search .4 to 1.0.
      order: the order of the tasks, a permutation of 0 to T - 1; it matters.
      tail: of the last group, see :func:`tadrop_jax.n_m`.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[5.0, 4.0], [9.0, 3.0]])}
      >>> tj.merge_task_vectors(stack, tj.cabs(1, 2))["w"].tolist()
      [5.0, 3.0]
    """
    return chain(conflict_aware(n_m(n, m, tail), order), task_arithmetic(coefficient))
