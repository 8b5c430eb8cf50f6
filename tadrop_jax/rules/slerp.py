r"""Spherical linear interpolation of two models (Shoemake 1985)."""

import jax.numpy as jnp

from tadrop_jax.parameters import single
from tadrop_jax.rules.geometry import arc, collinear, cosines, gram, inner_products, weights_of
from tadrop_jax.steps import Step, spec


def slerp(t=0.5, *, threshold=0.9995) -> Step:
    r"""A point on the arc from the base to one model, each tensor on its own.

    .. math::

      \cos\Omega = \frac{\langle\theta_0, \theta_1\rangle}{|\theta_0| |\theta_1|}, \quad
      \theta = \frac{\sin((1 - t)\Omega)}{\sin\Omega} \theta_0 + \frac{\sin(t\Omega)}{\sin\Omega} \theta_1

    Where :math:`|\cos\Omega|` is above the threshold, or 1 to within rounding (:math:`10^{-6}`), it is the chord,
    :math:`(1 - t) \theta_0 + t \theta_1`; a fine-tune of the base nearly always lies there. Use
    :func:`tadrop_jax.nuslerp` for the arc between two fine-tunes.

    The defaults give what mergekit's and fusion-bench's ``slerp`` give. As in mergekit, a zero tensor has no
    direction and counts as orthogonal.

    Args:
      t: in [0, 1]; 0 is the base, 1 is the model.
      threshold: cosine in [0, 1] above which the chord is taken.

    Returns:
      A merge rule on weights, for exactly one fine-tuned model.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.merge({"w": jnp.array([1.0, 0.0])}, [{"w": jnp.array([0.0, 1.0])}], tj.slerp(0.5))["w"].round(3).tolist()
      [0.7070000171661377, 0.7070000171661377]
    """
    t = single("slerp", "t", t, 0, 1)
    threshold = single("slerp", "threshold", threshold, 0, 1)

    def ends(x):
        return jnp.concatenate([x.base[None], weights_of(x)])

    def apply(x, carry):
        cosine = cosines(gram(carry))[0, 1]
        linear = (jnp.abs(cosine) > threshold) | collinear(cosine)
        first, second = arc(cosine, x.numbers["t"], linear)
        # As base plus task vector: a model that equals the base gives the base to the last bit.
        return jnp.where(linear, 1, first + second) * x.base + second * x.stack[0]

    return Step(
        stages=(inner_products(ends),),
        apply=apply,
        output="parameters",
        models=("slerp", 1, 1),
        spec=spec("slerp", threshold=threshold),
        numbers={"t": t},
    )
