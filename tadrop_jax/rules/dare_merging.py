"""DARE before a sum, or before the election of TIES (arXiv 2311.03099)."""

from tadrop_jax.rules.ties import after_own, linear_or_elected
from tadrop_jax.sparsifiers.dare import dare
from tadrop_jax.steps import Chain


def dare_linear(
    density=0.5,
    coefficient=1.0,
    *,
    weights=1.0,
    normalize: bool = False,
    rescale: str | None = "l1",
) -> Chain:
    """DARE, then the sum, as mergekit's ``dare_linear``: ``theta_0 + coefficient * sum_t w_t dare(tau_t)``.

    PEFT's ``dare_linear`` and fusion-bench's ``DareTaskArithmetic`` are this with ``rescale="inverse"``.

    Args:
      density: share to keep in [0, 1], a number or one per task, see :func:`tadrop_jax.dare`. None switches it off.
      coefficient: multiplies the merged vector (mergekit's ``lambda``).
      weights: w_t, a number or one per task.
      normalize: divide by the sum of the weights.
      rescale: ``"l1"`` (mergekit), ``"inverse"`` (DARE's authors) or None.

    Returns:
      A merge rule that needs a random key.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax, jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.ones((2, 1000))}
      >>> merged = tj.merge_task_vectors(stack, tj.dare_linear(0.5), key=jax.random.key(0))["w"]
      >>> float(abs(merged.sum() - 2000)) < 1
      True
    """
    rule = linear_or_elected("dare_linear", False, normalize, coefficient, weights)
    return after_own(density, lambda: dare(density, rescale), rule)


def dare_ties(
    density=0.5,
    coefficient=1.0,
    *,
    weights=1.0,
    normalize: bool = False,
    rescale: str | None = "l1",
) -> Chain:
    """DARE, then the election of TIES, as mergekit's ``dare_ties``.

    Signs are elected by the weighted sum, +1 where it is 0, and the entries that agree are added up. PEFT's
    ``dare_ties`` is ``tj.ties(None, flavour="peft")`` after :func:`tadrop_jax.dare`.

    Args:
      density: share to keep in [0, 1], a number or one per task, see :func:`tadrop_jax.dare`. None switches it off.
      coefficient: multiplies the merged vector (mergekit's ``lambda``).
      weights: w_t, a number or one per task.
      normalize: divide by the sum of the weights that agree.
      rescale: ``"l1"`` (mergekit), ``"inverse"`` (DARE's authors) or None.

    Returns:
      A merge rule that needs a random key.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax, jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[2.0, 2.0], [-1.0, 1.0]])}
      >>> tj.merge_task_vectors(stack, tj.dare_ties(1.0), key=jax.random.key(0))["w"].tolist()
      [2.0, 3.0]
    """
    rule = linear_or_elected("dare_ties", True, normalize, coefficient, weights)
    return after_own(density, lambda: dare(density, rescale), rule)
