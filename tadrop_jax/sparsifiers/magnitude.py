"""Magnitude pruning: the trim of TIES-Merging (arXiv 2306.01708)."""

import jax.numpy as jnp

from tadrop_jax import selection, wide
from tadrop_jax.errors import ParameterError
from tadrop_jax.parameters import choice, lengths, number
from tadrop_jax.sparsifiers.ranking import each, exact_largest, from_top, is_kept
from tadrop_jax.stages import Ranks, Scope, magnitudes
from tadrop_jax.steps import Step, floor_times, spec

KEEP = ("at_least_one", "floor", "floor_plus_one", "exact", "exact_at_least_one")


def magnitude(density, granularity: Scope = "tensor", *, keep: str = "at_least_one") -> Step:
    r"""Keeps the k largest magnitudes of each tensor, or of each task's whole vector.

    .. math:: \tau' = \tau \cdot [|\tau| \ge Q_k(|\tau|)]

    with :math:`Q_k` the k-th largest. Density 0 gives zeros and 1 the identity, whatever ``keep`` says. The trim of
    TIES-Merging's authors is ``granularity="global", keep="floor_plus_one"``.

    Args:
      density: share to keep in [0, 1], a number or one per task; the authors write it in percent.
      granularity: ``"tensor"`` or ``"global"``.
      keep: how many: ``"at_least_one"`` is ``max(1, floor(density * n))`` (ours); ``"floor"``; ``"floor_plus_one"``
        (ties-merging, ``merge_utils.topk_values_mask``). All three also keep the entries equal to the threshold.
        ``"exact"`` is ``floor(density * n)`` and not one more, ties going to the lowest index (PEFT
        ``magnitude_based_pruning``), and ``"exact_at_least_one"`` the same, but at least 1 (mergekit
        ``sparsify.magnitude``); both for granularity "tensor" only.

    Returns:
      A sparsifier.

    Raises:
      ParameterError: for values out of range, or an exact ``keep`` with granularity "global".

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.sparsify({"w": jnp.array([[1.0, -2.0, 3.0, -8.0]])}, tj.magnitude(0.25))["w"].tolist()
      [[0.0, 0.0, 0.0, -8.0]]
    """
    density = number("magnitude", "density", density, 0, 1)
    choice("magnitude", "granularity", granularity, ("tensor", "global"))
    choice("magnitude", "keep", keep, KEEP)
    exact = keep.startswith("exact")
    if exact and granularity == "global":
        raise ParameterError(f"magnitude: keep={keep!r} breaks ties by position in a tensor: use granularity='tensor'")

    def kept(n, carry):
        return each(lambda d: kept_count(d, n, keep), density)

    def cut_rank(n, carry):
        return {"cut": each(lambda k: from_top(n, k), kept(n, carry))}

    stages = [Ranks(magnitudes, at=cut_rank, scope=granularity)]
    if exact:
        stages.append(exact_largest(magnitudes, kept, "magnitude"))

    def apply(x, carry):
        if exact:
            return jnp.where(is_kept(x, magnitudes(x, carry), carry), x.stack, 0)
        return jnp.where(selection.at_least(magnitudes(x, carry), x.column(carry["cut"])), x.stack, 0)

    return Step(
        stages=tuple(stages),
        apply=apply,
        report=lambda carry: {"threshold": carry["cut"]},
        lengths=lengths(density=density),
        spec=spec("magnitude", density=density, granularity=granularity, keep=keep),
    )


def kept_count(density, n: int, keep: str):
    """How many of n entries a density keeps: an int for a Python number, else a Wide."""
    k = floor_times(density, n)
    if isinstance(k, int):
        if keep.endswith("at_least_one"):
            k = max(k, 1)
        elif keep == "floor_plus_one":
            k = min(k + 1, n)
        return k if density > 0 else 0
    if keep.endswith("at_least_one"):
        k = wide.maximum(k, wide.wide(1))
    elif keep == "floor_plus_one":
        k = wide.minimum(wide.add(k, wide.wide(1)), wide.wide(n))
    return wide.where(jnp.asarray(density) > 0, k, wide.wide(0))
