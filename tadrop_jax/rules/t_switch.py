r"""T-Switch: task vectors as one mask bit and one sign bit an entry, and one number a tensor (arXiv 2412.00054)."""

import jax.numpy as jnp
import numpy as np

from tadrop_jax import wide
from tadrop_jax.errors import MergeError
from tadrop_jax.kinds import Kind, Part
from tadrop_jax.parameters import choice, lengths, number
from tadrop_jax.stages import Ranks, Sums
from tadrop_jax.steps import (
    AnyStep,
    Chain,
    Step,
    at_least,
    chain,
    floor_times,
    output_of,
    patterns,
    safe_ratio,
    safe_sqrt,
    spec,
)


def t_switch(density=0.4, *, empty_side: str = "keep", per_task=()) -> Chain:
    r"""Drops small entries of each tensor, and keeps of the rest the signs and the norm.

    .. math::

      \tau'_t = drop(\tau_t), \quad
      \theta_t = \theta_0 + \frac{\|\tau'_t\|_2}{\|sign \tau'_t\|_2} sign \tau'_t

    for each tensor. The drop keeps the largest ``int(density * n)`` of the n positive entries, and of the negative ones
    alike, with all that equal the threshold. Any sparsifier can take its place: ``tj.t_switch(tj.tadrop())`` gives each
    tensor a density of its own, as does ``tj.t_switch(None)`` with the sparsifier before the rule.

    The authors' code (``lfy-123/Binary-Task-Switch``, ``process_matrix`` and ``binarize_matrix``) drops 60 % of full
    fine-tunes and 40 % of LoRA. Where the count of a side comes to 0 it leaves that side whole; so it does with a
    tensor that is a single number. ``empty_side="drop"`` follows the formula instead.

    Args:
      density: share to keep of each side, in [0, 1], a number or one per task; or a sparsifier that drops in its place;
        or None for no drop.
      empty_side: what becomes of a side of which the density keeps no entry: ``"keep"`` (all of it, the authors) or
        ``"drop"``. Density 0 gives zeros either way.
      per_task: regular expression(s) of tensors that stay each task's own, heads for instance.

    Returns:
      A per-task rule: :func:`tadrop_jax.merge` gives a :class:`~tadrop_jax.bundles.Bundle`.

    Raises:
      ParameterError: for values out of range or a broken pattern.
      MergeError: if a merge rule is given in place of a sparsifier.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> bundle = tj.merge_task_vectors({"w": jnp.array([[3.0, 1.0, -4.0, -2.0]])}, tj.t_switch(0.5))
      >>> bundle.mask(0)["w"].tolist(), round(float(bundle.task_vector(0)["w"][0]), 4)
      ([True, False, True, False], 3.5355)
    """
    choice("t_switch", "empty_side", empty_side, ("keep", "drop"))
    last = _signs_and_scale(patterns(per_task))
    if density is None:
        return chain(last)
    if isinstance(density, AnyStep):
        if output_of(density) != "stack":
            raise MergeError("t_switch takes a density or a sparsifier, not a merge rule")
        return chain(density, last)
    return chain(_drop(number("t_switch", "density", density, 0, 1), empty_side), last)


def _parts(shape, tasks):
    bits = Part((tasks, *shape), "tasks and entries", "bits")
    return {"masks": bits, "signs": bits, "scales": Part((tasks,), "tasks", "float32")}


def _rebuild(xp, parts, scalars):
    scale = parts["scales"]
    return xp.where(parts["masks"], xp.where(parts["signs"], scale, -scale), np.float32(0))


KIND = Kind("t_switch", _parts, _rebuild)


def _drop(density, empty_side) -> Step:
    """Keeps the largest entries of each side, by exact counts."""

    def count(x, carry, n):
        return {"positive": _positive(x.stack), "negative": _positive(-x.stack)}

    def kept(counts):
        if isinstance(density, tuple):
            each = [_kept(d, counts[t], empty_side) for t, d in enumerate(density)]
            return wide.Wide(*(jnp.stack(limbs) for limbs in zip(*each, strict=True)))
        return _kept(density, counts, empty_side)

    def ranks(n, carry):
        one = wide.wide(1)
        return {
            "top": wide.subtract(wide.wide(n), kept(carry["positive"])),
            "bottom": wide.subtract(wide.maximum(kept(carry["negative"]), one), one),
        }

    def apply(x, carry):
        some = x.once(wide.at_least(kept(carry["negative"]), wide.wide(1)))
        high = at_least(x.stack, x.column(carry["top"])) & _positive(x.stack)
        low = at_least(x.column(carry["bottom"]), x.stack) & _positive(-x.stack) & x.column(some)
        return jnp.where(high | low, x.stack, 0)

    return Step(
        stages=(Sums(count), Ranks(lambda x, carry: x.stack, at=ranks)),
        apply=apply,
        lengths=lengths(density=density),
        spec=spec("t_switch drop", density=density, empty_side=empty_side),
    )


def _positive(stack):
    """Whether entries are above 0, subnormals too: the counts have to agree with the ranks."""
    return ~at_least(jnp.zeros((), stack.dtype), stack)


def _kept(density, counts, empty_side) -> wide.Wide:
    """How many of a side's entries stay."""
    counts = jnp.asarray(counts)
    found = wide.wide(floor_times(density, counts))
    if empty_side == "keep":
        found = wide.where((found.high == 0) & (found.low == 0), wide.wide(counts), found)
    return wide.where(jnp.asarray(density) > 0, found, wide.wide(0))


def _signs_and_scale(per_task) -> Step:
    def sums(x, carry, n):
        nonzero = x.stack != 0
        return {"squares": x.stack * x.stack, "nonzero": nonzero, "share": jnp.where(nonzero, 1.0 / n, 0)}

    def scales(carry):
        return safe_sqrt(safe_ratio(carry["squares"], carry["nonzero"].astype(jnp.float32)))

    return Step(
        stages=(Sums(sums),),
        apply=lambda x, carry: {"masks": x.stack != 0, "signs": x.stack > 0, "scales": scales(carry)},
        output="bundle",
        kind=KIND,
        report=lambda carry: {"sparsity": 1 - carry["share"], "scale": scales(carry)},
        per_task=per_task,
        spec=spec("t_switch"),
    )
