r"""A norm restored after any sparsifier, as a step of its own."""

import dataclasses
import itertools
import math

from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.parameters import choice
from tadrop_jax.sparsifiers.norms import powers, scale
from tadrop_jax.stages import Ranks, Scope, Sums
from tadrop_jax.steps import AnyStep, PerTasks, Step, expand, output_of, reported


def rescale(sparsifier: AnyStep, norm: int = 2, granularity: Scope = "tensor") -> Step | PerTasks:
    r"""Scales what a sparsifier leaves, so that the norm is what it was before.

    .. math:: \tau' = f(\tau) \cdot \|\tau\|_p / \|f(\tau)\|_p

    One factor for each task, of each tensor or of the whole vector. Where the sparsifier leaves nothing, the result is
    zero. This is what the ``norm`` of :func:`~tadrop_jax.uniform` and :func:`~tadrop_jax.tadrop` does, for any
    sparsifier, and for a chain of them once, at its end: ``rescale(magnitude(1 - s), norm)`` is ``uniform(s, norm)``,
    but that they round the number of entries differently.
    ``norm=1`` is mergekit's ``rescale`` (``RescaleNorm.l1``).

    Args:
      sparsifier: any sparsifier, or a chain of them.
      norm: p, 2 or 1.
      granularity: ``"tensor"``, or ``"global"``: over all tensors that the sparsifier is for; not of a sparsifier that
        has another one in its place for some tensors (``Step.instead``).

    Returns:
      A sparsifier; of the tensors that the inner one leaves alone it changes nothing.

    Raises:
      MergeError: if a rule is given in place of a sparsifier.
      ParameterError: for values out of range, or, when run, a chain whose steps are for different tensors.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, -2.0, 3.0, -8.0]])}
      >>> tj.sparsify(stack, tj.rescale(tj.magnitude(0.25), norm=1))["w"].tolist()
      [[0.0, 0.0, 0.0, -14.0]]
    """
    if output_of(sparsifier) != "stack":
        raise MergeError("rescale takes a sparsifier, not a merge rule")
    choice("rescale", "norm", norm, (1, 2))
    choice("rescale", "granularity", granularity, ("tensor", "global"))
    if isinstance(sparsifier, Step):
        return _restoring(sparsifier, norm, granularity)

    def build(tasks: int) -> tuple[Step, ...]:
        steps = expand(sparsifier, tasks)
        if any((s.include, s.exclude) != (steps[0].include, steps[0].exclude) for s in steps):
            raise ParameterError(
                "rescale: the steps of a chain must be for the same tensors; use tj.masked on the whole"
            )
        return (_restoring(_joined(steps), norm, granularity),) if steps else ()

    return PerTasks(build, ("rescale", sparsifier, norm, granularity))


def _restoring(step: Step, norm: int, granularity: Scope) -> Step:
    if step.instead and granularity == "global":
        raise ParameterError(
            "rescale: granularity must be 'tensor' where other steps take a sparsifier's place (instead)"
        )
    mark = f"rescale {len(step.stages)} "  # no name that a stage of the inner step has

    def sums(x, carry, n):
        return {mark + k: v for k, v in powers(x.stack, step.apply(x, carry), norm).items()}

    def factor(carry):
        return scale({k: carry[mark + k] for k in ("all", "kept")}, norm)

    def report(carry):
        said = {} if step.report is None else step.report(carry)
        return {**said, "scale": factor(carry)}

    return dataclasses.replace(
        step,
        stages=(*step.stages, Sums(sums, scope=granularity)),
        apply=lambda x, carry: step.apply(x, carry) * x.column(factor(carry)),
        report=report,
        instead=step.others(lambda other: _restoring(other, norm, granularity)),
        spec=None if step.spec is None else ("rescale", step.spec, norm, granularity),
    )


def _joined(steps: tuple[Step, ...], last: int | None = None) -> Step:
    """A chain of sparsifiers as one step: the stages of a later one look at what the earlier ones make of the piece.

    Args:
      steps: the chain.
      last: number of the last draw, of the chain that this one takes the place of.
    """
    if len(steps) == 1:
        return steps[0]
    last = max(s.draw for s in steps) if last is None else last

    def own(i, named):
        """What the stages of step i found, or its numbers."""
        mark = f"{i} "
        return {k.removeprefix(mark): v for k, v in named.items() if k.startswith(mark)}

    def marked(i, named):
        return {f"{i} {k}": v for k, v in named.items()}

    def before(i, x, carry):
        """The piece as the steps before step i leave it, and as step i sees it."""
        start, numbers = x.draw - last, x.numbers
        for j, step in enumerate(steps[: i + 1]):
            x = x._replace(draw=start + step.draw, numbers=own(j, numbers))
            x = x._replace(stack=step.apply(x, own(j, carry))) if j < i else x
        return x

    def seen(i, stage):
        if isinstance(stage, Sums):
            return type(stage)(lambda x, c, n: marked(i, stage.of(before(i, x, c), own(i, c), n)), stage.scope)
        return Ranks(
            lambda x, c: stage.of(before(i, x, c), own(i, c)),
            lambda n, c: marked(i, stage.at(n, own(i, c))),
            stage.scope,
            attached=stage.attached,
            again=stage.again,
        )

    def instead(path, shape, tasks):
        found = tuple(s.for_tensor(path, shape, tasks) for s in steps)
        # Step.for_tensor gives it the draw of the chain.
        return None if found == steps else dataclasses.replace(_joined(found, last), draw=0)

    pieces = ("any", "group", "row", "slice", "tensor")
    known = all(s.spec is not None for s in steps)
    return dataclasses.replace(
        steps[0],
        apply=lambda x, carry: before(len(steps), x, carry).stack,
        stages=tuple(seen(i, stage) for i, step in enumerate(steps) for stage in step.stages),
        piece=max((s.piece for s in steps), key=pieces.index),
        group=math.lcm(*(s.group for s in steps)),
        report=lambda carry: reported(steps, [own(i, carry) for i in range(len(steps))]),
        task=None,
        across_tasks=any(s.across_tasks for s in steps),
        instead=instead if any(s.instead for s in steps) else None,
        mentions=tuple(itertools.chain(*(s.mentions for s in steps))),
        random=any(s.random for s in steps),
        draw=last,
        lengths=tuple(itertools.chain(*(s.lengths for s in steps))),
        spec=("joined", *((s.spec, s.draw) for s in steps)) if known else None,
        numbers={k: v for i, s in enumerate(steps) for k, v in marked(i, s.numbers).items()},
    )
