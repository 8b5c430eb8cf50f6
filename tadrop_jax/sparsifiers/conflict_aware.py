"""Conflict-aware sparsification of CABS (arXiv 2503.01874): masks that do not overlap."""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp

from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.parameters import whole
from tadrop_jax.stages import Ranks, Sums
from tadrop_jax.steps import AnyStep, PerTasks, Step, expand, output_of, over_tasks


def conflict_aware(sparsifier: AnyStep, order=None) -> PerTasks:
    r"""Sparsifies one task after another, each on the entries that the tasks before it left free.

    .. math:: \tau'_t = f\Big(\tau_t \cdot \prod_{s < t} [\tau'_s = 0]\Big)

    An entry is taken where the output of an earlier task is not zero. The inner sparsifier counts its n over all
    entries. ``conflict_aware(n_m(n, m, "drop"))`` is what the authors do with two tasks (``zongzhenyang/CABS``,
    ``block_random_pruning``).

    Args:
      sparsifier: any sparsifier that goes by each task alone: not dominance, nor another conflict_aware.
      order: the order of the tasks, a permutation of 0 to T - 1; None means as given.

    Returns:
      A sparsifier whose T masks are disjoint.

    Raises:
      MergeError: if a rule is given in place of a sparsifier.
      ParameterError: if ``order`` is no list of whole numbers; when run, if it is no permutation of the tasks, or if
        the sparsifier compares tasks.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[5.0, 4.0, 0.0], [9.0, 3.0, 1.0]])}
      >>> tj.sparsify(stack, tj.conflict_aware(tj.magnitude(0.4)))["w"].tolist()
      [[5.0, 0.0, 0.0], [0.0, 3.0, 0.0]]
    """
    if output_of(sparsifier) != "stack":
        raise MergeError("conflict_aware takes a sparsifier, not a merge rule")
    order = whole_order("conflict_aware", order)

    def build(tasks: int) -> tuple[Step, ...]:
        turns = turns_of("conflict_aware", order, tasks)
        inner = expand(sparsifier, tasks)
        return tuple(_restricted(step, task, turns[:i]) for i, task in enumerate(turns) for step in inner)

    return PerTasks(build, ("conflict_aware", sparsifier, order))


def whole_order(method: str, order) -> tuple[int, ...] | None:
    """An order of tasks as a tuple of ints; None stays None.

    Raises:
      ParameterError: for what is no list of whole numbers.
    """
    if order is None:
        return None
    numbers = order.tolist() if hasattr(order, "tolist") else order
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise ParameterError(f"{method}: order must be a list of tasks, got {order!r}")
    return tuple(whole(method, "a task of order", t, 0) for t in numbers)


def turns_of(method: str, order: tuple[int, ...] | None, tasks: int) -> tuple[int, ...]:
    """The tasks in their order.

    Raises:
      ParameterError: if the order is no permutation of the tasks.
    """
    turns = tuple(range(tasks)) if order is None else order
    if sorted(turns) != list(range(tasks)):
        raise ParameterError(f"{method}: order must be a permutation of 0 to {tasks - 1}, got {list(turns)}")
    return turns


def _restricted(step: Step, task: int, earlier: tuple[int, ...]) -> Step:
    """The step for one task, on what the earlier tasks left free.

    Raises:
      ParameterError: if the step compares tasks.
    """
    if step.across_tasks:
        raise ParameterError(
            "conflict_aware: gives its sparsifier one task at a time, but one that compares tasks is given "
            "(dominance or conflict_aware); put them one after the other in a chain"
        )

    def view(x):
        own = x.stack[task]
        if earlier:
            taken = over_tasks(jnp.logical_or, [x.stack[t] for t in earlier], of=lambda row: row != 0)
            # Once, or what the earlier steps compute is in each of the later ones' functions, again and again.
            own = jnp.where(x.once(taken), 0, own)
        return x._replace(stack=own[None], tasks=(task,))

    def restrict(stage):
        if isinstance(stage, Sums):
            return type(stage)(lambda x, carry, n: stage.of(view(x), carry, n), stage.scope)
        return Ranks(
            lambda x, carry: stage.of(view(x), carry),
            lambda n, carry: own_ranks(stage, n, carry),
            stage.scope,
            attached=stage.attached,
            again=stage.again,
        )

    def own_ranks(stage, n, carry):
        # A plain tuple holds one rank for each task.
        return {name: r[task] if type(r) is tuple else r for name, r in stage.at(n, carry).items()}

    def apply(x, carry):
        return x.stack.at[task].set(step.apply(view(x), carry)[0])

    return dataclasses.replace(
        step,
        stages=tuple(restrict(s) for s in step.stages),
        apply=apply,
        task=task,
        across_tasks=True,
        instead=step.others(lambda other: _restricted(other, task, earlier)),
        spec=None if step.spec is None else ("conflict_aware", step.spec, task, earlier),
    )
