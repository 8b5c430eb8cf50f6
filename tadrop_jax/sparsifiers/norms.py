"""Pruning at a threshold with the tensor's norm restored; what TADrop and its uniform control share."""

import jax.numpy as jnp

from tadrop_jax.errors import ParameterError
from tadrop_jax.steps import Sums, at_least, magnitude, safe_ratio, safe_sqrt


def check_norm(method: str, norm):
    """1, 2 or None.

    Raises:
      ParameterError: for any other value.
    """
    if norm not in (1, 2, None) or isinstance(norm, bool):
        raise ParameterError(f"{method}: norm must be 1, 2 or None, got {norm!r}")
    return norm


def norm_stages(norm) -> tuple[Sums, ...]:
    """How many entries stay when pruned at ``carry["cut"]``, and the sums of ``|x|^p`` before and after."""

    def of(x, carry, n):
        size = magnitude(x.stack)
        kept = at_least(size, x.column(carry["cut"]))
        count = {"count": jnp.where(kept & (size != 0), 1.0 / n, 0)}
        return count if norm is None else count | {"all": size**norm, "kept": jnp.where(kept, size**norm, 0)}

    return (Sums(of),)


def describe(carry, norm) -> dict:
    """Sparsity and norm, for reports."""
    said = {"sparsity": 1 - carry["count"]}
    return said if norm is None else said | {"norm": carry["all"] ** (1 / norm)}


def prune(x, carry, norm):
    """Zeros what lies below ``carry["cut"]``, then scales the rest so that the p-norm is what it was."""
    kept = jnp.where(at_least(magnitude(x.stack), x.column(carry["cut"])), x.stack, 0)
    return kept if norm is None else kept * x.column(scale(carry, norm))


def scale(carry, norm):
    """``||tau||_p / ||kept||_p``, one number a task; 0 where nothing is left."""
    ratio = safe_ratio(carry["all"], carry["kept"])
    return ratio if norm == 1 else safe_sqrt(ratio)
