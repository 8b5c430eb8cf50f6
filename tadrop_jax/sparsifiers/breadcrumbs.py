r"""Model Breadcrumbs: neither the outliers nor the dust (arXiv 2312.06795)."""

from typing import Any

import jax.numpy as jnp

from tadrop_jax import wide
from tadrop_jax.parameters import choice, lengths, number
from tadrop_jax.selection import magnitude
from tadrop_jax.sparsifiers.ranking import between_ranks, check_positions, tie_order
from tadrop_jax.stages import Ranks, magnitudes
from tadrop_jax.steps import Step, floor_times, spec

_LONG = 1 << 17
FLAVOURS: dict[str, dict[str, Any]] = {
    "authors": {"granularity": "row", "first": "gamma"},
    "mergekit": {"granularity": "tensor", "first": "density"},
}


def breadcrumbs(
    density,
    gamma=0.01,
    *,
    granularity: str | None = None,
    first: str | None = None,
    flavour: str | None = None,
) -> Step:
    """Zeros the largest ``gamma`` share of magnitudes, and the smallest so that ``density`` remains.

    With C entries, the ``floor(gamma C)`` largest go, and of the rest the ``floor(density C)`` largest stay. Counts are
    exact: ties go in order of position, in PyTorch order where a ``layout`` is given. Nothing is rescaled. Density 0
    gives zeros and 1 the identity.

    Args:
      density: share to keep in [0, 1], a number or one per task. The authors' search found .15.
      gamma: share of outliers in [0, 1], a number or one per task. The authors' search found .006.
      granularity: ``"row"``: the last axis (a scalar has none, and stays; a row shorter than 1/density is zeroed, the
        3x3 kernels of convolutions for instance); ``"tensor"``: all of a tensor.
      first: what holds where both shares together exceed 1: ``"gamma"``: all outliers go, fewer than ``density``
        remain; ``"density"``: fewer outliers go.
      flavour: ``"authors"`` (rezazzr/breadcrumbs, ``TaskVectorMiddleKeep``; rows, gamma first; the default) or
        ``"mergekit"`` (``sparsify.magnitude_outliers``; tensors, density first): a preset of the two.

    Returns:
      A sparsifier.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, -2.0, 3.0, -8.0]])}
      >>> tj.sparsify(stack, tj.breadcrumbs(0.5, 0.25))["w"].tolist()
      [[0.0, -2.0, 3.0, 0.0]]
    """
    choice("breadcrumbs", "flavour", flavour, (None, *FLAVOURS))
    preset = FLAVOURS[flavour or "authors"]
    rows = choice("breadcrumbs", "granularity", granularity or preset["granularity"], ("row", "tensor")) == "row"
    before = choice("breadcrumbs", "first", first or preset["first"], ("gamma", "density"))
    density = number("breadcrumbs", "density", density, 0, 1)
    gamma = number("breadcrumbs", "gamma", gamma, 0, 1)

    def limits(n):
        """Ranks of the first entry that stays and of the first that no longer does, for each task."""
        both = [v if isinstance(v, tuple) else (v,) for v in (density, gamma)]
        many = max(map(len, both))
        pairs = zip(*(v * (many // len(v)) for v in both), strict=True)
        found = [_limits(d, g, n, before) for d, g in pairs]
        return [tuple(ranks) if many > 1 else ranks[0] for ranks in zip(*found, strict=True)]

    def step(rows: bool) -> Step:
        return Step(
            **(_of_rows(limits, density) if rows else _of_tensors(limits)),
            lengths=lengths(density=density, gamma=gamma),
            spec=spec("breadcrumbs", density=density, gamma=gamma, rows=rows, first=before),
            instead=long_row if rows else None,
        )

    def long_row(path, shape, tasks):
        """A long vector is one row, which need not be held whole."""
        return step(rows=False) if len(shape) == 1 and shape[0] > _LONG else None

    return step(rows)


def _limits(density, gamma, n, first: str):
    """The ranks that stay, from the first up to but without the last; ints, or Wides for arrays."""
    kept, outliers = floor_times(density, n), floor_times(gamma, n)
    if isinstance(kept, int) and isinstance(outliers, int):
        if density == 1:
            return 0, n
        start = max(n - kept - outliers, 0)
        return start, min(start + kept, n - outliers if first == "gamma" else n)
    n, kept, outliers = wide.wide(n), wide.wide(kept), wide.wide(outliers)
    rest = wide.subtract(n, outliers)
    start = wide.subtract(wide.maximum(rest, kept), kept)
    stop = rest if first == "gamma" else wide.maximum(rest, kept)
    identity = jnp.asarray(density) == 1
    return wide.where(identity, wide.wide(0), start), wide.where(identity, n, stop)


def _of_rows(limits, density) -> dict[str, Any]:
    """By two order statistics of each row, and the ties before them."""

    def apply(x, carry):
        values = x.in_torch_order()
        if values.ndim == 1:  # a number is no row
            return jnp.where(x.per_task(density) > 0, x.stack, 0)
        # A tuple has one rank for each task; the piece may be of some tasks only.
        ranks = (tuple(r[t] for t in x.tasks) if type(r) is tuple else r for r in limits(values.shape[-1]))
        stays = between_ranks(magnitude(values), *ranks)
        return x.from_torch_order(jnp.where(stays, values, 0))

    return {"apply": apply, "piece": "row"}


def _of_tensors(limits) -> dict[str, Any]:
    """By two order statistics, and two more of positions that part the entries equal to them: no sort."""

    def cuts(n, carry) -> dict[str, Any]:
        check_positions(n, "breadcrumbs")
        return dict(zip(("low", "high"), limits(n), strict=True))

    def order(name):
        return lambda x, carry: tie_order(x, magnitudes(x, carry), x.column(carry[name]))

    def apply(x, carry):
        low, high = order("low")(x, carry), order("high")(x, carry)
        # Past the last entry the cut is a bound that no entry reaches, and every entry lies before it.
        stays = (low >= x.column(carry["start"])) & (high < x.column(carry["stop"]))
        return jnp.where(stays, x.stack, 0)

    return {
        "apply": apply,
        "stages": (
            Ranks(magnitudes, at=cuts),
            Ranks(order("low"), at=lambda n, carry: {"start": limits(n)[0]}),
            Ranks(order("high"), at=lambda n, carry: {"stop": limits(n)[1]}),
        ),
    }
