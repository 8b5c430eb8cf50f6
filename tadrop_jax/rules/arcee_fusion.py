r"""Arcee Fusion: replaces the entries that matter most (mergekit)."""

import jax
import jax.numpy as jnp
from jax import lax

from tadrop_jax.rules.geometry import weights_of
from tadrop_jax.stages import Ranks
from tadrop_jax.steps import Step, spec
from tadrop_jax.wide import floor_times

_FLOOR = 1e-8


def arcee_fusion() -> Step:
    r"""Takes the model's values where change and divergence from the base are large, and the base's elsewhere.

    .. math::

      importance = |\tau| \cdot KL(softmax(\theta_1) \,\|\, softmax(\theta_0)), \quad
      \theta = \theta_1 \text{ where } importance \ge Q_2 + 1.5\, (Q_3 - Q_1), \text{ else } \theta_0

    The divergence is that of a row: the last axis, in PyTorch order. :math:`10^{-8}` is added to both distributions.
    The quartiles of a tensor are its exact order statistics of rank :math:`\lfloor q (n - 1) \rfloor`. Gives what
    mergekit's ``arcee_fusion`` gives for tensors of up to a million entries; of larger ones it samples a million for
    the quartiles.

    Returns:
      A merge rule on weights, for exactly one fine-tuned model. The choice of entries is a constant for gradients.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> base, model = {"w": jnp.zeros((2, 3))}, {"w": jnp.array([[0.1, 0.1, 0.1], [0.1, 0.1, 4.0]])}
      >>> tj.merge(base, [model], tj.arcee_fusion())["w"].tolist()
      [[0.0, 0.0, 0.0], [0.0, 0.0, 4.0]]
    """

    def importance(x):
        def rows(stack):
            return x._replace(stack=stack).in_torch_order()

        p, q = (_softmax(rows(stack)) + _FLOOR for stack in (weights_of(x), x.base[None]))
        divergence = jnp.sum(p * jnp.log(p / q), axis=-1, keepdims=True) if p.ndim > 1 else jnp.zeros_like(p)
        return lax.stop_gradient(x.from_torch_order(jnp.abs(rows(x.stack)) * divergence))

    def quartiles(n, carry):
        return {name: floor_times(q, n - 1) for name, q in (("low", 0.25), ("median", 0.5), ("high", 0.75))}

    def apply(x, carry):
        threshold = carry["median"] + 1.5 * (carry["high"] - carry["low"])
        return x.base + jnp.where(importance(x) >= x.column(threshold), x.stack, 0)[0]

    return Step(
        stages=(Ranks(lambda x, carry: importance(x), quartiles),),
        apply=apply,
        piece="row",
        output="parameters",
        models=("arcee_fusion", 1, 1),
        spec=spec("arcee_fusion"),
    )


def _softmax(stack: jax.Array) -> jax.Array:
    return jax.nn.softmax(stack, axis=-1) if stack.ndim > 1 else jnp.ones_like(stack)
