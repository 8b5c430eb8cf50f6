r"""TADrop: tensor-wise adaptive drop (arXiv 2508.06163)."""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from tadrop_jax import wide
from tadrop_jax.errors import ParameterError
from tadrop_jax.parameters import known, number, ordered
from tadrop_jax.sparsifiers.norms import check_norm, describe, norm_stages, prune
from tadrop_jax.stages import Ranks, magnitudes
from tadrop_jax.steps import Step, floor_times, product, safe_ratio, spec


def tadrop(
    q_low=0.95,
    q_high=0.99,
    *,
    norm: int | None = 2,
    mapping: str | Callable = "identity",
    s_min=0.0,
    s_max=0.9,
) -> Step:
    r"""Gives each tensor of each task its own sparsity, read off the distribution of its magnitudes.

    .. math::

      QR = Q_{|\tau|}(q_{low}) / Q_{|\tau|}(q_{high}), \quad s = clip(g(QR), s_{min}, s_{max}), \quad
      \tau' = keep \cdot \tau \cdot \|\tau\|_p / \|keep \cdot \tau\|_p

    keeps the ``n - floor(s n)`` largest magnitudes, and entries equal to the threshold. A small ratio means a heavy
    tail: little is pruned. A tensor whose ``Q(q_high)`` is 0 is sparse already and stays as it is.

    The paper gives the quantile ratio, the direction, and the norm-preserving scaling. It was not published with code,
    and these three choices are **ours**: the two quantiles (the best pair of six on validation images of three bases,
    docs/results.md), the map g from ratio to sparsity, and the norm p.

    Args:
      q_low: lower quantile in [0, 1], NumPy's method "lower". A float, or a float32 scalar that may be traced.
      q_high: upper quantile, at least ``q_low``.
      norm: p = 2, 1, or None for no scaling.
      mapping: g: ``"identity"``, ``"affine:SLOPE,OFFSET"``, ``"power:EXPONENT"``, or a function of the ratios ``(T,)``.
        Steps with equal functions share a compilation: a function must go on to do what it did when it was first run.
      s_min: least sparsity in [0, 1].
      s_max: largest sparsity, from s_min up to but without 1.

    Returns:
      A sparsifier, granularity "tensor".

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, -2.0, 3.0, -8.0]])}
      >>> tj.sparsify(stack, tj.tadrop(0.5, 1.0, norm=None))["w"].tolist()
      [[0.0, -2.0, 3.0, -8.0]]
    """
    q_low, q_high = number("tadrop", "q_low", q_low, 0, 1), number("tadrop", "q_high", q_high, 0, 1)
    s_min, s_max = number("tadrop", "s_min", s_min, 0, 1), number("tadrop", "s_max", s_max, 0, 1)
    if any(isinstance(v, tuple) for v in (q_low, q_high, s_min, s_max)):
        raise ParameterError("tadrop: q_low, q_high, s_min and s_max are one number for all tasks")
    ordered("tadrop", q_low, q_high, "q_low <= q_high")
    ordered("tadrop", s_min, s_max, "s_min <= s_max")
    if known(s_max) == 1:
        raise ParameterError("tadrop: s_max must lie below 1, or a tensor may lose all of its entries")
    check_norm("tadrop", norm)
    to_sparsity = _mapping(mapping)

    def quantile_ranks(n, carry):
        return {"low": floor_times(q_low, n - 1), "high": floor_times(q_high, n - 1)}

    def cut_rank(n, carry):
        # Clipped as ranks, so that s_min and s_max given as Python floats count in float64.
        rank = wide.wide(floor_times(to_sparsity(safe_ratio(carry["low"], carry["high"])), n))
        rank = wide.minimum(wide.maximum(rank, wide.wide(floor_times(s_min, n))), wide.wide(floor_times(s_max, n)))
        return {"cut": wide.where(carry["high"] == 0, wide.wide(0), rank)}

    return Step(
        stages=(
            Ranks(magnitudes, at=quantile_ranks),
            Ranks(magnitudes, at=cut_rank, again=True),
            *norm_stages(norm),
        ),
        apply=functools.partial(prune, norm=norm),
        report=lambda c: {"quantile_ratio": safe_ratio(c["low"], c["high"])} | describe(c, norm),
        spec=spec("tadrop", q_low=q_low, q_high=q_high, norm=norm, mapping=mapping, s_min=s_min, s_max=s_max),
    )


def _unknown(number: float, ratio):
    """A number that XLA does not know for a constant, for which it rewrites sums and powers: executors round alike."""
    return jnp.float32(number) + 0 * ratio


def _mapping(mapping) -> Callable:
    if callable(mapping):
        return mapping
    kind, _, rest = str(mapping).partition(":")
    try:
        values = [float(v) for v in rest.split(",")] if rest else []
    except ValueError:
        values = []
    for value in values:  # outside the try: the error is a ValueError itself
        number("tadrop", "mapping", value)
    if kind == "identity" and not rest:
        return lambda ratio: ratio
    if kind == "affine" and len(values) == 2:
        slope, offset = values
        return lambda ratio: product(ratio, jnp.float32(slope)) + _unknown(offset, ratio)
    if kind == "power" and len(values) == 1:
        return lambda ratio: ratio ** _unknown(values[0], ratio)
    raise ParameterError(
        f"tadrop: mapping must be 'identity', 'affine:SLOPE,OFFSET', 'power:EXPONENT' or a function, got {mapping!r}"
    )
