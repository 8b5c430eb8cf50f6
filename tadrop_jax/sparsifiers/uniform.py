"""Uniform sparsity with the norm restored: TADrop's control."""

import functools

from tadrop_jax.parameters import lengths, number
from tadrop_jax.sparsifiers.norms import check_norm, describe, norm_stages, prune
from tadrop_jax.sparsifiers.ranking import each
from tadrop_jax.stages import Ranks, magnitudes
from tadrop_jax.steps import Step, floor_times, spec


def uniform(sparsity, norm: int | None = 2) -> Step:
    r"""Prunes every tensor to one sparsity s, then scales it back to its p-norm.

    .. math:: \tau' = keep \cdot \tau \cdot \|\tau\|_p / \|keep \cdot \tau\|_p

    keeps the ``n - floor(s n)`` largest magnitudes of each tensor, and entries equal to the threshold. This is
    :func:`~tadrop_jax.tadrop` with the adaptivity taken out: the control that a gain of TADrop has to beat. Without
    ties, ``norm=None`` is fusion-bench's ``unstructured_magnitude_prune_``.

    Args:
      sparsity: s in [0, 1], a number or one per task.
      norm: p = 2, 1, or None for no scaling.

    Returns:
      A sparsifier, granularity "tensor".

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.sparsify({"w": jnp.array([[1.0, -2.0, 3.0, -8.0]])}, tj.uniform(0.5, norm=None))["w"].tolist()
      [[0.0, 0.0, 3.0, -8.0]]
    """
    sparsity = number("uniform", "sparsity", sparsity, 0, 1)
    check_norm("uniform", norm)

    def cut_rank(n, carry):
        return {"cut": each(lambda share: floor_times(share, n), sparsity)}

    return Step(
        stages=(Ranks(magnitudes, at=cut_rank), *norm_stages(norm)),
        apply=functools.partial(prune, norm=norm),
        report=functools.partial(describe, norm=norm),
        lengths=lengths(sparsity=sparsity),
        spec=spec("uniform", sparsity=sparsity, norm=norm),
    )
