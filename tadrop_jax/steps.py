r"""The algebra that every sparsifier and merge rule is written in.

A step of a merge declares *stages* of statistics that add up over pieces of a tensor (or of the tree), then a function
of one piece and those statistics. It is an immutable value, in the manner of ``optax.GradientTransformation``; the
executors (:mod:`tadrop_jax.memory`, :mod:`tadrop_jax.streaming`) decide how to get what it asks for. A sparsifier is a
step that maps a stack of task vectors to a stack with more zeros; a merge rule is a last step that turns a stack into
one merged vector, merged parameters, or the parts of a per-task bundle.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.kinds import Kind
from tadrop_jax.parameters import lengths, number
from tadrop_jax.pieces import Piece
from tadrop_jax.selection import at_least, magnitude
from tadrop_jax.stages import Carry, Stage
from tadrop_jax.trees import check_pattern, selected_tied
from tadrop_jax.wide import floor_times

__all__ = [
    "Piece",
    "Step",
    "at_least",
    "chain",
    "expand",
    "floor_times",
    "magnitude",
    "masked",
    "over_tasks",
    "product",
    "safe_ratio",
    "safe_sqrt",
]

Output = Literal["stack", "vector", "parameters", "bundle"]
Kept = Literal["any", "group", "row", "slice", "tensor"]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step of a merge.

    Two steps with the same ``spec`` and ``numbers`` are the same step; the executors compile it once whatever the
    numbers. A step without a spec is equal to itself alone.

    Attributes:
      apply: ``(x, carry) -> array``: the new stack ``(T, *S)`` of a sparsifier; the merged task vector ``S`` of a rule;
        of a per-task rule the parts that its ``kind`` lists, e.g. ``{"unified": S, "masks": bool (T, *S)}``.
      stages: statistics, in order; each sees the carry of those before.
      piece: what ``apply`` and the stages need in one piece: ``"any"`` block, ``"group"`` (a multiple of ``group``
        entries), ``"row"`` (the last axis), ``"slice"`` (all axes but the first, in PyTorch order) or ``"tensor"``. A
        piece of rows or slices is of the shape ``(R, *part)``, or of the tensor's own.
      group: group length m, for ``piece="group"``.
      output: what apply returns.
      kind: what bundle a per-task rule leaves.
      scalars: for bundles: ``(carry, tasks) -> {name: (T,)}``, the numbers of the whole tree that the kind lists.
      report: ``carry -> {name: (T,) array}``, what to tell the user of each tensor; :func:`reported` puts it together.
      task: the one task that the step changes, whose number is then all that ``report`` gives; None for all.
      include: regular expressions of the paths that the step is for; empty means all.
      exclude: regular expressions of the paths that it leaves alone.
      per_task: regular expressions of the tensors that stay each task's own (bundles).
      instead: ``(path, shape, tasks) -> Step or None``: the step to use for a tensor in place of this one, for those
        that are no matrix for instance; of the same output, with no stage of the tree. The shape is in PyTorch order.
      mentions: regular expressions that ``instead`` goes by; each has to match a tensor.
      note: ``(shape, tasks) -> {name: value}``: what there is to tell the user of a tensor of this shape.
      random: whether the step draws random numbers.
      draw: number of the step's (last) draw among those of its chain, so that each has numbers of its own;
        :func:`expand` sets it.
      across_tasks: whether what becomes of one task hangs on the others.
      on_weights: whether the step looks at the base's values: it merges weights, and not task vectors alone.
      lengths: names and lengths of parameters that were given one per task; of ``numbers`` they are known.
      models: name of the method, and the least and the largest number of models that it merges (None: no limit).
      spec: hashable identity, e.g. ``("magnitude", 0.2, "global")``.
      numbers: what ``apply`` and the stages look up in ``x.numbers``, each a number or, as a tuple there, one per
        task: compiled functions take them as arguments, and serve for any. They are not in the spec, and nothing else
        hangs on them.
    """

    apply: Callable[[Piece, Carry], Any]
    stages: tuple[Stage, ...] = ()
    piece: Kept = "any"
    group: int = 1
    output: Output = "stack"
    kind: Kind | None = None
    scalars: Callable[[Carry, int], Mapping[str, jax.Array]] | None = None
    report: Callable[[Carry], Mapping[str, jax.Array]] | None = None
    task: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    per_task: tuple[str, ...] = ()
    instead: "Callable[[str, tuple[int, ...], int], Step | None] | None" = None
    mentions: tuple[str, ...] = ()
    note: Callable[[tuple[int, ...], int], Mapping[str, Any]] | None = None
    random: bool = False
    draw: int = 0
    across_tasks: bool = False
    on_weights: bool = False
    lengths: tuple[tuple[str, int], ...] = ()
    models: tuple[str, int, int | None] | None = None
    spec: tuple | None = None
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Checks what can be checked without data."""
        for field, options in (("output", get_args(Output)), ("piece", get_args(Kept))):
            if getattr(self, field) not in options:
                raise ParameterError(f"{field} must be one of {', '.join(options)}, got {getattr(self, field)!r}")
        if (self.output == "bundle") != (self.kind is not None):
            raise ParameterError("a step has a kind of bundle exactly if its output is 'bundle'")
        if self.piece == "group" and self.group < 1:
            raise ParameterError(f"group must be at least 1, got {self.group}")
        for pattern in (*self.named, *self.per_task):
            check_pattern(pattern)
        # An array of one number per task as a tuple, of which a piece of some tasks takes theirs.
        given = {name: number("a step", name, value) for name, value in self.numbers.items()}
        object.__setattr__(self, "numbers", given)

    def _identity(self):
        # Arrays that did not become Python's numbers are traced, or lie on other hosts too.
        if self.spec is None or any(isinstance(n, jax.Array) for n in jax.tree.leaves(dict(self.numbers))):
            return None
        numbers = tuple(sorted(self.numbers.items()))
        return (self.spec, numbers, self.include, self.exclude, self.per_task, self.draw)

    def __eq__(self, other):
        """Equal spec and masks, or the same object."""
        if not isinstance(other, Step):
            return NotImplemented
        return self is other or (self._identity() is not None and self._identity() == other._identity())

    def __hash__(self):
        """Consistent with equality."""
        identity = self._identity()
        return id(self) if identity is None else hash(identity)

    @functools.cached_property
    def form(self) -> "Step":
        """The step without its numbers: what compiled functions are kept by."""
        return dataclasses.replace(self, numbers={}) if self.numbers else self

    @property
    def named(self) -> tuple[str, ...]:
        """The regular expressions that have to match one of the tensors that the step sees."""
        return (*self.include, *self.exclude, *self.mentions)

    def for_tensor(self, path: str, shape: tuple[int, ...], tasks: int, aliases: tuple[str, ...] = ()) -> "Step":
        """This step, or the one that takes its place for a tensor, by any of the names of one that is tied."""
        if self.instead is None:
            return self
        others = (self.instead(name, shape, tasks) for name in (path, *aliases))
        found = next((other for other in others if other is not None), self)
        if found is self or not (found.random and self.draw):
            return found
        return dataclasses.replace(found, draw=found.draw + self.draw)  # its place in the chain is this step's

    def others(self, made: "Callable[[Step], Step]"):
        """The ``instead`` of a step that is made of this one: what takes this one's place, made into the same."""

        def instead(path, shape, tasks):
            other = None if self.instead is None else self.instead(path, shape, tasks)
            return None if other is None else made(other)

        return None if self.instead is None else instead

    def covers(self, path: str, aliases: tuple[str, ...] = ()) -> bool:
        """Whether the step is for the tensor of this path, by any of the names of one that is tied."""
        return selected_tied((path, *aliases), self.include, (*self.exclude, *self.per_task))


