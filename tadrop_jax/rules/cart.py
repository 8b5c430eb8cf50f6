"""CART, Centered Arithmetic with Rank-reduced Task vectors (arXiv 2412.12153)."""

import functools

import jax.numpy as jnp

from tadrop_jax import linalg
from tadrop_jax.matrices import matrix_rule
from tadrop_jax.parameters import fixed, single
from tadrop_jax.steps import Step, over_tasks


def cart(rank=0.12, strength=2.0, coefficient=1.0, *, mean_only=()) -> Step:
    r"""The mean, plus the scaled sum of what single tasks differ from it by, each at low rank.

    .. math:: \bar\tau = \frac1T \sum_t \tau_t, \quad \tau = \bar\tau + strength \cdot \sum_t SVD_r(\tau_t - \bar\tau)

    where :math:`SVD_r` keeps the r = max(1, int(rank * min(out, in))) leading singular triples. Tensors that are no
    matrices get the mean, which the formula gives for a sum that is not cut.

    The authors' settings (``JH-GEECS/CART``: ``initial_rank_ratio``, ``prior``) for ViT-B/32: 0.12 and 2.0 with 8 tasks
    (the defaults), 0.16 and 1.5 with 14, 0.32 and 1.9 with 20; the paper finds about 0.08 good throughout. Their code
    decomposes the matrices of attention and MLP alone:
    ``mean_only=["embedding", "^(?:visual/)?proj$", "text_projection"]`` or whatever those are called.

    Args:
      rank: share of the singular triples to keep, in [0, 1]; 0 gives the mean, 1 keeps all. A Python number, since it
        decides on shapes.
      strength: multiplies the low-rank sum (the authors' ``prior``, the paper's lambda).
      coefficient: multiplies the merged vector.
      mean_only: regular expression(s) of matrices that get the mean, such as embeddings.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[6.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 7.0]]])}
      >>> tj.merge_task_vectors(stack, tj.cart(rank=0.5, strength=1.0))["w"].tolist()  # differences 3, -2 and 4 remain
      [[6.0, 0.0], [0.0, 5.0]]
    """
    rank = fixed("cart", "rank", rank, 0, 1)
    strength = single("cart", "strength", strength)
    return matrix_rule(
        "cart",
        functools.partial(merge, rank=rank, strength=strength),
        coefficient=coefficient,
        mean_only=mean_only,
        note=lambda shape, tasks: {"rank": kept_rank(min(shape), rank)},
        rank=rank,
        strength=strength,
    )


def kept_rank(size: int, share: float) -> int:
    """How many triples are kept of a matrix whose smaller side is ``size``; at least one, unless the share is 0."""
    return 0 if share == 0 else max(1, int(share * size))


def merge(stack, rank: float, strength):
    """The formula: ``(T, out, in)`` to ``(out, in)``."""
    mean = over_tasks(jnp.add, stack) / stack.shape[0]
    low = linalg.truncate(stack - mean, kept_rank(min(mean.shape), rank))
    return mean + strength * over_tasks(jnp.add, low)
