"""Rules that treat matrices as matrices: what they share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tadrop_jax.parameters import single
from tadrop_jax.rules.task_arithmetic import task_arithmetic
from tadrop_jax.steps import Step, patterns, spec
from tadrop_jax.trees import selected


def matrix_rule(
    name: str,
    merge: Callable[[jax.Array], jax.Array],
    *,
    coefficient: Any = 1.0,
    mean_only=(),
    note: Callable[[tuple[int, int], int], Mapping[str, Any]] | None = None,
    **parameters: Any,
) -> Step:
    """A rule that merges matrices by a function of the whole stack, and takes the mean of all other tensors.

    Args:
      name: of the method.
      merge: the stack ``(T, out, in)`` in PyTorch order, float32, to the merged matrix ``(out, in)``.
      coefficient: multiplies the merged vector, means included.
      mean_only: regular expressions of matrices that get the mean: embeddings, ``text_projection``.
      note: ``(shape, tasks) -> {name: value}``, facts for the report of a matrix.
      **parameters: what else makes the method what it is, for its identity.

    Returns:
      A merge rule for whole tensors; tensors of one shape run batched.

    Raises:
      ParameterError: if the coefficient is no number, or a pattern is broken.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> largest = matrix_rule("largest", lambda stack: jnp.max(stack, axis=0))
      >>> stack = {"kernel": jnp.array([[[1.0, 5.0]], [[3.0, 2.0]]]), "bias": jnp.array([[1.0], [3.0]])}
      >>> merged = tj.merge_task_vectors(stack, largest)
      >>> merged["kernel"].tolist(), merged["bias"].tolist()
      ([[3.0, 5.0]], [2.0])
    """
    coefficient = single(name, "coefficient", coefficient)
    mean_only = patterns(mean_only)
    identity = spec(name, **parameters)
    mean = _mean(coefficient)

    def instead(path: str, shape: tuple[int, ...], tasks: int) -> Step | None:
        is_matrix = len(shape) == 2 and not (mean_only and selected(path, mean_only))
        return None if is_matrix else mean

    def apply(x, carry):
        return x.numbers["coefficient"] * x.from_torch_order(merge(x.in_torch_order()))

    return Step(
        apply=apply,
        piece="tensor",
        output="vector",
        instead=instead,
        mentions=mean_only,
        note=lambda shape, tasks: {"treated": "matrix"} | dict(note(shape, tasks) if note else {}),  # type: ignore[arg-type]
        spec=None if identity is None else (*identity, mean_only),
        numbers={"coefficient": coefficient},
    )


def _mean(coefficient) -> Step:
    step = task_arithmetic(coefficient, normalize=True)
    return dataclasses.replace(step, note=lambda shape, tasks: {"treated": "mean"})
