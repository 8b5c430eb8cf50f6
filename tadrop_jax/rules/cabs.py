"""CABS: conflict-aware and balanced sparsification (arXiv 2503.01874)."""

from tadrop_jax.parameters import choice
from tadrop_jax.rules.task_arithmetic import task_arithmetic
from tadrop_jax.sparsifiers.conflict_aware import conflict_aware
from tadrop_jax.sparsifiers.n_m import n_m
from tadrop_jax.sparsifiers.overlapping import OVERLAPS, overlapping
from tadrop_jax.steps import Chain, chain


def cabs(
    n: int = 3,
    m: int = 32,
    coefficient=1.0,
    *,
    order=None,
    tail: str = "ceil",
    overlap: str | None = None,
) -> Chain:
    """n:m masks, one task after another, then ``theta_0 + sum_t coefficient_t * tau_t``; any number of tasks.

    Masks are disjoint, so that a group of m serves ``m / n`` tasks in full: later ones get what is left of it, or
    nothing. With ``overlap``, they take entries of earlier tasks instead. The authors' code
    (``zongzhenyang/CABS``, ``block_random_pruning``) has two tasks and ``tail="drop"``.

    Args:
      n: kept in each group of m, from 0 to m; 3:32 is the authors' choice for small models, 64:256 for 7B.
      m: length of a group.
      coefficient: multiplies the merged vector; a number or one per task. The authors search .4 to 1.0.
      order: the order of the tasks, a permutation of 0 to T - 1; None means as given. It matters.
      tail: of the last group, see :func:`tadrop_jax.n_m`.
      overlap: None; ``"exact"``: each task keeps n of m, free entries first, then its largest taken ones (with two
        tasks and n >= m/2, 2n - m of them); ``"authors"``
        (``mistral_leaderboard_experiments/prune_task_vector_7b.py``): for n >= m // 2 all free entries and the m // 2
        largest taken ones, which together are n at n = 3m/4 only; else as None.

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
    choice("cabs", "overlap", overlap, (None, *OVERLAPS))
    if overlap is None:
        return chain(conflict_aware(n_m(n, m, tail), order), task_arithmetic(coefficient))
    return chain(overlapping(n, m, overlap, order, tail), task_arithmetic(coefficient))
