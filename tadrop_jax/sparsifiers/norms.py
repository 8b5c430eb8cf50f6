"""Norms restored after pruning: what TADrop, its uniform control, dominance, DARE, DELLA and rescale share."""

import jax.numpy as jnp

from tadrop_jax.errors import ParameterError
from tadrop_jax.stages import Sums, Tail
from tadrop_jax.steps import at_least, magnitude, safe_ratio, safe_sqrt


def check_norm(method: str, norm):
    """1, 2 or None.

    Raises:
      ParameterError: for any other value.
    """
    if norm not in (1, 2, None) or isinstance(norm, bool):
        raise ParameterError(f"{method}: norm must be 1, 2 or None, got {norm!r}")
    return norm


def reaches_cut(x, carry):
    """Which entries are at least ``carry["cut"]`` in magnitude."""
    return at_least(magnitude(x.stack), x.column(carry["cut"]))


def norm_stages(norm, kept=reaches_cut) -> tuple[Sums, ...]:
    """How many entries stay, and the sums of ``|x|^p`` before and after; ``kept(x, carry)`` says which.

    Without it, those that reach the cut among the magnitudes that the stage before selects from.
    """

    def of(x, carry, n):
        stay = kept(x, carry)
        count = {"count": jnp.where(stay & (x.stack != 0), 1.0 / n, 0)}
        return count if norm is None else count | powers(x.stack, jnp.where(stay, x.stack, 0), norm)

    return (Sums(of, tail=Tail("cut", norm) if kept is reaches_cut else None),)


def powers(before, after, norm: int) -> dict:
    """``|x|^p`` before and after, whose sums :func:`scale` wants."""
    # Squares of magnitudes, but XLA keeps an array of the magnitudes for them.
    power = jnp.square if norm == 2 else magnitude
    return {"all": power(before), "kept": power(after)}


def describe(carry, norm) -> dict:
    """Sparsity and norm, for reports."""
    said = {"sparsity": 1 - carry["count"]}
    return said if norm is None else said | {"norm": carry["all"] ** (1 / norm)}


def prune(x, carry, norm, kept=reaches_cut):
    """Zeros all but what is kept, then scales that so that the p-norm is what it was."""
    stay = jnp.where(kept(x, carry), x.stack, 0)
    return stay if norm is None else stay * x.column(scale(carry, norm))


def scale(carry, norm):
    """``||tau||_p / ||kept||_p``, one number a task; 1 where nothing is left, or too little to square."""
    ratio = jnp.where(carry["kept"] == 0, 1, safe_ratio(carry["all"], carry["kept"]))
    return ratio if norm == 1 else safe_sqrt(ratio)
