r"""The Karcher mean of models on the sphere (arXiv 2603.04972)."""

import jax
import jax.numpy as jnp
from jax import lax

from tadrop_jax.parameters import single, whole
from tadrop_jax.rules.geometry import (
    angle,
    combined,
    cosines,
    gram,
    inner_products,
    root,
    shares,
    weights_of,
    weights_with_sum,
)
from tadrop_jax.steps import Step, safe_ratio, spec

# The log-map of a vector this close to the antipode of the mean has no direction.
_ANTIPODE = 1e-5


def karcher(weights=1.0, *, max_iter: int = 10, tol=1e-5) -> Step:
    r"""The point of the sphere with the least mean squared angle to the models, each tensor on its own.

    .. math::

      u_t = \frac{\theta_t}{|\theta_t|}, \quad
      v = \sum_t w_t \frac{\Omega_t}{\sin\Omega_t} (u_t - \cos\Omega_t\, m), \quad
      \cos\Omega_t = \langle u_t, m\rangle, \quad
      m \leftarrow \cos|v|\, m + \sin|v| \frac{v}{|v|}, \quad \theta = m \sum_t w_t |\theta_t|

    m starts at the normalised mean of the :math:`u_t` (at the first of them, if they balance out) and stays in their
    span. So the rounds run on the T x T inner products of the models: one pass over the tensors gives those, another
    the result. They end where :math:`|v|` is below ``tol``. Tensors of norm up to ``tol`` have no direction and count
    in the length alone; the antipode of m, which has no log-map, is left out of a round.

    The defaults give what mergekit's ``karcher`` gives without a ``base_model``; with one, it takes the base as one
    more model.

    Args:
      weights: w_t, a number or one per task, divided by their sum.
      max_iter: most rounds.
      tol: at least 0, see above.

    Returns:
      A merge rule on weights. The base's values do not enter.

    Raises:
      ParameterError: for values out of range, or weights whose sum is 0.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
      >>> tj.merge({"w": jnp.zeros(2)}, models, tj.karcher())["w"].round(3).tolist()
      [1.4140000343322754, 1.4140000343322754]
    """
    weights = weights_with_sum("karcher", weights)
    max_iter = whole("karcher", "max_iter", max_iter, 0)
    tol = single("karcher", "tol", tol, 0)

    def apply(x, carry):
        models, w = weights_of(x), shares(x)
        if len(x.tasks) == 1:
            return models[0]
        products = gram(carry)
        norms = root(jnp.diagonal(products))
        mean = _mean(cosines(products), jnp.where(norms > tol, w, 0), norms > tol, max_iter, tol)
        return combined(x, models, safe_ratio(mean, norms) * jnp.sum(w * norms))

    return Step(
        stages=(inner_products(weights_of),),
        apply=apply,
        output="parameters",
        spec=spec("karcher", max_iter=max_iter, tol=tol),
        numbers={"weights": weights},
    )


def _mean(cosine, weights, valid, rounds: int, tol) -> jax.Array:
    """Coefficients ``(T,)`` of the unit vectors whose ``(T, T)`` cosines are given, of their mean on the sphere."""
    weights = safe_ratio(weights, jnp.sum(weights))

    def times(c):
        return jnp.sum(cosine * c, axis=1)  # no matmul: accelerators round its factors

    def length(c):
        return root(jnp.sum(c * times(c)))

    first = (jnp.arange(weights.shape[0]) == jnp.argmax(valid)) & valid
    balanced = length(weights) < tol
    start = jnp.where(balanced, first, safe_ratio(weights, length(jnp.where(balanced, 1.0 * first, weights))))

    def one_round(_, c):
        dot = times(c)
        # On the mean itself the log-map is 0, at its antipode it is anything.
        off = valid & (dot < 1) & (dot > _ANTIPODE - 1)
        away = angle(jnp.where(off, dot, 0))
        pull = jnp.where(off, weights * away / jnp.sin(away), 0)
        tangent = pull - jnp.sum(pull * dot) * c
        step = length(tangent)
        moved = jnp.cos(step) * c + jnp.sinc(step / jnp.pi) * tangent
        return jnp.where(step < tol, c, safe_ratio(moved, length(moved)))

    return lax.fori_loop(0, rounds, one_round, start)
