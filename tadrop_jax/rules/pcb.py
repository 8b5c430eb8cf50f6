r"""PCB-Merging: parameter competition balancing (arXiv 2410.02396)."""

from typing import Any

import jax.numpy as jnp

from tadrop_jax import wide
from tadrop_jax.errors import ParameterError
from tadrop_jax.parameters import choice, number
from tadrop_jax.selection import magnitude
from tadrop_jax.stages import Ranks, magnitudes
from tadrop_jax.steps import Step, floor_times, over_tasks, safe_ratio, spec

VERSIONS: dict[str, dict[str, Any]] = {
    "repository": {"clip": 0.0001, "coefficient": 1.0},
    "vision": {"clip": 0.01, "coefficient": 1.2},
}
_ROUNDING = 2.0**-21  # of the exponential and the hyperbolic tangent, in two functions
_OVERFLOWS = 80  # e^T times anything of size 1 is a float32 up to here


def pcb(ratio=0.1, version: str = "repository", coefficient=None) -> Step:
    r"""Weights each entry of each task by its size within the task and its agreement with the others.

    .. math::

      a_t = clamp(|\tau_t|), \quad N_t = normalize(a_t), \quad
      \beta_t = e^{T N_t^2} \tanh(\tau_t \sum_j \sigma_j), \quad
      w_t = normalize(\max(\beta_t, Q_{1 - ratio}(\beta_t))), \quad
      \tau = \frac{\sum_t w_t\, sign(\tau_t)\, a_t}{\max(\sum_t w_t, 10^{-12})}

    All statistics are over a task's whole vector of d entries: the clamp goes from the entry of rank
    ``int(d * c)`` to that of rank ``int(d * (1 - c) - 1)``, and normalize maps least and largest to 0 and 1. The
    repository (``duguodong7/pcb-merging``) has two versions: ``pcb-merging.py`` with c = .0001 and
    :math:`\sigma_j = \tau_j`, and ``vision_source_code/pcb.py`` with c = .01 and :math:`\sigma_j = sign(\tau_j) N_j`.
    Order statistics are exact, by counting; what is above the floor by no more than rounding is at the floor. A task
    whose values are all alike takes no part (the authors' code gives NaN).

    Args:
      ratio: share of entries of each task that take part, in (0, 1]; the authors use .1, and .05 for vision.
      version: ``"repository"`` or ``"vision"``.
      coefficient: multiplies the vectors inside the mean; a number or one per task. None means the version's own: 1, or
        1.2 for vision.

    Returns:
      A merge rule, granularity "global".

    Raises:
      ParameterError: for values out of range; a ratio of 0 leaves nothing, nor, when run, one of no more than an entry.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, 0.25, 0.0, 0.0], [0.5, -0.5, 0.0, 0.0]])}
      >>> tj.merge_task_vectors(stack, tj.pcb(0.5))["w"].tolist()
      [0.375, 0.0, 0.0, 0.0]
    """
    choice("pcb", "version", version, tuple(VERSIONS))
    ratio = number("pcb", "ratio", ratio, 0, 1)
    if isinstance(ratio, tuple) or (isinstance(ratio, (int, float)) and ratio == 0):
        raise ParameterError(f"pcb: ratio is one number in (0, 1] for all tasks, got {ratio}")
    clip = VERSIONS[version]["clip"]
    coefficient = VERSIONS[version]["coefficient"] if coefficient is None else coefficient
    coefficient = number("pcb", "coefficient", coefficient)

    def bounds(n, carry):
        return {"least": int(n * clip), "most": int(n * (1 - clip) - 1)}

    def sizes(x, carry):
        return jnp.clip(magnitude(x.stack), x.column(carry["least"]), x.column(carry["most"]))

    def normalized(x, carry):
        least, most = x.column(carry["least"]), x.column(carry["most"])
        return safe_ratio(sizes(x, carry) - least, most - least)

    def balance(x, carry):
        tasks, share = x.stack.shape[0], normalized(x, carry)
        signed = x.stack if version == "repository" else jnp.sign(x.stack) * share
        # A common factor leaves the normalized weights as they are.
        lower = tasks if tasks > _OVERFLOWS else 0
        within = jnp.exp(tasks * (share * share) - lower)
        return within * jnp.tanh(x.stack * x.once(over_tasks(jnp.add, signed)))

    def competing(n, carry):
        rank = floor_times(1 - ratio, n)
        if isinstance(rank, int) and n > 1 and rank >= n - 1:  # the floor is the largest entry
            raise ParameterError(f"pcb: with ratio {ratio:g} none of {n} entries takes part: it has to be above 1/{n}")
        last = min(rank, n - 1) if isinstance(rank, int) else wide.minimum(rank, wide.wide(n - 1))
        return {"floor": last, "top": n - 1}

    def apply(x, carry):
        value, floor, top = balance(x, carry), x.column(carry["floor"]), x.column(carry["top"])
        # A select, not a maximum, whose gradient at the floor would be half of one. The floor itself may come out
        # some bits off where it is computed anew, and must not count: alone, the least weight is as good as 1.
        above = value - floor > _ROUNDING * (jnp.abs(value) + jnp.abs(floor))
        weights = safe_ratio(jnp.where(above, value - floor, 0), top - floor)
        vectors = jnp.sign(x.stack) * sizes(x, carry) * x.per_task(x.numbers["coefficient"])
        merged = over_tasks(jnp.add, weights * vectors)
        return merged / jnp.maximum(over_tasks(jnp.add, weights), 1e-12)

    return Step(
        stages=(
            Ranks(magnitudes, at=bounds, scope="global", attached=True),
            Ranks(balance, at=competing, scope="global", attached=True),
        ),
        apply=apply,
        output="vector",
        spec=spec("pcb", ratio=ratio, version=version),
        numbers={"coefficient": coefficient},
    )