@dataclasses.dataclass(frozen=True)
class Chain:
    """Steps one after another; what depends on the number of tasks is a function of it."""

    parts: tuple["Step | Chain | PerTasks", ...]


@dataclasses.dataclass(frozen=True)
class PerTasks:
    """Steps that can be written down only when the number of tasks T is known; equal if their ``spec`` is."""

    build: Callable[[int], tuple[Step, ...]] = dataclasses.field(compare=False)
    spec: tuple
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


AnyStep = Step | Chain | PerTasks


def chain(*steps: AnyStep) -> Chain:
    """Composes steps: the stages of a later one see what the earlier ones put out.

    Args:
      *steps: sparsifiers, and at most one merge rule, which must be last.

    Returns:
      A sparsifier, or a merge rule if the last step is one.

    Raises:
      TypeError: for what is no step.
      MergeError: if a rule is followed by another step.

    Example:
      >>> import tadrop_jax as tj
      >>> rule = tj.chain(tj.tadrop(), tj.task_arithmetic(0.3))
    """
    for step in steps:
        if not isinstance(step, AnyStep):
            raise TypeError(f"chain takes sparsifiers and rules, got {step!r}")
    for step in steps[:-1]:
        if output_of(step) != "stack":
            raise MergeError("a merge rule must be the last step of a chain")
    return Chain(tuple(steps))


