"""A chain of steps at work: the loop that every executor runs over a piece, and what its stages found."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import jax

from tadrop_jax.errors import MergeError
from tadrop_jax.pieces import Piece
from tadrop_jax.stages import Stage, Sums
from tadrop_jax.steps import Step


def merge_stages(results) -> dict[str, jax.Array]:
    """The carry: what the stages found, in one dictionary."""
    return {name: value for found in results if found is not None for name, value in found.items()}


def global_stages(steps: Sequence[Step], passing: bool = True) -> list[tuple[int, int]]:
    """Where statistics of the whole tree are needed: (step, stage), in order; with those found in passing, or not."""
    return [
        (i, j)
        for i, s in enumerate(steps)
        for j, stage in enumerate(s.stages)
        if stage.scope == "global" and (passing or not in_passing(steps, i, j))
    ]


def in_passing(steps: Sequence[Step], i: int, j: int) -> bool:
    """Whether the pass that applies a chain can find a stage's statistic: nothing looks at it, or goes by a guess."""
    stage = steps[i].stages[j]
    last = (i, j) == (len(steps) - 1, len(steps[i].stages) - 1)
    return may_pass(stage) and (last or stage.guess is None)


def may_pass(stage: Stage) -> TypeGuard[Sums]:
    """Whether a stage leaves it open when its statistic is found: it is aside, or has a guess."""
    return isinstance(stage, Sums) and (stage.aside or stage.guess is not None)


class Reached(NamedTuple):
    """How far :func:`advance` came.

    Attributes:
      x: the piece, as the steps before left it.
      value: what the last step put out; None if it stopped at a stage, or if a rule leaves the tensor alone.
      carry: what the stages of the step where it stopped found so far.
      carries: for each step, what each of its stages found.
    """

    x: Piece
    value: Any
    carry: dict[str, jax.Array]
    carries: tuple


def advance(steps: Sequence[Step], active: Sequence[bool], x: Piece, carries, reduce, stop=None) -> Reached:
    """Applies a chain to a piece: the one loop that every executor runs.

    Args:
      steps: the chain.
      active: which steps are for this tensor.
      x: the piece.
      carries: for each step, what each of its stages found, or None.
      reduce: ``(stage, x, carry) -> found``, called for the stages that are missing.
      stop: (step, stage) before which to stop, or None for the whole chain.
    """
    carries = list(carries)
    x = x._replace(given=x.stack)
    for i, step in enumerate(steps):
        if not active[i]:
            continue
        found, x = list(carries[i]), x._replace(draw=step.draw, numbers=step.numbers, known={})
        for j, stage in enumerate(step.stages):
            carry = merge_stages(found[:j])
            if stop == (i, j):
                carries[i] = tuple(found)
                return Reached(x, None, carry, tuple(carries))
            if found[j] is None:
                found[j] = reduce(stage, x, carry)
        carries[i] = tuple(found)
        value = step.apply(x, merge_stages(found))
        _check_shape(step, x, value)
        if step.output != "stack":
            return Reached(x, value, {}, tuple(carries))
        x = x._replace(stack=value)
    rule = bool(steps) and steps[-1].output != "stack"
    return Reached(x, None if rule else x.stack, {}, tuple(carries))


def _check_shape(step: Step, x: Piece, value) -> None:
    """Refuses what a step of the user's own puts out if it has another shape than it says: it would be broadcast."""
    if step.output == "bundle":
        return
    wanted = x.stack.shape if step.output == "stack" else x.stack.shape[1:]
    found = getattr(value, "shape", None)
    on_top = (len(x.tasks) + 1, *wanted[1:])  # what a rule merged, on top of the task vectors (SVC)
    if found != wanted and not (step.output == "stack" and found == on_top):
        got = f"shape {list(found)}" if found is not None else f"a {type(value).__name__}"
        said = f"of a stack of shape {list(x.stack.shape)} a step with output={step.output!r} makes {list(wanted)}"
        raise MergeError(f"{said}; its apply gave {got}")
