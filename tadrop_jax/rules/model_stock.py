r"""Model Stock (arXiv 2403.19522)."""

import jax.numpy as jnp
import numpy as np

from tadrop_jax.parameters import choice, flag
from tadrop_jax.rules.geometry import angle, cosines, gram, inner_products, task_vectors_of
from tadrop_jax.steps import Step, over_tasks, spec

_POLE = 1e-6


def model_stock(average: str = "cosine", *, filter_wise: bool = False) -> Step:
    r"""The mean of the models, drawn towards the base the more their task vectors differ in direction.

    .. math::

      \cos\theta = mean_{s < t} \frac{\langle\tau_s, \tau_t\rangle}{|\tau_s| |\tau_t|}, \quad
      r = \frac{T \cos\theta}{1 + (T - 1) \cos\theta}, \quad \theta_0 + r \cdot mean_t \tau_t

    Where the divisor is below 1e-6 in size, at its pole :math:`\cos\theta = -1/(T - 1)`, the ratio is 0, as in
    mergekit. A pair with a zero task vector counts as orthogonal. mergekit divides by :math:`|\tau_s| |\tau_t|` or
    1e-6, whichever is larger, which turns tensors that moved by less than 1e-3 back to the base; here their direction
    counts like any other's.

    Args:
      average: of the pairs: ``"cosine"`` (mergekit; the default) or ``"angle"``, the cosine of their mean angle
        (fusion-bench, ``ModelStock``). The paper has two models, where both are the same.
      filter_wise: one ratio for each row (the last axis, in PyTorch order) in place of one for the tensor; mergekit's
        ``filter_wise``.

    Returns:
      A merge rule on task vectors, for at least two fine-tuned models.

    Raises:
      ParameterError: for an unknown average, or no flag.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, 0.0], [0.6, 0.8]])}
      >>> tj.merge_task_vectors(stack, tj.model_stock())["w"].round(3).tolist()
      [0.6000000238418579, 0.30000001192092896]
    """
    choice("model_stock", "average", average, ("cosine", "angle"))
    filter_wise = flag("model_stock", "filter_wise", filter_wise)

    def ratio(products):
        tasks = products.shape[-1]
        pairs = cosines(products)[..., *np.triu_indices(tasks, 1)]
        mean = jnp.mean(pairs, axis=-1) if average == "cosine" else jnp.cos(jnp.mean(angle(pairs), axis=-1))
        divisor = 1 + (tasks - 1) * mean
        pole = jnp.abs(divisor) < _POLE
        return jnp.where(pole, 0, tasks * mean / jnp.where(pole, 1, divisor))

    def mean_of(stack):
        return over_tasks(jnp.add, stack) / stack.shape[0]

    def whole(x, carry):
        return x.once(ratio(gram(carry))) * mean_of(x.stack)

    def rows(x, carry):
        stack = x.in_torch_order()
        flat = stack if stack.ndim > 1 else stack[:, None]
        found = ratio(jnp.einsum("t...i,s...i->...ts", flat, flat, precision="highest"))
        return x.from_torch_order(jnp.reshape(found[..., None] * mean_of(flat), stack.shape[1:]))

    return Step(
        stages=() if filter_wise else (inner_products(task_vectors_of),),
        apply=rows if filter_wise else whole,
        piece="row" if filter_wise else "any",
        output="vector",
        models=("model_stock", 2, None),
        spec=spec("model_stock", average=average, filter_wise=filter_wise),
    )