def masked(step: AnyStep, *, include=(), exclude=()) -> AnyStep:
    """Restricts a step to some tensors; the others pass through it untouched.

    A pattern has to match a tensor of the tree, though it may be one that does not merge. Weights that are tied are one
    tensor with several names: what matches one of them matches the tensor.

    Args:
      step: any step.
      include: regular expression, or several, searched for in the path (``re.search``); none means all tensors.
      exclude: the same; exclude beats include.

    Returns:
      The restricted step. A restricted rule leaves the base's values where it does not apply.

    Raises:
      MergeError: for what is no step.
      ParameterError: for what is no regular expression.

    Example:
      >>> import tadrop_jax as tj
      >>> sparsifier = tj.masked(tj.tadrop(), exclude="embeddings")
    """
    output_of(step)  # refuses what is no step
    include, exclude = patterns(include), patterns(exclude)
    for pattern in (*include, *exclude):
        check_pattern(pattern)
    if not include and not exclude:
        return step
    if isinstance(step, Chain):
        return Chain(tuple(masked(part, include=include, exclude=exclude) for part in step.parts))
    if step.include and include:
        # Both have to hold: one lookahead for each.
        include = tuple(f"^(?=.*{_inside(a)})(?=.*{_inside(b)})" for a in step.include for b in include)
    else:
        include = step.include or include
    return dataclasses.replace(step, include=include, exclude=(*step.exclude, *exclude))


def _inside(pattern: str) -> str:
    """A regular expression as a group of another one; flags at its beginning are the group's."""
    flags = re.match(r"\(\?([aimsx]+)\)", pattern)
    return f"(?:{pattern})" if flags is None else f"(?{flags[1]}:{pattern[flags.end() :]})"


def patterns(given) -> tuple[str, ...]:
    """None, one regular expression or several, as a tuple.

    Raises:
      ParameterError: for anything else.
    """
    found = () if given is None else (given,) if isinstance(given, str) else given
    if not isinstance(found, (tuple, list)) or not all(isinstance(pattern, str) for pattern in found):
        raise ParameterError(f"what restricts to tensors is a regular expression, or several, got {given!r}")
    return tuple(found)


def per_task_patterns(step: AnyStep) -> tuple[str, ...]:
    """The tensors that a per-task rule leaves to each task."""
    last = step
    while isinstance(last, Chain) and last.parts:
        last = last.parts[-1]
    return last.per_task if isinstance(last, Step) else ()


def output_of(step: AnyStep) -> Output:
    """What the last step of a chain puts out.

    Raises:
      MergeError: for what is no step.
    """
    while isinstance(step, Chain):
        if not step.parts:
            return "stack"
        step = step.parts[-1]
    if not isinstance(step, Step | PerTasks):
        call = f"; call it: tj.{getattr(step, '__name__', '')}()" if callable(step) else ""
        raise MergeError(f"expected a rule or a sparsifier, such as tj.ties(0.2) or tj.tadrop(), got {step!r}{call}")
    return "stack" if isinstance(step, PerTasks) else step.output


def is_on_weights(step: AnyStep) -> bool:
    """Whether a step, or one of a chain, merges weights: what it puts out are parameters, or were inside it."""
    if isinstance(step, Chain):
        return any(is_on_weights(part) for part in step.parts)
    return isinstance(step, Step) and (step.output == "parameters" or step.on_weights)


