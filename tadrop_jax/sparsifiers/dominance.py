"""Dominance: each entry competes with the same entry of the other tasks."""

import functools

import jax.numpy as jnp

from tadrop_jax.parameters import lengths, number
from tadrop_jax.sparsifiers.norms import check_norm, describe, norm_stages, prune
from tadrop_jax.steps import Step, magnitude, over_tasks, spec


def dominance(share=0.5, norm: int | None = 2) -> Step:
    r"""Prunes the entries that are small beside the same entry of another task, then restores each tensor's norm.

    .. math:: keep = [|\tau_t| \ge share \cdot max_j |\tau_j|], \quad
      \tau' = keep \cdot \tau \cdot \|\tau\|_p / \|keep \cdot \tau\|_p

    A per-task rule such as EMR-Merging gives a task the largest entry of all tasks or nothing. Where the task's own
    entry is below half of the largest, nothing is nearer to it: hence the default. Share 0 is the identity; with share
    1 only the largest of all tasks stays, as in MagMax (arXiv 2407.06322).

    Ours; docs/results.md has the experiments. It needs no order statistic, and with one task it changes nothing.

    Args:
      share: in [0, 1], a number or one per task.
      norm: p = 2, 1, or None for no scaling.

    Returns:
      A sparsifier, granularity "entry".

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, -2.0, 3.0], [4.0, 3.0, -1.0]])}
      >>> tj.sparsify(stack, tj.dominance(norm=None))["w"].tolist()
      [[0.0, -2.0, 3.0], [4.0, 3.0, 0.0]]
    """
    share = number("dominance", "share", share, 0, 1)
    check_norm("dominance", norm)

    def kept(x, carry):
        size = magnitude(x.stack)
        return size >= x.per_task(share) * x.once(over_tasks(jnp.maximum, size))

    return Step(
        stages=norm_stages(norm, kept),
        apply=functools.partial(prune, norm=norm, kept=kept),
        report=functools.partial(describe, norm=norm),
        lengths=lengths(share=share),
        across_tasks=True,
        spec=spec("dominance", share=share, norm=norm),
    )
