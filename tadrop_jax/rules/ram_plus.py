r"""RAM+: reinforced agent merging with scaled unique changes (arXiv 2601.13572)."""

from typing import Any

import jax.numpy as jnp

from tadrop_jax.parameters import choice, single
from tadrop_jax.rules.ram import changed
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Step, over_tasks, spec

FLAVOURS: dict[str, dict[str, Any]] = {
    "mergekit": {"alpha": 0.2, "granularity": "tensor"},
    "authors": {"alpha": 1.0, "granularity": "global"},
}


def ram_plus(
    r=0.1,
    alpha=None,
    *,
    threshold=1e-5,
    granularity: str | None = None,
    coefficient=1.0,
    flavour: str | None = None,
) -> Step:
    r"""RAM, with what a task changed alone scaled up by how much of its change it shares.

    .. math::

      \rho_t = \frac{shared_t}{unique_t}, \quad \lambda_t = 1 + r \min(\rho_t, \alpha)

    where :math:`shared_t` and :math:`unique_t` count the entries that task t changed with others and alone. Entries
    that several tasks changed are averaged over those, unscaled, as in :func:`~tadrop_jax.ram`.

    Args:
      r: strength, at least 0; .1 in mergekit and as a default in the authors' code (``rescale_factor`` - 1, for which
        their scripts have .05 and .2).
      alpha: cap of the ratio, at least 0; None takes the flavour's.
      threshold: a change above it counts, at least 0.
      granularity: of the counts, ``"tensor"`` or ``"global"``; None takes the flavour's.
      coefficient: multiplies the merged vector; 1 in both.
      flavour: ``"mergekit"`` (``ramplus_tl``: alpha .2, tensor; the default) or ``"authors"`` (xiangchi-yuan/mrl, mode
        ``arm-r-v2``: alpha 1, global).

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 4.0]])}
      >>> tj.merge_task_vectors(stack, tj.ram_plus(0.5, 1.0))["w"].tolist()
      [1.5, 0.0, 3.0]
    """
    choice("ram_plus", "flavour", flavour, (None, *FLAVOURS))
    preset = FLAVOURS[flavour or "mergekit"]
    r = single("ram_plus", "r", r, low=0)
    alpha = single("ram_plus", "alpha", preset["alpha"] if alpha is None else alpha, low=0)
    threshold = single("ram_plus", "threshold", threshold, low=0)
    coefficient = single("ram_plus", "coefficient", coefficient)
    granularity = choice("ram_plus", "granularity", granularity or preset["granularity"], ("tensor", "global"))

    def counts(x, carry, n):
        active, count = changed(x, threshold)
        found = {"shared": active & (count > 1), "unique": active & (count == 1)}
        # Of a tensor, whole numbers; of the tree they may pass 32 bits.
        return found if granularity == "tensor" else {k: v.astype(jnp.float32) for k, v in found.items()}

    def factor(carry):
        shared, unique = (carry[name].astype(jnp.float32) for name in ("shared", "unique"))
        # Without a unique entry there is nothing to scale.
        return 1 + r * jnp.minimum(shared / jnp.maximum(unique, 1), alpha)

    def apply(x, carry):
        active, count = changed(x, threshold)
        scaled = x.stack * jnp.where(count == 1, x.column(factor(carry)), 1)
        return x.numbers["coefficient"] * over_tasks(jnp.add, jnp.where(active, scaled, 0)) / jnp.maximum(count, 1)

    return Step(
        stages=(Sums(counts, scope=granularity),),  # type: ignore[arg-type]
        apply=apply,
        output="vector",
        report=lambda carry: {"scale": factor(carry)},
        spec=spec("ram_plus", r=r, alpha=alpha, threshold=threshold, granularity=granularity),
        numbers={"coefficient": coefficient},
    )
