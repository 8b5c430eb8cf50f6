"""Merging after Model Breadcrumbs (arXiv 2312.06795), with and without an election of signs."""

from tadrop_jax.parameters import flag
from tadrop_jax.rules.ties import after_own, linear_or_elected
from tadrop_jax.sparsifiers.breadcrumbs import breadcrumbs
from tadrop_jax.sparsifiers.rescale import rescale as restored
from tadrop_jax.steps import AnyStep, Chain


def breadcrumbs_merging(
    density=0.15,
    gamma=0.006,
    coefficient=0.2,
    *,
    weights=1.0,
    normalize: bool = False,
    rescale: bool = False,
    flavour: str | None = None,
) -> Chain:
    """``theta_0 + coefficient * sum_t w_t breadcrumbs(tau_t)``.

    Args:
      density: share to keep in [0, 1], a number or one per task, see :func:`tadrop_jax.breadcrumbs`; the authors'
        search found .15. None switches it off.
      gamma: share of outliers in [0, 1], a number or one per task; the authors' search found .006, mergekit has .01.
      coefficient: multiplies the merged vector: the authors' alpha, for which their search found .2; mergekit's
        ``lambda``, 1.
      weights: w_t, a number or one per task.
      normalize: divide by the sum of the weights.
      rescale: restore each tensor's L1 norm after dropping (mergekit's ``rescale``).
      flavour: of the sparsifier: ``"authors"`` (the default) or ``"mergekit"``. With the latter, ``gamma=.01`` and
        ``coefficient=1`` this is mergekit's ``breadcrumbs``.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, -2.0, 3.0, -8.0], [0.0, 1.0, 9.0, 1.0]])}
      >>> tj.merge_task_vectors(stack, tj.breadcrumbs_merging(0.25, 0.25, 1.0))["w"].tolist()
      [0.0, 0.0, 3.0, 1.0]
    """
    rescale = flag("breadcrumbs_merging", "rescale", rescale)
    rule = linear_or_elected("breadcrumbs_merging", False, normalize, coefficient, weights)
    return after_own(density, lambda: _sparsifier(density, gamma, flavour, rescale), rule)


def breadcrumbs_ties(
    density=0.9,
    gamma=0.01,
    coefficient=1.0,
    *,
    weights=1.0,
    normalize: bool = False,
    rescale: bool = False,
) -> Chain:
    """Breadcrumbs, then the election of TIES, as mergekit's ``breadcrumbs_ties``.

    Signs are elected by the weighted sum, +1 where it is 0, and the entries that agree are added up.

    Args:
      density: share to keep in [0, 1], a number or one per task, see :func:`tadrop_jax.breadcrumbs`. None switches it
        off.
      gamma: share of outliers in [0, 1], a number or one per task.
      coefficient: multiplies the merged vector (mergekit's ``lambda``).
      weights: w_t, a number or one per task.
      normalize: divide by the sum of the weights that agree.
      rescale: restore each tensor's L1 norm after dropping (mergekit's ``rescale``).

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, -2.0, 3.0, -8.0], [0.0, 1.0, -2.0, 9.0]])}
      >>> tj.merge_task_vectors(stack, tj.breadcrumbs_ties(0.5, 0.25))["w"].tolist()
      [0.0, -2.0, 3.0, 0.0]
    """
    rescale = flag("breadcrumbs_ties", "rescale", rescale)
    rule = linear_or_elected("breadcrumbs_ties", True, normalize, coefficient, weights)
    return after_own(density, lambda: _sparsifier(density, gamma, "mergekit", rescale), rule)


def _sparsifier(density, gamma, flavour: str | None, rescale: bool) -> AnyStep:
    own = breadcrumbs(density, gamma, flavour=flavour)
    return restored(own, 1) if rescale else own
