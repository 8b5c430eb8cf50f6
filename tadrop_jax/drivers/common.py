"""What the drivers share: the tensors that they merge, the user's functions and batches, a progress bar."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tadrop_jax import memory
from tadrop_jax.contents import check_contents
from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.layouts import laid_out
from tadrop_jax.parameters import number
from tadrop_jax.sites import Tensor
from tadrop_jax.steps import AnyStep, expand, output_of, over_tasks, patterns
from tadrop_jax.task_vector import match
from tadrop_jax.trees import (
    as_dtype_of,
    check_patterns,
    copies_of,
    is_mergeable,
    is_traced,
    named_leaves,
    selected,
    tied,
)


class Problem(NamedTuple):
    """What a driver merges.

    Attributes:
      method: its name, for messages.
      treedef: of the base.
      names: of all leaves of the base, in order.
      base: by name, the base's tensors that are merged.
      models: for each task, its tensors by name.
      rest: by name, the leaves that come from the base untouched.
      aliases: names of tied weights, and of the tensor that stands for each.
    """

    method: str
    treedef: Any
    names: tuple[str, ...]
    base: dict[str, Any]
    models: tuple[dict[str, Any], ...]
    rest: dict[str, Any]
    aliases: dict[str, str]

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.models)

    def tree(self, merged: Mapping[str, Any], rest: Mapping[str, Any] | None = None):
        """Merged tensors and the untouched leaves as a tree like the base's; None for leaves that ``rest`` lacks."""
        leaves = {**(self.rest if rest is None else rest), **merged}
        return jax.tree_util.tree_unflatten(self.treedef, [leaves.get(self.aliases.get(n, n)) for n in self.names])

    def only(self, names) -> "Problem":
        """The same, with the other tensors taken from the base."""
        return self._replace(
            base={n: leaf for n, leaf in self.base.items() if n in names},
            models=tuple({n: leaf for n, leaf in m.items() if n in names} for m in self.models),
            rest=self.rest | {n: leaf for n, leaf in self.base.items() if n not in names},
        )

    def finished(self, merged: Mapping[str, Any]):
        """Float32 results as parameters: the type and the dtypes of the base."""
        return self.tree({n: as_dtype_of(self.base[n], v) for n, v in merged.items()})


def problem(method: str, base, models: Sequence[Any], include=None, exclude=None, same: bool = False) -> Problem:
    """Lines up base and models, as :func:`tadrop_jax.merge` does; ``same`` says that a model may equal the base.

    Raises:
      MergeError: if trees do not match, a tensor holds NaN or infinity, or a pattern matches nothing.
    """
    names, leaves, treedef = named_leaves(base)
    include, exclude = patterns(include), patterns(exclude)
    check_patterns((*include, *exclude), names)
    kept = {n for n in names if not selected(n, include, exclude)}
    columns = match(names, leaves, models, skip=frozenset(kept))
    every = [row for row in zip(names, leaves, columns, strict=True) if row[0] not in kept and is_mergeable(row[1])]
    if not every:
        raise MergeError("there is no float tensor to merge")
    firsts = tied((leaf, *column) for _, leaf, column in every)
    rows = [row for i, row in enumerate(every) if firsts[i] == i]
    aliases = {row[0]: every[first][0] for i, (row, first) in enumerate(zip(every, firsts, strict=True)) if first != i}
    merged = {row[0] for row in every}
    if same:
        check_contents([(n, None, column) for n, _, column in rows], alone="the parameters")
    else:
        check_contents(rows)
    return Problem(
        method,
        treedef,
        tuple(names),
        {n: leaf for n, leaf, _ in rows},
        tuple({n: column[t] for n, _, column in rows} for t in range(len(models))),
        {n: leaf for n, leaf in zip(names, leaves, strict=True) if n not in merged},
        aliases,
    )


def vectors(of: Problem, sparsifier: AnyStep | None, layout, key) -> dict[str, tuple[jax.Array, ...]]:
    """Task vectors by name, float32, one array a task: XLA would copy the slices of a stack.

    Raises:
      MergeError: if ``sparsifier`` is a merge rule.
    """
    if sparsifier is None:
        return {n: _differences(leaf, *(m[n] for m in of.models)) for n, leaf in of.base.items()}
    if output_of(sparsifier) != "stack":
        raise MergeError("sparsifier= takes a sparsifier, e.g. tj.tadrop(), not a merge rule")
    steps = expand(sparsifier, of.tasks)
    check_patterns([p for s in steps for p in s.named], of.names)
    tensors = []
    for name, leaf in of.base.items():
        order, seed_name = laid_out(layout, name, np.ndim(leaf))
        models = tuple(jnp.asarray(m[name]) for m in of.models)
        aliases = copies_of(name, of.aliases)
        tensors.append(Tensor(name, models, jnp.asarray(leaf), order, seed_name, aliases=aliases))
    results = memory.run(steps, tensors, of.tasks, key)
    found = {}
    for tensor in reversed(tensors):  # a stack is let go as soon as it is parted
        stack = results.pop().value
        found[tensor.path] = tuple(stack[t] for t in range(of.tasks))
    return found


