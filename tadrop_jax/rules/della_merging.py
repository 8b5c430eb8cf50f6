"""DELLA: drop by magnitude and chance, elect, fuse (arXiv 2406.11617)."""

from tadrop_jax.rules.ties import after_own, linear_or_elected
from tadrop_jax.sparsifiers.della import della
from tadrop_jax.steps import Chain


def della_merging(
    density=0.5,
    epsilon=0.05,
    coefficient=1.0,
    *,
    weights=1.0,
    normalize: bool = True,
    rescale: str | None = "flavour",
    flavour: str | None = None,
) -> Chain:
    """MAGPRUNE, then the election of TIES and the mean of what agrees, as the authors and mergekit's ``della``.

    Signs are elected by the weighted sum, +1 where it is 0.

    Args:
      density: mean probability to keep an entry, a number or one per task, see :func:`tadrop_jax.della`. None switches
        it off.
      epsilon: half the width of the probabilities, a number or one per task (the authors' ``window_size`` / 2).
      coefficient: multiplies the merged vector (mergekit's ``lambda``).
      weights: w_t, a number or one per task.
      normalize: divide by the sum of the weights that agree.
      rescale: ``"entry"``, ``"l1"``, None, or as the flavour has it.
      flavour: of the sparsifier: ``"authors"`` (the default) or ``"mergekit"``. With the latter and ``epsilon=.15``
        this is mergekit's ``della``.

    Returns:
      A merge rule that needs a random key.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax, jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.ones((2, 100, 100))}
      >>> merged = tj.merge_task_vectors(stack, tj.della_merging(0.5, 0.1, rescale=None), key=jax.random.key(0))["w"]
      >>> sorted(set(merged.ravel().tolist()))
      [0.0, 1.0]
    """
    rule = linear_or_elected("della_merging", True, normalize, coefficient, weights)
    return after_own(density, lambda: della(density, epsilon, rescale=rescale, flavour=flavour), rule)


def della_linear(
    density=0.5,
    epsilon=0.15,
    coefficient=1.0,
    *,
    weights=1.0,
    normalize: bool = False,
    rescale: str | None = "l1",
) -> Chain:
    """MAGPRUNE, then the sum, as mergekit's ``della_linear``: ``theta_0 + coefficient * sum_t w_t della(tau_t)``.

    Args:
      density: mean probability to keep an entry, a number or one per task, see :func:`tadrop_jax.della`. None switches
        it off.
      epsilon: half the width of the probabilities, a number or one per task.
      coefficient: multiplies the merged vector (mergekit's ``lambda``).
      weights: w_t, a number or one per task.
      normalize: divide by the sum of the weights.
      rescale: ``"l1"``, ``"entry"`` or None.

    Returns:
      A merge rule that needs a random key.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax, jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.ones((1, 100, 100))}
      >>> merged = tj.merge_task_vectors(stack, tj.della_linear(0.5), key=jax.random.key(0))["w"]
      >>> float(abs(merged.sum() - 1e4)) < 1
      True
    """
    rule = linear_or_elected("della_linear", False, normalize, coefficient, weights)
    return after_own(density, lambda: della(density, epsilon, rescale=rescale, flavour="mergekit"), rule)
