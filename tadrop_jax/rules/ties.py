r"""TIES-Merging (arXiv 2306.01708)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from tadrop_jax.parameters import choice, flag, number, single
from tadrop_jax.rules.task_arithmetic import task_arithmetic
from tadrop_jax.sparsifiers.magnitude import KEEP, magnitude
from tadrop_jax.stages import Guess, Sums
from tadrop_jax.steps import AnyStep, Chain, Step, chain, over_tasks, product, safe_ratio, spec

FLAVOURS: dict[str, dict[str, Any]] = {
    "authors": {
        "granularity": "global",
        "keep": "floor_plus_one",
        "combine": "mean",
        "elect": "unweighted",
        "zero_sign": "majority",
        "divisor": "count",
    },
    "mergekit": {
        "granularity": "tensor",
        "keep": "exact_at_least_one",
        "combine": "mean",
        "elect": "weighted",
        "zero_sign": "positive",
        "divisor": "weights",
    },
    "peft": {
        "granularity": "tensor",
        "keep": "exact",
        "combine": "mean",
        "elect": "unweighted",
        "zero_sign": "positive",
        "divisor": "count",
    },
}


def ties(
    density: Any = 0.2,
    coefficient=1.0,
    *,
    weights=1.0,
    flavour: str | None = None,
    granularity: str | None = None,
    combine: str | None = None,
    elect: str | None = None,
    zero_sign: str | None = None,
    divisor: str | None = None,
    keep: str | None = None,
) -> Chain:
    r"""Trims, elects a sign for each entry, and averages the entries that agree with it.

    .. math::

      s = sign(\sum_t \tau_t), \quad
      \tau = \frac{\sum_{t: sign \tau_t = s} w_t \tau_t}{|\{t: sign \tau_t = s\}|}, \quad
      \theta = \theta_0 + coefficient \cdot \tau

    Three parties implement this differently. ``flavour`` is a preset of the parameters below, any of which overrides
    it: ``"authors"`` (ties-merging, ``src/utils/merge_utils.py``; the default), ``"mergekit"``
    (``GTATask`` with ``ties``; through :func:`tadrop_jax.merge` equal to its output) and ``"peft"``
    (``peft.utils.merge_utils.ties``; through :func:`tadrop_jax.merge_task_vectors` equal to it). fusion-bench
    (``TiesMergingAlgorithm``) has the authors' functions: its ``threshold`` is the density in percent, its
    ``scaling_factor`` the coefficient, its ``merge_func`` our ``combine``.

    Args:
      density: share that the trim keeps, in [0, 1], a number or one per task (the authors' K = 20 is 0.2). None
        switches the trim off: then a sparsifier before this rule replaces it.
      coefficient: multiplies the merged vector.
      weights: w_t, a number or one per task.
      flavour: preset, see above.
      granularity: of the trim: ``"global"`` (one threshold for the whole task vector) or ``"tensor"``.
      combine: ``"mean"``, ``"sum"``, or ``"max"`` (the largest magnitude, times the sign).
      elect: ``"unweighted"`` (the sign of the sum), ``"weighted"`` (of the weighted sum) or ``"frequency"`` (of the sum
        of signs; PEFT).
      zero_sign: the sign where the election ends in 0: ``"majority"`` of all elected signs over the whole vector, or
        ``"positive"``. Where the majority is 0 too, the negative entries are averaged or summed, and ``combine="max"``
        gives 0 (as the authors' ``disjoint_merge``).
      divisor: of the mean: ``"count"`` of the agreeing tasks, or the sum of their ``"weights"``.
      keep: how many entries the trim keeps, see :func:`tadrop_jax.magnitude`. An exact count of a flavour becomes a
        count that keeps ties where ``granularity="global"`` overrides the flavour's.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range, or parameters that do not go together.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[4.0, 1.0], [2.0, -3.0]])}
      >>> tj.merge_task_vectors(stack, tj.ties(1.0))["w"].tolist()
      [3.0, -3.0]
    """
    choice("ties", "flavour", flavour, (None, *FLAVOURS))
    given = {
        "granularity": granularity,
        "combine": combine,
        "elect": elect,
        "zero_sign": zero_sign,
        "divisor": divisor,
        "keep": keep,
    }
    chosen: dict[str, Any] = FLAVOURS[flavour or "authors"] | {k: v for k, v in given.items() if v is not None}
    choice("ties", "granularity", chosen["granularity"], ("tensor", "global"))
    choice("ties", "keep", chosen["keep"], KEEP)
    if density is not None:
        density = number("ties", "density", density, 0, 1)
        if keep is None and granularity == "global" and chosen["keep"].startswith("exact"):
            # Exact counts break ties by position in a tensor; over the tree ties are kept.
            chosen["keep"] = "at_least_one" if chosen["keep"].endswith("at_least_one") else "floor"
    coefficient = single("ties", "coefficient", coefficient)
    rule = _elect_and_merge(
        coefficient,
        number("ties", "weights", weights),
        choice("ties", "combine", chosen["combine"], ("mean", "sum", "max")),
        choice("ties", "elect", chosen["elect"], ("unweighted", "weighted", "frequency")),
        choice("ties", "zero_sign", chosen["zero_sign"], ("majority", "positive")),
        choice("ties", "divisor", chosen["divisor"], ("count", "weights")),
    )
    if density is None:
        return chain(rule)
    return chain(magnitude(density, chosen["granularity"], keep=chosen["keep"]), rule)


def after_own(density, sparsifier: Callable[[], AnyStep], rule: AnyStep) -> Chain:
    """A rule after its own sparsifier, which ``density=None`` leaves out: then one given apart takes its place."""
    return chain(rule) if density is None else chain(sparsifier(), rule)


def linear_or_elected(method: str, elect: bool, normalize: bool, coefficient, weights) -> Chain | Step:
    """What mergekit's methods do after their sparsifier: the weighted sum, of all entries or of those that agree.

    Raises:
      ParameterError: for values that are no numbers, or no flag.
    """
    coefficient, weights = single(method, "coefficient", coefficient), number(method, "weights", weights)
    normalize = flag(method, "normalize", normalize)
    if not elect:
        return task_arithmetic(coefficient, weights=weights, normalize=normalize)
    combine = "mean" if normalize else "sum"
    return ties(None, coefficient, weights=weights, flavour="mergekit", combine=combine)


def _elect_and_merge(coefficient, weights, combine, elect, zero_sign, divisor) -> Step:
    def weighted(x):
        return product(x.stack, x.per_task(x.numbers["weights"]))  # rounded, so that no sign is left where they cancel

    def elected(x):
        votes = {
            "unweighted": lambda: x.stack,
            "weighted": lambda: weighted(x),
            "frequency": lambda: jnp.sign(x.stack),
        }
        return x.once(jnp.sign(over_tasks(jnp.add, votes[elect]())))

    def voters_of(x):
        return weighted(x) if elect == "weighted" else x.stack

    def majority(x, carry, n):
        return {"majority": elected(x)[None]}

    def undecided(x, carry):
        return (elected(x) == 0) & (over_tasks(jnp.maximum, voters_of(x)) > 0)

    # Where an election ends in 0, all entries are 0 mostly; only where they cancel, some above 0 and some below, does
    # the majority count. But a maximum of zeros has its sign.
    positive = Guess({"majority": 1.0}, lambda carry: carry["majority"][0] > 0, undecided)
    guess = None if combine == "max" else positive

    def apply(x, carry):
        sign = elected(x)
        otherwise = jnp.sign(carry["majority"][0]) if zero_sign == "majority" else 1.0
        sign = jnp.where(sign == 0, otherwise, sign)
        towards = voters_of(x) * jnp.where(sign > 0, 1.0, -1.0)
        # Task by task, since on the whole stack XLA on CPU would find the sign anew for each task.
        tasks = range(len(x.stack))
        coefficient, weight = x.numbers["coefficient"], x.per_task(x.numbers["weights"])
        weight = jnp.broadcast_to(weight, (len(tasks), *(1,) * (x.stack.ndim - 1)))
        agree = [towards[t] > 0 for t in tasks]
        chosen = [jnp.where(agree[t], x.stack[t] * weight[t], 0) for t in tasks]
        if combine == "max":
            return coefficient * over_tasks(jnp.maximum, [jnp.abs(c) for c in chosen]) * sign
        total = over_tasks(jnp.add, chosen)
        if combine == "sum":
            return coefficient * total
        if divisor == "count":
            return coefficient * total / jnp.maximum(over_tasks(jnp.add, [a.astype(jnp.float32) for a in agree]), 1)
        share = over_tasks(jnp.add, [jnp.where(agree[t], weight[t], 0) for t in tasks])
        return coefficient * jnp.where(share == 0, total, safe_ratio(total, share))

    return Step(
        stages=(Sums(majority, scope="global", guess=guess),) if zero_sign == "majority" else (),
        apply=apply,
        output="vector",
        spec=spec(
            "ties",
            combine=combine,
            elect=elect,
            zero_sign=zero_sign,
            divisor=divisor,
        ),
        numbers={"coefficient": coefficient, "weights": weights},
    )
