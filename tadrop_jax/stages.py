"""Stages: what a step wants to know of the task vectors before it is applied, in statistics that add up over pieces."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from tadrop_jax import selection
from tadrop_jax.pieces import Piece
from tadrop_jax.wide import Wide

Carry = Mapping[str, jax.Array]
Scope = Literal["row", "tensor", "global"]


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """Statistics that are summed over everything but the leading axis.

    Attributes:
      of: ``(x, carry, n) -> {name: array}``; arrays ``(T, *S)``, or ``(1, *S)`` for one that all tasks share, or
        ``(T,)`` of what the piece is summed to already. n is the number of entries of the tensor. In the carry: float32
        ``(T,)`` or ``(1,)``; booleans are counted exactly, in uint32 (of a tensor: counts over a tree may pass 2^32).
      scope: ``"row"`` (the last axis), ``"tensor"`` or ``"global"`` (the tree).
      aside: of scope "global": neither later stages nor ``apply`` look at it, only the step's ``scalars``. Then it may
        be found in the pass that applies the step.
      tail: what ``of`` gives, if it can be told from what the stage before selects from.
      guess: of scope "global" and the last stage: what ``apply`` may take for it until it is found.
    """

    of: Callable[[Piece, Carry, Any], Mapping[str, jax.Array]]
    scope: Scope = "tensor"
    aside: bool = False
    tail: "Tail | None" = None
    guess: "Guess | None" = None


class Tail(NamedTuple):
    """Sums over non-negative entries and over those that reach an order statistic of theirs.

    They are ``"count"``, the share of all entries that are not 0 and reach it, and with a power ``"all"`` and
    ``"kept"``, the sums of powers of all entries and of those that reach it.

    Attributes:
      cut: the order statistic's name in the carry.
      power: 1, 2 or None.
    """

    cut: str
    power: int | None


class Guess(NamedTuple):
    """A statistic of the tree that few entries go by: the pass that applies the step finds it, and mends those.

    Attributes:
      values: what to take the statistics for, numbers by name.
      holds: ``carry -> bool``: whether what was found says of every entry what the guess said.
      matters: ``(x, carry) -> bool array``: which entries of a piece go by the guess.
    """

    values: Mapping[str, float]
    holds: Callable[[Carry], Any]
    matters: Callable[[Piece, Carry], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Min(Sums):
    """As :class:`Sums`, with the minimum in place of the sum."""


@dataclasses.dataclass(frozen=True, eq=False)
class Max(Sums):
    """As :class:`Sums`, with the maximum in place of the sum."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ranks:
    """Exact order statistics; constants for gradients, unless they are attached.

    Attributes:
      of: ``(x, carry) -> array`` of shape ``(T, *S)``, float32 (signed values too) or uint32.
      at: ``(n, carry) -> {name: rank}``: 0 is the smallest of the n entries (of the tensor, or of the tree). A rank is
        an int, a tuple of one int per task, or what :func:`~tadrop_jax.wide.floor_times` gives for arrays. Rank n
        gives a bound that no entry reaches. In the carry: ``(T,)``.
      scope: ``"row"``, ``"tensor"`` or ``"global"``.
      attached: of scope "global": whether what is computed from them has the gradient of the entries that they are
        (:func:`tadrop_jax.selection.attached`), since they enter values and not only selections.
      again: whether ``of`` gives what it gave in the stage before: then one pass may serve both.
      ties: name of the order statistic of the stage before whose ties this one parts by their position: ``of`` gives 0
        for what is above it, 1 + its position for what equals it, and the largest uint32 for what is below. Anything
        that parts the ties as the order statistic of this would may be found in its place.
    """

    of: Callable[[Piece, Carry], jax.Array]
    at: Callable[[int, Carry], Mapping[str, "int | tuple | Wide"]]
    scope: Scope = "tensor"
    attached: bool = False
    again: bool = False
    ties: str | None = None


Stage = Sums | Ranks


def magnitudes(x: Piece, carry: Carry) -> jax.Array:
    """What most sparsifiers select from: the ``of`` of a stage that executors know, so that they need not keep it."""
    return selection.magnitude(x.stack)
