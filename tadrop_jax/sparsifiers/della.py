r"""DELLA's MAGPRUNE: drop by chance, large magnitudes less often (arXiv 2406.11617)."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from tadrop_jax.errors import ParameterError
from tadrop_jax.parameters import choice, lengths, number
from tadrop_jax.selection import magnitude
from tadrop_jax.sparsifiers.norms import powers, scale
from tadrop_jax.sparsifiers.ranking import row_ranks
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Step, safe_ratio, spec

FLAVOURS: dict[str, dict[str, Any]] = {
    "authors": {"granularity": "row", "rescale": "entry"},
    "mergekit": {"granularity": "second_axis", "rescale": "l1"},
}
# And what of a tensor each needs in one piece.
GRANULARITIES: dict[str, Any] = {"row": "row", "second_axis": "slice", "tensor": "tensor"}


def della(
    density,
    epsilon=0.05,
    *,
    granularity: str | None = None,
    rescale: str | None = "flavour",
    flavour: str | None = None,
) -> Step:
    r"""Keeps each entry with a probability that grows with the rank of its magnitude, and rescales what is left.

    .. math::

      r = rank(|\tau|) \in [0, 1], \quad p = (density - \epsilon) + 2 \epsilon r, \quad
      m \sim Bernoulli(p), \quad \tau' = m \tau / p

    Ranks are exact: ties go in order of position, in PyTorch order where a ``layout`` is given. A row of one entry
    has r = 1/2, so that it is kept with probability ``density`` (the authors' code and mergekit divide 0 by 0).

    Args:
      density: mean probability to keep an entry, a number or one per task.
      epsilon: half the width of the probabilities, a number or one per task: .05 in the authors' code, .15 in mergekit.
        They must lie inside (0, 1): ``0 < density - epsilon`` and ``density + epsilon < 1``.
      granularity: what is ranked together: ``"row"``: the last axis; ``"tensor"``: all of a tensor (the authors'
        ``rank_magnitude_layer``; it sorts whole tensors); ``"second_axis"``: axis 1 of a tensor of two or more axes,
        which for matrices is the row (mergekit).
      rescale: ``"entry"``: each entry by its own 1/p (the authors); ``"l1"``: all by one number, to the tensor's L1
        norm before (mergekit); None: not at all; ``"flavour"``: as the flavour has it.
      flavour: ``"authors"`` (declare-lab/della, ``rank_magnitude``; the default) or ``"mergekit"``
        (``della_magprune`` with ``RescaleNorm.l1``): a preset of granularity and rescale.

    Returns:
      A sparsifier that needs a random key.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax, jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.ones((1, 100, 100))}
      >>> pruned = tj.sparsify(stack, tj.della(0.5, 0.2), key=jax.random.key(0))["w"]
      >>> float(abs((pruned != 0).mean() - 0.5)) < 0.02
      True
    """
    choice("della", "flavour", flavour, (None, *FLAVOURS))
    preset = FLAVOURS[flavour or "authors"]
    together: str = choice("della", "granularity", granularity or preset["granularity"], tuple(GRANULARITIES))
    rescale = choice("della", "rescale", rescale, ("flavour", "entry", "l1", None))
    rescale = preset["rescale"] if rescale == "flavour" else rescale
    density, epsilon = number("della", "density", density, 0, 1), number("della", "epsilon", epsilon, 0, 0.5)
    _check_inside(density, epsilon)

    def probabilities(x):
        return keep_probabilities(x, x.per_task(density), x.per_task(epsilon), together)

    def kept(x):
        return jnp.where(x.once(x.uniform() < probabilities(x)), x.stack, 0)

    def sums(x, carry, n):
        return powers(x.stack, kept(x), 1)

    def apply(x, carry):
        if rescale == "entry":
            return safe_ratio(kept(x), probabilities(x))
        if rescale == "l1":
            return kept(x) * x.column(scale(carry, 1))
        return kept(x)

    return Step(
        stages=(Sums(sums),) if rescale == "l1" else (),
        apply=apply,
        piece=GRANULARITIES[together],
        random=True,
        lengths=lengths(density=density, epsilon=epsilon),
        spec=spec("della", density=density, epsilon=epsilon, granularity=together, rescale=rescale),
    )


def keep_probabilities(x, density, epsilon, granularity: str) -> jax.Array:
    """The probability of each entry to be kept, a constant for gradients.

    Args:
      x: the piece: whole rows, or the whole tensor.
      density: broadcastable against the stack.
      epsilon: the same.
      granularity: what is ranked together, see :func:`della`.

    Returns:
      float32 array of the shape of the stack.
    """
    size = magnitude(x.in_torch_order())
    if size.ndim == 1 or granularity == "tensor":
        ranks = row_ranks(jnp.reshape(size, (size.shape[0], -1)))
        last = ranks.shape[-1] - 1
        ranks = jnp.reshape(ranks, size.shape)
    else:
        axis = 2 if granularity == "second_axis" and size.ndim > 2 else size.ndim - 1
        last = size.shape[axis] - 1
        ranks = jnp.moveaxis(row_ranks(jnp.moveaxis(size, axis, -1)), -1, axis)
    share = ranks.astype(jnp.float32) / last if last else jnp.full(size.shape, 0.5, jnp.float32)
    # Executors must round alike. The barrier keeps the product from being fused into the sum; XLA on CPU drops it, and
    # fuses them everywhere.
    spread = jax.lax.optimization_barrier(x.from_torch_order(share) * (2 * epsilon))
    return (density - epsilon) + spread


def _check_inside(density, epsilon) -> None:
    """Refuses concrete probabilities that do not lie inside (0, 1)."""
    densities = density if isinstance(density, tuple) else (density,)
    epsilons = epsilon if isinstance(epsilon, tuple) else (epsilon,)
    many = max(len(densities), len(epsilons))
    for d, e in zip(densities * (many // len(densities)), epsilons * (many // len(epsilons)), strict=False):
        known = isinstance(d, numbers.Real) and isinstance(e, numbers.Real)
        if known and not (float(d) - float(e) > 0 and float(d) + float(e) < 1):
            raise ParameterError(
                f"della: density - epsilon and density + epsilon must lie inside (0, 1), got density {d}, epsilon {e}"
            )
