r"""SCE: select, calculate, erase (FuseChat-3.0, arXiv 2408.07990)."""

from typing import Any

import jax.numpy as jnp

from tadrop_jax import wide
from tadrop_jax.errors import ParameterError
from tadrop_jax.parameters import number
from tadrop_jax.sparsifiers.ranking import exact_largest, from_top, is_kept
from tadrop_jax.stages import Ranks, Sums
from tadrop_jax.steps import Step, over_tasks, product, spec


def sce(density: Any = 0.1, coefficient=1.0) -> Step:
    r"""Merges the entries on which the tasks differ most, weighted by the size of each task's change.

    .. math::

      w_t = \frac{mean(\tau_t^2)}{\sum_j mean(\tau_j^2)}, \quad
      s = \pm 1 \text{ as } \sum_t \tau_t \ge 0 \text{ or not}, \quad
      \tau = \frac{\sum_{t: sign \tau_t = s} w_t \tau_t}{\max(\sum_{t: sign \tau_t = s} w_t, 10^{-6})}

    on what is left of each tensor after selection: of the entries with a variance over the tasks that is not zero, the
    ``floor(density * number)`` of largest variance, exactly; ties go to the lowest position in PyTorch order. Equal to
    mergekit's ``sce`` (``density`` is its ``select_topk``), which is the authors' own, with its two guards: the divisor
    above, and equal weights where the sum of mean squares is below 1e-6, as it is for many a fine-tune.

    Args:
      density: share of the varying entries to keep, in [0, 1]; the authors have .1. None or 1 keeps all entries.
      coefficient: multiplies the merged vector; 1 in mergekit.

    Returns:
      A merge rule, granularity "tensor". Copies of one model do not vary: with a density below 1 the base comes back.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[2.0, 1.0, 3.0], [2.0, 1.0, -1.0]])}
      >>> tj.merge_task_vectors(stack, tj.sce(None))["w"].round(4).tolist()
      [2.0, 1.0, 3.0]
    """
    density = None if density is None else number("sce", "density", density, 0, 1)
    coefficient = number("sce", "coefficient", coefficient)
    if isinstance(density, tuple) or isinstance(coefficient, tuple):
        raise ParameterError("sce: density and coefficient are one number for all tasks")
    everything = density is None or (isinstance(density, (int, float)) and density == 1)

    def spread(x, carry):
        return _spread(x.stack)[None]

    def varying(x, carry, n):
        return {"varying": _spread(x.stack)[None] > 0}

    def count(n, carry):
        # In float32, as mergekit multiplies a count with a number.
        share = jnp.asarray(density, jnp.float32)
        kept = wide.wide(jnp.floor(carry["varying"] * share).astype(jnp.uint32))
        return wide.where(share == 1, wide.wide(n), kept)

    def selected(x, carry):
        return x.stack if everything else jnp.where(x.once(is_kept(x, spread(x, carry), carry)), x.stack, 0)

    def squares(x, carry, n):
        return {"square": selected(x, carry) ** 2 / n}

    def apply(x, carry):
        changes = selected(x, carry)
        total = jnp.sum(carry["square"])
        small = total < 1e-6
        weights = jnp.where(small, 1 / x.stack.shape[0], carry["square"] / jnp.where(small, 1, total))
        positive = x.once(over_tasks(jnp.add, changes) >= 0)
        agreeing = jnp.where(jnp.where(positive, changes > 0, changes < 0), x.column(weights), 0)
        merged = over_tasks(jnp.add, changes * agreeing)
        return x.numbers["coefficient"] * merged / jnp.maximum(over_tasks(jnp.add, agreeing), 1e-6)

    selection = (
        Sums(varying),
        Ranks(spread, at=lambda n, carry: {"cut": from_top(n, count(n, carry))}),
        exact_largest(spread, count, "sce"),
    )
    return Step(
        stages=(*(() if everything else selection), Sums(squares)),
        apply=apply,
        output="vector",
        spec=spec("sce", density=density),
        numbers={"coefficient": coefficient},
    )


def _spread(stack):
    """The variance over tasks times T^2, of the differences to the first task: exactly 0 for equal tasks.

    The differences lose nothing to what all tasks have in common; since one of them is 0, at most a factor T of their
    precision cancels.
    """
    apart = stack - stack[:1]
    total, squares = over_tasks(jnp.add, apart), over_tasks(jnp.add, product(apart, apart))
    return product(squares, jnp.float32(len(stack))) - product(total, total)
