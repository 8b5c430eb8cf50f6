r"""TALL masks: localising what each task needs in the sum (arXiv 2405.07813)."""

import jax
import jax.numpy as jnp

from tadrop_jax.kinds import masked_vector
from tadrop_jax.parameters import lengths, number
from tadrop_jax.rules.on_top import parts_of, put_on_top
from tadrop_jax.selection import magnitude
from tadrop_jax.steps import AnyStep, Chain, Piece, Step, chain, masked, over_tasks, patterns, spec

KIND = masked_vector("tall")


def tall(tall_lambda=0.4, *, multi_task: AnyStep | None = None, per_task=()) -> Chain:
    r"""The sum of the task vectors, and for each task a mask of one bit an entry of where the sum serves it.

    .. math::

      \tau = \sum_t \tau_t, \quad m_t = |\tau_t| > \lambda_t |\tau - \tau_t|, \quad \theta_t = \theta_0 + m_t \tau

    The authors' code (``nik-dim/tall_masks``, ``generate_task_masks``) takes the differences between full weights, not
    between task vectors, so that a mask may differ where the two sides are within rounding of each other; and it picks
    :math:`\lambda_t` from .2, .3, .4, .5 and .6 for each task by validation. fusion-bench has the same function in
    ``tall_mask/utils.py``.

    Args:
      tall_lambda: :math:`\lambda_t`, at least 0; a number or one per task.
      multi_task: a merge rule whose vector takes the place of the sum. The authors' ``use_ties`` is
        ``ties(0.2, combine="sum")``. The :math:`\tau_t` of the masks are then the task vectors as they came, also
        where a sparsifier stands before.
      per_task: regular expression(s) of tensors that stay each task's own, heads for instance.

    Returns:
      A per-task rule: :func:`tadrop_jax.merge` gives a :class:`~tadrop_jax.bundles.Bundle` whose rescalers are 1.

    Raises:
      ParameterError: for a negative value or a broken pattern.
      MergeError: if ``multi_task`` is no rule that gives one model.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> models = [{"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 0.5])}]
      >>> bundle = tj.merge({"w": jnp.zeros(2)}, models, tj.tall())
      >>> bundle.unified["w"].tolist(), bundle.mask(0)["w"].tolist()
      ([4.0, -1.5], [False, True])
    """
    tall_lambda = number("tall", "tall_lambda", tall_lambda, 0)

    def apply(x, carry):
        vector, masks = vector_and_masks(x, tall_lambda, multi_task is not None)
        return {"unified": vector, "masks": masks}

    step = Step(
        apply=apply,
        output="bundle",
        kind=KIND,
        scalars=lambda carry, tasks: {"rescalers": jnp.ones((tasks,), jnp.float32)},
        per_task=patterns(per_task),
        lengths=lengths(tall_lambda=tall_lambda),
        spec=spec("tall", tall_lambda=tall_lambda, of_sum=multi_task is None),
    )
    return after(multi_task, step, "tall")


def after(multi_task: AnyStep | None, step: Step, method: str) -> Chain:
    """The step alone, or after a rule whose vector it finds on top of the stack.

    Raises:
      MergeError: if ``multi_task`` is no rule that gives one model.
    """
    if multi_task is None:
        return chain(step)
    *before, last = parts_of(multi_task, f"{method}: multi_task")
    return chain(*before, put_on_top(last), masked(step, include=last.include, exclude=last.exclude))


def vector_and_masks(x: Piece, tall_lambda, on_top: bool):
    """The sum of the task vectors, or the vector on top of the stack (S), and the TALL masks (T, *S)."""
    stack: jax.Array = x.given if on_top else x.stack  # type: ignore[assignment]
    vector = x.stack[0] if on_top else x.once(over_tasks(jnp.add, stack))
    return vector, magnitude(stack) > x.per_task(tall_lambda) * magnitude(vector - stack)