@jax.jit
def _differences(base, *models):
    base = jnp.asarray(base, jnp.float32)
    return tuple(jnp.asarray(m, jnp.float32) - base for m in models)


def numbers(method: str, name: str, value, tasks: int, low: float = -float("inf")) -> jax.Array:
    """A parameter as float32 ``(T,)``, given one number or one per task.

    Raises:
      ParameterError: for another number of them, or a value below ``low``.
    """
    value = number(method, name, value, low)
    if isinstance(value, tuple) and len(value) != tasks:
        raise ParameterError(f"{method}: {name} has {len(value)} values, one per task, but there are {tasks} tasks")
    array = jnp.stack([jnp.asarray(v, jnp.float32) for v in value]) if isinstance(value, tuple) else value
    return jnp.broadcast_to(jnp.asarray(array, jnp.float32), (tasks,))


def weights(method: str, value, tasks: int) -> jax.Array:
    """One weight per task, float32 ``(T,)``: none negative, and not all 0.

    Raises:
      ParameterError: as :func:`numbers`, and if they are all 0.
    """
    found = numbers(method, "weights", value, tasks, 0)
    if not is_traced(found) and not bool(jnp.any(found > 0)):
        raise ParameterError(f"{method}: weights are all 0")
    return found


def weighted_mean(values: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """``sum_t w_t v_t / sum_t w_t`` in float32, for a tensor of each task."""
    return sum_of(values, weights / over_tasks(jnp.add, weights))


def sum_of(values: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """``sum_t w_t v_t`` in float32, for a tensor of each task."""
    first, *others = [weights[t] * jnp.asarray(v, jnp.float32) for t, v in enumerate(values)]
    return sum(others, start=first)


def each(method: str, name: str, given, tasks: int) -> tuple[Callable, ...]:
    """One function for each task, given one for all or T of them.

    Raises:
      ParameterError: if there are not T, if one is no function, or for what is neither.
    """
    if not (callable(given) or isinstance(given, (list, tuple))):
        raise ParameterError(f"{method}: {name} must be one function, or a list of {tasks}, got {type(given).__name__}")
    found = (given,) * tasks if callable(given) else tuple(given)
    if len(found) != tasks:
        raise ParameterError(f"{method}: {name} has {len(found)} functions, one per task, but there are {tasks} tasks")
    for one in found:
        if not callable(one):
            raise ParameterError(f"{method}: {name} takes functions of (params, batch), got {one!r}")
    return found


def sources(method: str, batches, tasks: int) -> tuple[Any, ...]:
    """The batches of each task, checked: T of them, each an iterable of batches or a function of the step.

    Raises:
      ParameterError: if there are not T, or if an array or a mapping stands where a list of batches belongs.
    """
    if callable(batches) or not isinstance(batches, (list, tuple)):
        raise ParameterError(f"{method}: batches must be a list, one entry per task, got {type(batches).__name__}")
    if len(batches) != tasks:
        raise ParameterError(f"{method}: batches has {len(batches)} entries, one per task, but there are {tasks} tasks")
    for t, source in enumerate(batches):
        single = isinstance(source, (np.ndarray, jax.Array, Mapping, str))
        if single or not (callable(source) or isinstance(source, Iterable)):
            raise ParameterError(
                f"{method}: batches[{t}] must be an iterable of batches (a list, a data loader) or a function of the "
                f"step, got {type(source).__name__}; put one batch in a list"
            )
    return tuple(batches)


def once(source) -> Iterator[Any]:
    """The batches of one task; a function is asked until it gives None."""
    if not callable(source):
        return iter(source)
    return itertools.takewhile(lambda batch: batch is not None, (source(step) for step in itertools.count()))


def endless(method: str, source, task: int) -> Iterator[Any]:
    """The batches of one task, begun again when they end.

    Raises:
      MergeError: when there is no batch, or when a function, or an iterator that cannot begin again, has ended.
    """
    if callable(source):
        yield from once(source)
        raise MergeError(f"{method}: batches[{task}] gave None in place of a batch: a function of the step must go on")
    while True:
        batch = None
        for batch in source:
            yield batch
        if batch is None:
            raise MergeError(f"{method}: batches[{task}] has no batch, or ended and cannot begin again; give a list")


class Bar:
    """A progress bar over steps; rich is imported where it is shown."""

    def __init__(self, shown: bool, what: str, total: int | None):
        self.bar = None
        if shown:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[said]}"),
            )
            self.bar = progress.Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(what, total=total, said="")

    def __enter__(self):
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.stop()

    def step(self, said: str = "") -> None:
        """One step further, with a word on it."""
        if self.bar is not None:
            self.bar.update(self.task, advance=1, said=said)
