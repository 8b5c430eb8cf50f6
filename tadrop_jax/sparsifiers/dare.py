"""DARE: drop and rescale (arXiv 2311.03099)."""

import jax.numpy as jnp

from tadrop_jax.parameters import choice, lengths, number
from tadrop_jax.sparsifiers.norms import powers, scale
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Step, safe_ratio, spec


def dare(density, rescale: str | None = "inverse") -> Step:
    r"""Keeps each entry with probability ``density``, and rescales what is left.

    .. math:: m \sim Bernoulli(density), \quad \tau' = m \tau / density

    The default is the authors' (``yule-BUAA/MergeLM``, ``mask_input_with_mask_rate``), PEFT's (``random_pruning`` with
    ``rescale``) and fusion-bench's (``param_random_drop_`` with ``rescale``); the authors and fusion-bench give the
    share that is dropped. A seed gives the same mask in memory, sharded and streamed.

    Args:
      density: share to keep in [0, 1], a number or one per task.
      rescale: ``"inverse"``: by 1/density (the authors); ``"l1"``: to the L1 norm before (mergekit,
        ``sparsify.bernoulli`` with rescale); None: not at all. Where nothing is left the result is zero.

    Returns:
      A sparsifier that needs a random key.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax, jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.ones((1, 1000))}
      >>> pruned = tj.sparsify(stack, tj.dare(0.5), key=jax.random.key(0))["w"]
      >>> sorted(set(pruned.ravel().tolist()))
      [0.0, 2.0]
    """
    density = number("dare", "density", density, 0, 1)
    choice("dare", "rescale", rescale, ("inverse", "l1", None))

    def kept(x):
        return jnp.where(x.once(x.uniform() < x.per_task(density)), x.stack, 0)

    def sums(x, carry, n):
        return powers(x.stack, kept(x), 1)

    def apply(x, carry):
        if rescale == "inverse":
            return kept(x) * safe_ratio(1.0, x.per_task(density))
        if rescale == "l1":
            return kept(x) * x.column(scale(carry, 1))
        return kept(x)

    return Step(
        stages=(Sums(sums),) if rescale == "l1" else (),
        apply=apply,
        random=True,
        lengths=lengths(density=density),
        spec=spec("dare", density=density, rescale=rescale),
    )
