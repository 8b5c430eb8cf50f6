"""NearSwap: takes a model's values where they lie near the base's (mergekit)."""

import jax.numpy as jnp

from tadrop_jax.parameters import single
from tadrop_jax.steps import Step, spec


def nearswap(t=1e-4) -> Step:
    r"""The model's value where it is within t of the base's; elsewhere the base's, moved by t towards it.

    .. math:: \theta = \theta_0 + \min\left(1, \frac{t}{\max(|\tau|, 10^{-6})}\right) \tau

    Gives what mergekit's ``nearswap`` gives.

    Args:
      t: distance, at least 0.

    Returns:
      A merge rule on weights, for exactly one fine-tuned model.

    Raises:
      ParameterError: for a t that is no number, or negative.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.merge({"w": jnp.zeros(2)}, [{"w": jnp.array([0.25, 4.0])}], tj.nearswap(0.5))["w"].tolist()
      [0.25, 0.5]
    """
    t = single("nearswap", "t", t, 0)

    def apply(x, carry):
        change = x.stack[0]
        return x.base + jnp.clip(x.numbers["t"] / jnp.maximum(jnp.abs(change), 1e-6), 0, 1) * change

    return Step(
        apply=apply,
        output="parameters",
        models=("nearswap", 1, 1),
        spec=spec("nearswap"),
        numbers={"t": t},
    )