def expand(step: AnyStep, tasks: int) -> tuple[Step, ...]:
    """The plain steps of a chain for T tasks.

    Raises:
      ParameterError: if a parameter was given one per task, for another number of tasks; or if a rule does not merge
        so many models.
    """
    if isinstance(step, Step):
        if step.models is not None:
            _check_models(*step.models, tasks)
        for name, length in (*step.lengths, *lengths(**step.numbers)):
            if length != tasks:
                raise ParameterError(f"{name} has {length} values, one per task, but there are {tasks} tasks")
        return (step,)
    if isinstance(step, Chain):
        found: list[Step] = []
        draws = 0
        for part in step.parts:
            own = expand(part, tasks)
            found += [dataclasses.replace(s, draw=s.draw + draws) if s.random and draws else s for s in own]
            draws += max((s.draw + 1 for s in own if s.random), default=0)
        return tuple(found)
    steps = step.build(tasks)
    return tuple(masked(s, include=step.include, exclude=step.exclude) for s in steps)  # type: ignore[misc]


def _check_models(method: str, least: int, most: int | None, tasks: int) -> None:
    if tasks < least or (most is not None and tasks > most):
        wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise ParameterError(f"{method}: merges {wanted} fine-tuned model{'s' * (most != 1)}, got {tasks}")


def reported(steps: Sequence[Step], carries: Sequence[Carry | None]) -> dict[str, Any]:
    """What the steps of a chain tell of a tensor, from what their stages found: of each thing the last word."""
    found: dict[str, Any] = {}
    for step, carry in zip(steps, carries, strict=True):
        for name, values in (step.report(carry) if step.report and carry else {}).items():
            if step.task is None:
                found[name] = values
                continue
            tasks = found[name] if isinstance(found.get(name), dict) else {}
            found[name] = {**tasks, step.task: values}
    return {k: jnp.concatenate([v[t] for t in sorted(v)]) if isinstance(v, dict) else v for k, v in found.items()}


def scalars_of(rule: Step, carry: Carry, tasks: int) -> dict[str, Any]:
    """The numbers that a per-task rule keeps for the whole tree.

    Args:
      rule: the rule.
      carry: the statistics of the tree; empty if no entry was merged, so that none was found: then they are 0.
      tasks: T.
    """
    if rule.kind is None or rule.scalars is None:
        return {}
    if rule.stages and not carry:
        return {name: jnp.zeros(tasks, jnp.float32) for name in rule.kind.scalars}
    return dict(rule.scalars(carry, tasks))


def spec(name: str, /, **parameters) -> tuple | None:
    """Hashable identity of a method with its parameters, or None if one of them is an array."""
    items = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(parameters.items()))
    try:
        hash(items)
    except TypeError:
        return None
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves([v for _, v in items])):
        return None
    return (name, *items)


def over_tasks(op, stack, *others, of=lambda row, *others: row) -> jax.Array:
    """Folds a binary operation over tasks, one after another.

    Every executor then rounds alike; and XLA on CPU is many times slower at reducing a leading axis. What is folded
    should be made of each task here, by ``of``: made of the whole stack before, it is an array of its own, and so is
    the stack; made of the task vectors one by one, neither is.

    Args:
      op: of two arrays of shape S.
      stack: ``(T, *S)``, or a list of T arrays.
      *others: the same, or what all tasks share: a number, or an array with a leading axis of 1.
      of: makes what is folded of a task's entry of ``stack`` and of each of ``others``.
    """

    def row(array, t):
        return array if jnp.ndim(array) == 0 else array[t if len(array) > 1 else 0]

    return functools.reduce(op, [of(stack[t], *(row(other, t) for other in others)) for t in range(len(stack))])


@jax.custom_jvp
def product(a, b) -> jax.Array:
    """``a * b``, rounded before anything is added to it: +a and -a cancel, and every executor rounds alike.

    XLA fuses a product into the sum that takes it, but for a select in between.
    """
    return jnp.where(a == 0, 0, a * b)


@product.defjvp
def _(primals, tangents):
    (a, b), (da, db) = primals, tangents
    return product(a, b), da * b + a * db


def safe_ratio(a, b) -> jax.Array:
    """``a / b``, and 0 where b is 0; gradients stay finite."""
    zero = b == 0
    return jnp.where(zero, 0, a / jnp.where(zero, 1, b))


def safe_sqrt(a) -> jax.Array:
    """``sqrt(a)``, and 0 where a is 0; gradients stay finite."""
    zero = a == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, a)))
