r"""EMR-Merging: elect, mask, rescale (arXiv 2405.17461)."""

import jax.numpy as jnp

from tadrop_jax.kinds import masked_vector
from tadrop_jax.parameters import choice
from tadrop_jax.selection import magnitude
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Step, over_tasks, patterns, safe_ratio, spec

KIND = masked_vector("emr")


def emr(rescaler: str = "tensor_mean", per_task=()) -> Step:
    r"""One unified vector for all tasks, and for each task a mask of one bit an entry and one number.

    .. math::

      \gamma = \pm 1 \text{ as } mean_t \tau_t > 0 \text{ or not}, \quad
      \tau_{uni} = \gamma \max_{t: \tau_t \gamma > 0} |\tau_t|, \quad M_t = \tau_t \gamma > 0, \quad
      \theta_t = \theta_0 + \lambda_t M_t \tau_{uni}

    Unified vector, masks and rescalers are all taken from the vectors as a sparsifier before this rule left them. A
    zero task vector gets the rescaler 0. The default is the authors' code (``harveyhuang18/EMR_Merging``,
    ``emr_merge``) and fusion-bench's function of that name.

    Args:
      rescaler: :math:`\lambda_t = \sum |\tau_t| / \sum |M_t \tau_{uni}|` with ``"global"`` sums over all entries (the
        paper), or with ``"tensor_mean"``: the sum over tensors of their means, so that a bias weighs like a matrix (the
        authors' code; the default).
      per_task: regular expression(s) of tensors that stay each task's own, heads for instance.

    Returns:
      A per-task rule: :func:`tadrop_jax.merge` gives an :class:`~tadrop_jax.bundles.Bundle`.

    Raises:
      ParameterError: for an unknown rescaler or a broken pattern.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> models = [{"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 1.0])}]
      >>> bundle = tj.merge({"w": jnp.zeros(2)}, models, tj.emr())
      >>> bundle.unified["w"].tolist()
      [3.0, -2.0]
    """
    choice("emr", "rescaler", rescaler, ("tensor_mean", "global"))

    def parts(x):
        return x.shared("parts", lambda: unify(x))

    def unify(x):
        sign = x.once(jnp.where(over_tasks(jnp.add, x.stack) > 0, 1.0, -1.0))
        agreeing = x.stack * sign
        masks = agreeing > 0
        return sign * x.once(over_tasks(jnp.maximum, jnp.maximum(agreeing, 0))), masks

    def sums(x, carry, n):
        unified, masks = parts(x)
        share = 1.0 / n if rescaler == "tensor_mean" else 1.0
        return {"own": magnitude(x.stack) * share, "unified": jnp.where(masks, magnitude(unified), 0) * share}

    def apply(x, carry):
        unified, masks = parts(x)
        return {"unified": unified, "masks": masks}

    return Step(
        stages=(Sums(sums, scope="global", aside=True),),
        apply=apply,
        output="bundle",
        kind=KIND,
        scalars=lambda carry, tasks: {"rescalers": safe_ratio(carry["own"], carry["unified"])},
        per_task=patterns(per_task),
        spec=spec("emr", rescaler=rescaler),
    )
